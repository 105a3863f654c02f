"""Where models come from, what is refused, and that the towers are open_clip's."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch.nn import functional as F

from gram_core import backbone as towers
from gram_core.backbone import Backbone, choose_device, fetch, file_sha256, fingerprint, load, locate
from gram_core.errors import ModelUnavailable
from gram_core.text import TextEncoder
from tests.conftest import TINY, reference, write_model

MOBILE: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {
        "timm_model_name": "mobilenetv2_035",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 65,
    },
    "text_cfg": TINY["text_cfg"],
}


def pixels(n: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def mobile_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("mobile") / "mobile", MOBILE)


def test_image_features_are_open_clips_normalised(tiny: Backbone, tiny_dir: Path) -> None:
    x = pixels(7)
    with torch.no_grad():
        expected = F.normalize(reference(tiny_dir).encode_image(x), dim=-1)  # type: ignore[operator]
    torch.testing.assert_close(tiny.encode_images(x), expected, rtol=0, atol=1e-5)


def test_folding_batch_norm_keeps_the_features(mobile_dir: Path) -> None:
    mine = load(str(mobile_dir), device="cpu")
    x = pixels(5, 65)
    with torch.no_grad():
        expected = F.normalize(reference(mobile_dir).encode_image(x), dim=-1)  # type: ignore[operator]
    torch.testing.assert_close(mine.encode_images(x), expected, rtol=0, atol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in mine._visual.modules())


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("which", ["tiny_dir", "mobile_dir"])
def test_a_row_has_the_same_bits_beside_any_neighbours(which: str, views: bool, request: pytest.FixtureRequest) -> None:
    model = load(str(request.getfixturevalue(which)), device="cpu")
    x = pixels(19, model.image_size)
    x[7] = float("nan")
    together = model.encode_images(x, views=views)
    for i in (0, 3, 8, 18):
        assert torch.equal(model.encode_images(x[i : i + 1], views=views)[0], together[i])
    turned = model.encode_images(x.flip(0), views=views).flip(0)
    assert torch.equal(turned[:7], together[:7])


def test_nothing_requires_a_gradient(tiny: Backbone) -> None:
    assert not any(p.requires_grad for p in tiny._visual.parameters())
    assert tiny.text is not None
    assert not tiny.text.tokens.requires_grad
    assert not tiny.encode_images(pixels(1)).requires_grad


def test_bf16_towers_stay_close_and_answer_in_float32(tiny_dir: Path, tiny: Backbone) -> None:
    lower = load(str(tiny_dir), device="cpu", precision="bf16")
    assert lower.fingerprint == tiny.fingerprint
    x = pixels(4)
    features = lower.encode_images(x)
    assert features.dtype == torch.float32
    assert F.cosine_similarity(features, tiny.encode_images(x)).min() > 0.999  # bf16 keeps 8 bits
    encoders = TextEncoder(lower), TextEncoder(tiny)
    texts = [e.features(e.class_set(["cat", "fire truck"])) for e in encoders]
    assert texts[0].dtype == torch.float32
    assert F.cosine_similarity(*texts).min() > 0.999
    context = encoders[0].start_context()[None].requires_grad_(True)
    (grad,) = torch.autograd.grad(encoders[0].encode_context(encoders[0].class_set(["cat"]), context).sum(), context)
    assert grad.dtype == torch.float32


def test_the_fingerprint_follows_the_weights_not_the_file(tmp_path: Path, tiny_dir: Path, tiny: Backbone) -> None:
    assert fingerprint(reference(tiny_dir)) == tiny.fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(tiny_dir, copy)
    (copy / "open_clip_model.safetensors").rename(copy / "renamed.safetensors")
    assert load(str(copy), device="cpu").fingerprint == tiny.fingerprint
    other = write_model(tmp_path / "other", TINY, seed=1)
    assert load(str(other), device="cpu").fingerprint != tiny.fingerprint


def test_quick_gelu_is_kept(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "quick", {**TINY, "quick_gelu": True})
    mine = load(str(folder), device="cpu")
    with torch.no_grad():
        expected = F.normalize(reference(folder).encode_image(pixels(3)), dim=-1)  # type: ignore[operator]
    torch.testing.assert_close(mine.encode_images(pixels(3)), expected, rtol=0, atol=1e-5)


def test_a_pretrained_tag_trained_with_quick_gelu_asks_for_it() -> None:
    repo, config = towers._registry("ViT-B-16/openai")
    assert config["model_cfg"]["quick_gelu"] is True
    assert "/" in repo
    assert "quick_gelu" not in towers._registry("ViT-B-16/laion2b_s34b_b88k")[1]["model_cfg"]


@pytest.mark.slow
def test_a_random_vit_b_16_loads_by_path_and_agrees_with_open_clip(tmp_path: Path) -> None:
    """The real loading code on a real size: 150 M parameters, saved and read back as safetensors."""
    folder = write_model(tmp_path / "ViT-B-16", open_clip.get_model_config("ViT-B-16"))
    mine = load(str(folder), device="cpu")
    assert (mine.name, mine.image_size, mine.joint_dim, mine.context_length) == ("ViT-B-16", 224, 512, 77)
    encoder = TextEncoder(mine)
    model = reference(folder)
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    for count in (1, 10):
        names = [
            "tench",
            "great white shark",
            "tiger cat",
            "bald eagle",
            "box turtle",
            "x",
            "espresso",
            "pot pie",
            "cliff",
            "ear",
        ]
        tokens = tokenizer([f"a photo of a {n}." for n in names[:count]])
        with torch.no_grad():
            expected = F.normalize(model.encode_text(tokens), dim=-1)  # type: ignore[operator]
        ours = encoder.features(encoder.class_set(names[:count]))
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    x = pixels(1, 224)
    with torch.no_grad():
        expected = F.normalize(model.encode_image(x), dim=-1)  # type: ignore[operator]
    torch.testing.assert_close(mine.encode_images(x), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_thousand_classes_agree_on_vit_b_16(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "ViT-B-16", open_clip.get_model_config("ViT-B-16"))
    encoder = TextEncoder(load(str(folder), device="cpu"))
    names = [*dict.fromkeys(open_clip.IMAGENET_CLASSNAMES), "spare one", "spare two"][:1000]
    ours = encoder.features(encoder.class_set(names))
    model, tokenizer = reference(folder), open_clip.get_tokenizer("ViT-B-16")
    with torch.no_grad():
        for i in range(0, 1000, 50):
            tokens = tokenizer([f"a photo of a {n}." for n in names[i : i + 50]])
            expected = F.normalize(model.encode_text(tokens), dim=-1)  # type: ignore[operator]
            torch.testing.assert_close(ours[i : i + 50], expected, rtol=0, atol=1e-5)


# ---- refusals ----


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such-model", "not bundled"),
        ("ViT-B-16", "has no pretrained tag ''; its tags: openai"),
        ("ViT-B-16/nonsense", "has no pretrained tag 'nonsense'"),
        ("hf-hub:only-one-part", "hf-hub:ORG/REPO"),
        ("hf-hub:../evil", "hf-hub:ORG/REPO"),
        ("RN50-quickgelu/yfcc15m_missing", "has no pretrained tag"),
        ("ViT-B-16/openai", "has no open_clip_config.json"),
    ],
)
def test_a_model_that_is_not_there_is_named_with_what_to_do(model: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=message):
        locate(model, tmp_path)


def test_pickled_weights_are_never_read(tmp_path: Path, tiny_dir: Path) -> None:
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {marker}",)

    folder = tmp_path / "bomb"
    folder.mkdir()
    shutil.copy(tiny_dir / "open_clip_config.json", folder)
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelUnavailable, match="never read"):
        load(str(folder), device="cpu")
    (folder / "open_clip_model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelUnavailable, match="could not be built"):
        load(str(folder), device="cpu")
    assert not marker.exists()


def test_weights_of_another_shape_or_hash_are_refused(tmp_path: Path, tiny_dir: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_dir, folder)
    found = file_sha256(folder / "open_clip_model.safetensors")
    assert load(str(folder), device="cpu", weights_sha256=found.upper()).weights_sha256 == found
    with pytest.raises(ModelUnavailable, match="GRAM_WEIGHTS_SHA256"):
        load(str(folder), device="cpu", weights_sha256="0" * 64)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 16
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnavailable, match="matching open_clip pair"):
        load(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["tpu", "nonsense", "cuda:99x"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ModelUnavailable):
        choose_device(name)


@pytest.mark.parametrize(
    "said",
    ["Found no NVIDIA driver on your system.", "The NVIDIA driver on your system is too old (found version 11040)."],
)
def test_a_gpu_that_cannot_be_used_is_refused_in_one_line_that_says_why(
    monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    def init() -> None:
        raise RuntimeError(f"{said}\nPlease update" + " your driver" * 100)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    with pytest.raises(ModelUnavailable) as refused:
        choose_device("cuda")
    assert said in refused.value.message
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 400


# ---- fetching, from a hub made here ----


class Hub(BaseHTTPRequestHandler):
    """Just enough of a model hub for `hf_hub_download`: HEAD and GET of files."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        known = self.path.startswith("/org/tiny/resolve/main/")
        data = self.files.get(name) if known else None
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{len(data)}-{name}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def hub(tiny_dir: Path) -> Iterator[str]:
    Hub.files = {p.name: p.read_bytes() for p in tiny_dir.iterdir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def endpoint(hub: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_ENDPOINT", hub)
    return hub


@pytest.mark.usefixtures("endpoint")
def test_a_hub_model_is_fetched_once_and_then_loads_offline(tmp_path: Path, tiny: Backbone) -> None:
    fetch("hf-hub:org/tiny", tmp_path)
    assert load("hf-hub:org/tiny", model_dir=tmp_path, device="cpu").fingerprint == tiny.fingerprint
    Hub.files = {}
    fetch("hf-hub:org/tiny", tmp_path, offline=True)
    assert sorted(p.name for p in (tmp_path / "hf-hub--org--tiny").iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


@pytest.mark.usefixtures("endpoint")
def test_a_hub_model_that_cannot_be_had_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelUnavailable, match="GRAM_OFFLINE is true"):
        fetch("hf-hub:org/tiny", tmp_path, offline=True)
    with pytest.raises(ModelUnavailable, match="no public repository"):
        fetch("hf-hub:org/other", tmp_path)
    Hub.files = {"open_clip_config.json": b"{}"}
    with pytest.raises(ModelUnavailable, match="publishes no open_clip_model"):
        fetch("hf-hub:org/tiny", tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the hub client's five tries
    with pytest.raises(ModelUnavailable, match="could not be fetched"):
        fetch("hf-hub:org/tiny", tmp_path)
    with pytest.raises(ModelUnavailable, match="has no open_clip_config"):
        locate("hf-hub:org/tiny", tmp_path)


def test_bundled_and_local_models_are_never_fetched(tmp_path: Path, tiny_dir: Path) -> None:
    fetch(str(tiny_dir), tmp_path, offline=True)
    for name in towers.bundled_models():
        fetch(name, tmp_path, offline=True)
    assert list(tmp_path.iterdir()) == []
