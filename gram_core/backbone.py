"""The frozen towers: the only module that knows open_clip.

Owns where a model's files come from, how they become two frozen towers on one device in one precision,
and the model's fingerprint. It knows nothing of prompts, requests or tuning.

A model is named in one of four ways: `gram-mini` (bundled), a directory that holds `open_clip_config.json`
and a safetensors file, `NAME/TAG` (an open_clip architecture and one of its pretrained tags, as
`ViT-B-16/openai`), or `hf-hub:ORG/REPO`. The last two are fetched once by `fetch`, safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import httpx
import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import LayerScale, ResidualAttentionBlock
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gram_core.errors import InvalidClasses, ModelUnavailable, UnsupportedTower

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
DEFAULT_MODEL_DIR = Path("~/.cache/gram")
CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
SUMS = "SHA256SUMS"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
TOLD = 240  # characters of what torch says of a driver; its advice goes on for lines
SMALL_TOWER = 20_000_000  # parameters; below it the cost of a call, not of its arithmetic, decides the shape


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One pre-norm transformer block, (out, in) matrices as torch keeps them."""

    norm1: tuple[Tensor, Tensor, float]
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    scale1: Tensor | None
    norm2: tuple[Tensor, Tensor, float]
    up: tuple[Tensor, Tensor]
    act: Callable[[Tensor], Tensor]
    down: tuple[Tensor, Tensor]
    scale2: Tensor | None


@dataclass(frozen=True, eq=False)
class TextWeights:
    """A causal text tower as plain frozen tensors, for the exact fast path of `gram_core.text`."""

    tokens: Tensor  # (vocabulary, W)
    positions: Tensor  # (T, W)
    layers: tuple[LayerWeights, ...]
    heads: int
    final_norm: tuple[Tensor, Tensor, float]
    projection: Tensor | None  # (W, D)
    projection_bias: Tensor | None
    eos_id: int | None  # None: read at the highest token id, as CLIP does

    @property
    def width(self) -> int:
        """W."""
        return int(self.tokens.shape[1])

    def read_at(self, tokens: Tensor) -> Tensor:
        """Position (K,) at which each row of `tokens` (K, T) is read: the first EOT."""
        marks = tokens if self.eos_id is None else (tokens == self.eos_id).int()
        return marks.argmax(dim=-1)


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies on disk."""

    name: str
    folder: Path
    weights: Path


# ---- files -----------------------------------------------------------------------------------------------------


def locate(model: str, model_dir: Path | None = None) -> ModelFiles:
    """The files of `model`, without touching the network.

    Raises ModelUnavailable, saying what is missing, when they are not there.
    """
    name, folder = _place(model, model_dir)
    if not (folder / CONFIG).is_file():
        raise ModelUnavailable(
            f"model {name!r} has no {CONFIG} in its folder; expected an open_clip directory "
            f"({CONFIG} and {WEIGHTS}). Check GRAM_MODEL and GRAM_MODEL_DIR."
        )
    weights = folder / WEIGHTS
    if not weights.is_file():
        others = sorted(folder.glob("*.safetensors"))
        others = [p for p in others if p.stem not in ("root", "bank", "gram")]
        if len(others) != 1:
            raise ModelUnavailable(
                f"model {name!r} needs {WEIGHTS} beside its {CONFIG}; found {len(others)} other safetensors files. "
                "Pickled weights (.bin, .pt, .pth) are never read: convert them to safetensors."
            )
        weights = others[0]
    return ModelFiles(name, folder, weights)


def fetch(model: str, model_dir: Path | None = None, offline: bool = False) -> None:
    """Make a named model present on disk; does nothing for a bundled, local or already fetched one.

    Raises ModelUnavailable when it can't be had: unknown name or tag, no safetensors published, `offline`, or the
    hub can't be reached.
    """
    name, folder = _place(model, model_dir)
    if (folder / CONFIG).is_file() or folder.is_relative_to(ASSETS) or Path(model).is_dir():
        return
    if model.startswith("hf-hub:"):
        repo, config = model.removeprefix("hf-hub:"), None
    else:
        repo, config = _registry(model)
    if offline:
        raise ModelUnavailable(f"model {name!r} is not in the model directory and GRAM_OFFLINE is true.")
    folder.mkdir(parents=True, exist_ok=True)
    download = _Download(repo, folder, name)
    download(WEIGHTS)
    if config is None:
        aside = folder / ".partial"  # a config in its place says that the rest is complete: a kill must not leave one
        _Download(repo, aside, name)(CONFIG)
        config = json.loads((aside / CONFIG).read_text(encoding="utf-8"))
        shutil.rmtree(aside)
        if config.get("model_cfg", {}).get("text_cfg", {}).get("hf_tokenizer_name"):
            for file in TOKENIZER_FILES:
                download(file, required=file == "tokenizer.json")
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    partial = folder / f".{CONFIG}.{os.getpid()}"
    partial.write_text(json.dumps(config, indent=1), encoding="utf-8")
    partial.replace(folder / CONFIG)


class _Download:
    """One file at a time from the Hugging Face hub into a folder."""

    def __init__(self, repo: str, folder: Path, name: str) -> None:
        self.repo, self.folder, self.name = repo, folder, name

    def __call__(self, file: str, required: bool = True) -> None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        try:
            hf_hub_download(self.repo, file, local_dir=self.folder, endpoint=os.environ.get("HF_ENDPOINT"))
        except RepositoryNotFoundError:
            raise ModelUnavailable(f"the hub has no public repository {self.repo!r} for model {self.name!r}.") from None
        except LocalEntryNotFoundError as error:  # an EntryNotFoundError too, but it means: no connection
            raise self._unreachable(error) from error
        except EntryNotFoundError:
            if required:
                raise ModelUnavailable(
                    f"model {self.name!r} publishes no {file}; only safetensors weights are read."
                ) from None
        except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> ModelUnavailable:
        return ModelUnavailable(
            f"model {self.name!r} could not be fetched ({type(error).__name__}). Check the network, or put its "
            f"{CONFIG} and {WEIGHTS} into a directory and name that."
        )


def _place(model: str, model_dir: Path | None) -> tuple[str, Path]:
    bundled = ASSETS / model
    if bundled.parent == ASSETS and bundled.is_dir():
        return model, bundled
    if Path(model).expanduser().is_dir():
        folder = Path(model).expanduser().resolve()
        return folder.name, folder
    root = (model_dir or DEFAULT_MODEL_DIR).expanduser()
    if model.startswith("hf-hub:"):
        repo = model.removeprefix("hf-hub:")
        if repo.count("/") != 1 or not all(repo.split("/")) or ".." in repo:
            raise ModelUnavailable("a hub model is named hf-hub:ORG/REPO.")
        return model, root / ("hf-hub--" + repo.replace("/", "--"))
    _registry(model)
    return model, root / model.replace("/", "--")


def _registry(model: str) -> tuple[str, dict[str, Any]]:
    """Hub repository and configuration of `NAME/TAG` in open_clip's own list."""
    name, _, tag = model.partition("/")
    config = open_clip.get_model_config(name)
    if config is None:
        raise ModelUnavailable(
            f"no model {model!r}: not bundled ({', '.join(bundled_models())}), not a directory, and not an open_clip "
            "architecture. Use NAME/TAG as in ViT-B-16/openai, a directory, or hf-hub:ORG/REPO."
        )
    pretrained = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if not pretrained:
        from open_clip.pretrained import list_pretrained_tags_by_model

        tags = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise ModelUnavailable(f"architecture {name!r} has no pretrained tag {tag!r}; its tags: {tags}.")
    repo, file = os.path.split(pretrained.get("hf_hub", ""))
    if not repo or file:
        raise ModelUnavailable(f"model {model!r} is not published as safetensors; only safetensors weights are read.")
    if pretrained.get("quick_gelu"):
        config["quick_gelu"] = True  # trained with it: plain GELU would move every feature
    keep = ("mean", "std", "interpolation", "resize_mode")
    return repo, {"model_cfg": config, "preprocess_cfg": {k: pretrained[k] for k in keep if k in pretrained}}


def bundled_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(p.parent.name for p in ASSETS.glob(f"*/{CONFIG}"))


def imagenet_names() -> tuple[str, ...]:
    """The 1,000 ImageNet class names of CLIP's authors as open_clip carries them, in the order of the sorted WordNet
    ids; some names occur twice."""
    return tuple(open_clip.IMAGENET_CLASSNAMES)


def template_sets() -> dict[str, tuple[str, ...]]:
    """The prompt templates that open_clip carries: `simple` (7) and `openai` (80), each with one `{}`."""
    sets = {"simple": open_clip.SIMPLE_IMAGENET_TEMPLATES, "openai": open_clip.OPENAI_IMAGENET_TEMPLATES}
    return {name: tuple(template("{}") for template in templates) for name, templates in sets.items()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sums(folder: Path) -> int:
    """Hold the files of a folder to its SHA256SUMS; how many there are, 0 where the folder has no such list.

    Raises ModelUnavailable, naming the first file that is missing or not what the list says.
    """
    sums = folder / SUMS
    if not sums.is_file():
        return 0
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"([0-9a-f]{64})  ([^/\\]+)", line)
        if match is None:
            raise ModelUnavailable(f"line {number} of {SUMS} is not a hash, two spaces and a file's name; restore it.")
        digest, name = match.groups()
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise ModelUnavailable(
                f"{name} in the model's folder is missing or is not what {SUMS} there says. Restore it, or write "
                f"{SUMS} again if you changed it yourself."
            )
    return len(lines)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of every tensor of the loaded model, floats as float32.

    It says which features a prompt, a root or a bank was made with, whatever file or precision they came in.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu()
        value = value.float() if value.is_floating_point() else value.long()
        digest.update(name.encode())
        digest.update(str(tuple(value.shape)).encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- towers ----------------------------------------------------------------------------------------------------


class Backbone:
    """Frozen image and text towers of one open_clip model; unit-norm float32 features out.

    Attributes:
        text: the text tower as plain tensors, or None where only open_clip's own path is correct (`text_note` says
            why). Its weights are in the tower dtype; norms, positions and token table stay float32.
        image_chunk, view_chunk: the only two batch sizes the image tower ever sees. In a fixed shape a row's
            features do not depend on its neighbours.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str,
        weights_sha256: str,
        device: torch.device,
        bf16: bool,
    ) -> None:
        self.name = name
        self.weights_sha256 = weights_sha256
        self.fingerprint = fingerprint(model)
        self.device = device
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.parameters = sum(p.numel() for p in model.parameters())
        model.eval().requires_grad_(False)
        config = open_clip.get_model_preprocess_cfg(model)
        size = config["size"]
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if sides[0] != sides[1]:
            raise UnsupportedTower(
                f"the image tower reads {sides[0]} x {sides[1]} pixels; only square inputs are read."
            )
        self.image_size: int = sides[0]
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        self.interpolation: str = config["interpolation"]
        self._preprocess = open_clip.image_transform(
            self.image_size,
            is_train=False,
            mean=self.mean,
            std=self.std,
            resize_mode=config["resize_mode"],
            interpolation=self.interpolation,
            fill_color=config["fill_color"],
        )
        network: Any = model  # torch types a module's attributes as Tensor | Module
        self.logit_scale = float(network.logit_scale.exp().mean())
        self._tokenizer = tokenizer
        tower = getattr(model, "text", model)
        self.context_length = int(getattr(tower, "context_length", 0) or getattr(tokenizer, "context_length", 77))
        pad_probe = tokenizer([""], context_length=self.context_length)
        self._pad_id = int(pad_probe[0, -1])

        self.text, self.text_note = _text_weights(tower, device, self.dtype)
        self._visual = _fast_visual(network.visual, device, self.dtype)
        if self.text is None:
            self._model: nn.Module | None = model.to(device)
        else:
            self._model = None
        small = sum(p.numel() for p in self._visual.parameters()) < SMALL_TOWER
        on_cpu = device.type == "cpu"
        self.image_chunk = (4 if small else 1) if on_cpu else 32
        self.view_chunk = (8 if small else 2) if on_cpu else 64
        with torch.no_grad():
            self.joint_dim = int(self.encode_images(torch.zeros(1, 3, self.image_size, self.image_size)).shape[-1])

    @property
    def text_path(self) -> str:
        """`exact` for our own path, `open_clip` for the library's."""
        return "open_clip" if self.text is None else "exact"

    def tensors(self) -> list[Tensor]:
        """Everything that must never change, for `gram_core.device.Sentinel`."""
        towers = [self._visual] if self._model is None else [self._visual, self._model]
        found = [t for tower in towers for t in (*tower.parameters(), *tower.buffers())]
        if self.text is not None:
            found += _tensors(self.text)
        return list({t.untyped_storage().data_ptr(): t for t in found}.values())

    def preprocess(self, image: Image.Image) -> Tensor:
        """open_clip's evaluation transform: an upright RGB image to (3, size, size) float32 on the CPU."""
        tensor: Tensor = self._preprocess(image)
        return tensor

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, *, views: bool = False, chunk: int | None = None) -> Tensor:
        """(M, 3, size, size) preprocessed pixels to (M, D) unit-norm float32 features on the device.

        Runs in chunks of one fixed shape, the last one padded with zeros, so that a row's value does not depend on
        how many rows there are. `chunk` is another shape, for a device that has no memory for the usual one.
        """
        if chunk is None:
            chunk = self.view_chunk if views else self.image_chunk
        features = []
        for start in range(0, len(pixels), chunk):
            part = pixels[start : start + chunk].to(self.device, self.dtype)
            rows = len(part)
            if rows < chunk:
                part = torch.cat([part, part.new_zeros(chunk - rows, *part.shape[1:])])
            part = part.contiguous(memory_format=torch.channels_last)
            features.append(F.normalize(self._visual(part)[:rows].float(), dim=-1))
        return torch.cat(features)

    def tokenize(self, texts: Sequence[str], *, cut: bool = False) -> Tensor:
        """(K, T) token ids on the CPU, padded to the context.

        Raises InvalidClasses (`class_text_too_long`, with the index) instead of cutting a text off, unless `cut`:
        then it is cut as open_clip's tokenizer does, which is right for captions and wrong for class names.
        """
        tokens: Tensor = self._tokenizer(list(texts), context_length=self.context_length + 1)
        long = (tokens[:, self.context_length] != self._pad_id).nonzero()
        if len(long) and cut:
            tokens = self._tokenizer(list(texts), context_length=self.context_length)
        elif len(long):
            index = int(long[0])
            raise InvalidClasses(
                f"text {index} does not fit the model's context of {self.context_length} tokens. "
                "Shorten the name or the template.",
                code="class_text_too_long",
                index=index,
            )
        cache = getattr(self._tokenizer, "cache", None)
        if isinstance(cache, dict) and len(cache) > 200_000:  # open_clip keeps every word it ever saw
            cache.clear()
            cache.update({t: t for t in ("<start_of_text>", "<end_of_text>")})
        return tokens[:, : self.context_length].contiguous()

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """(K, T) ids to (K, D) unit-norm features through open_clip's own text path."""
        if self._model is None:
            raise UnsupportedTower("this tower is held as plain tensors; encode texts with gram_core.text.")
        network: Any = self._model  # torch types a module's methods as Tensor | Module
        return F.normalize(network.encode_text(tokens.to(self.device)).float(), dim=-1)


def load(
    model: str = "gram-mini",
    *,
    device: str = "auto",
    precision: str = "auto",
    model_dir: Path | None = None,
    weights_sha256: str | None = None,
) -> Backbone:
    """Load frozen towers from disk; never opens a connection (see `fetch`).

    `device` is `auto`, `cpu`, `cuda` or `cuda:N`; `precision` is `auto` (bf16 towers on CUDA, float32 on a CPU,
    which is what was measured fastest there while agreeing), `fp32` or `bf16`.
    Raises ModelUnavailable or UnsupportedTower.
    """
    files = locate(model, model_dir)
    found = file_sha256(files.weights)
    if weights_sha256 and found != weights_sha256.lower():
        raise ModelUnavailable(
            f"the weights of {files.name!r} have SHA-256 {found[:12]}..., GRAM_WEIGHTS_SHA256 expects "
            f"{weights_sha256[:12].lower()}.... Fetch them again or correct the setting."
        )
    chosen = choose_device(device)
    if precision not in ("auto", "fp32", "bf16"):
        raise ModelUnavailable(f"no precision {precision!r}; choose auto, fp32 or bf16.")
    schema = f"local-dir:{files.folder}"
    try:
        network = _build(files)
        tokenizer = open_clip.get_tokenizer(schema)
    except (
        SafetensorError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AssertionError,
        OSError,
        ImportError,
    ) as error:
        log.debug("loading %s failed", files.name, exc_info=True)
        raise ModelUnavailable(
            f"model {files.name!r} could not be built from its {CONFIG} and weights ({type(error).__name__}). "
            "They must be a matching open_clip pair."
        ) from error
    bf16 = precision == "bf16" or (precision == "auto" and chosen.type == "cuda")
    return Backbone(network, tokenizer, name=files.name, weights_sha256=found, device=chosen, bf16=bf16)


class Reference:
    """A model's zero-shot classifier through open_clip alone, in float32 on the CPU: what ours is held to."""

    def __init__(self, model: str = "gram-mini", model_dir: Path | None = None) -> None:
        files = locate(model, model_dir)
        self._network = _build(files).eval().requires_grad_(False)
        self._tokenizer = open_clip.get_tokenizer(f"local-dir:{files.folder}")

    @torch.no_grad()
    def features(self, pixels: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit-norm features (M, D) of preprocessed pixels and (K, D) of texts."""
        network: Any = self._network  # torch types a module's methods as Tensor | Module
        images, words = network.encode_image(pixels), network.encode_text(self._tokenizer(list(texts)))
        return F.normalize(images, dim=-1), F.normalize(words, dim=-1)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a torch device; raises ModelUnavailable when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelUnavailable(f"no device {name!r}; choose auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelUnavailable(f"GRAM_DEVICE asks for CUDA, but {_without_cuda()}. Mend that, or use cpu or auto.")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ModelUnavailable(f"no device {name!r}; torch finds {count} CUDA devices, counted from 0.")
    if device.type not in ("cpu", "cuda"):
        raise ModelUnavailable(f"no device {name!r}; choose auto, cpu, cuda or cuda:N.")
    return device


def _without_cuda() -> str:
    """Why torch can't use a GPU, in its own words: no driver, one that is too old, no device."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        told = " ".join(str(error).split())[:TOLD]
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) says: {told.rstrip('.')}"
    return "torch finds no CUDA device"


def _build(files: ModelFiles) -> nn.Module:
    """The float32 network on the CPU, its weights read from the one safetensors file that was hashed."""
    config = json.loads((files.folder / CONFIG).read_text(encoding="utf-8"))
    with _quiet_root_logger():
        network: nn.Module = open_clip.create_model(
            f"local-dir:{files.folder}",
            load_weights=False,
            precision="fp32",
            device="cpu",
            pretrained_text=False,
        )
        open_clip.load_checkpoint(network, str(files.weights), strict=True, weights_only=True, device="cpu")
    if "preprocess_cfg" not in config:
        log.warning("%s names no preprocess_cfg; open_clip's defaults are used", CONFIG)
    return network


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """open_clip logs through the root logger, warning of random weights that are loaded a line later."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors inside nested tuples and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = tuple(vars(value).values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, tuple) else []


def _fast_visual(visual: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The image tower on its device and dtype, channels last, batch norm folded where that changes nothing."""
    fused = deepcopy(visual)
    _fuse_norms(fused)
    size = getattr(visual, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    probe = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = torch.allclose(F.normalize(fused(probe), dim=-1), F.normalize(visual(probe), dim=-1), rtol=0, atol=1e-5)
    tower = fused if same else visual
    placed: nn.Module = tower.to(memory_format=torch.channels_last).to(device, dtype)
    return placed


def _fuse_norms(module: nn.Module) -> None:
    """Fold every batch norm into the convolution registered just before it (checked by the caller)."""
    previous: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and previous is not None and isinstance(previous[1], nn.Conv2d):
            setattr(module, previous[0], fuse_conv_bn_eval(previous[1], child))
            # timm's norm carries its activation
            setattr(module, name, nn.Sequential(*(c for c in child.children())))
            previous = None
        else:
            _fuse_norms(child)
            previous = (name, child)


def _text_weights(tower: nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[TextWeights | None, str | None]:
    """The tower as plain tensors, or None and the sentence that says why open_clip's own path is used."""
    note = _why_not_exact(tower)
    if note is not None:
        return None, note

    def matrix(weight: Tensor | None) -> Tensor:
        assert weight is not None
        return weight.detach().to(device, dtype)

    def vector(weight: Tensor) -> Tensor:
        return weight.detach().to(device, torch.float32)

    def norm(layer: nn.Module) -> tuple[Tensor, Tensor, float]:
        assert isinstance(layer, nn.LayerNorm)
        return vector(layer.weight), vector(layer.bias), layer.eps

    layers = []
    blocks: Any = tower.transformer.resblocks  # type: ignore[union-attr]
    for block in blocks:
        layers.append(
            LayerWeights(
                norm1=norm(block.ln_1),
                qkv=(matrix(block.attn.in_proj_weight), matrix(block.attn.in_proj_bias)),
                out=(matrix(block.attn.out_proj.weight), matrix(block.attn.out_proj.bias)),
                scale1=matrix(block.ls_1.gamma) if isinstance(block.ls_1, LayerScale) else None,
                norm2=norm(block.ln_2),
                up=(matrix(block.mlp.c_fc.weight), matrix(block.mlp.c_fc.bias)),
                act=block.mlp.gelu,
                down=(matrix(block.mlp.c_proj.weight), matrix(block.mlp.c_proj.bias)),
                scale2=matrix(block.ls_2.gamma) if isinstance(block.ls_2, LayerScale) else None,
            )
        )
    projection: Any = tower.text_projection
    pool = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)
    eos = getattr(tower, "text_eos_id", None) if hasattr(tower, "text_pool_type") else getattr(tower, "eos_id", None)
    final: Any = tower.ln_final
    embedding: Any = tower.token_embedding
    positions: Any = tower.positional_embedding
    linear = isinstance(projection, nn.Linear)
    return TextWeights(
        tokens=vector(embedding.weight),
        positions=vector(positions),
        layers=tuple(layers),
        heads=int(blocks[0].attn.num_heads),
        final_norm=norm(final),
        projection=None if projection is None else matrix(projection.weight.T if linear else projection),
        projection_bias=matrix(projection.bias) if linear and projection.bias is not None else None,
        eos_id=int(eos) if pool == "eos" and eos is not None else None,
    ), None


def _why_not_exact(tower: nn.Module) -> str | None:
    if isinstance(tower, HFTextEncoder) or not hasattr(tower, "transformer"):
        return "the text tower is a Hugging Face encoder, which has no causal mask to cut at"
    if getattr(tower, "attn_mask", None) is None:
        return "the text tower has no causal mask: every token sees the padding"
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False):
        return "the text tower appends a class token behind the padding"
    pool = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)
    if pool not in ("argmax", "eos"):
        return f"the text tower is pooled by {pool!r}, not at its end-of-text token"
    blocks = list(getattr(tower.transformer, "resblocks", []))
    plain = all(
        type(b) is ResidualAttentionBlock and b.attn.in_proj_weight is not None and b.attn.in_proj_bias is not None
        for b in blocks
    )
    if not blocks or not plain:
        return "the text tower has blocks of its own kind"
    return None
