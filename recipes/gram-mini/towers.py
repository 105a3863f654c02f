"""The two towers: open_clip's own CLIP class, with the image tower in a folded form while it is trained.

Folded means that each convolution carries its batch norm as a bias: the arithmetic of eval mode, cheaper and
with nothing that drifts. `export` writes the ordinary form back (batch norm weight 1, mean 0, variance 1 - eps).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from settings import Settings
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

CHANNELS_LAST = torch.channels_last
SIZE_LIMIT = 37_900_000


def clip_config(settings: Settings) -> dict[str, Any]:
    """The content of open_clip_config.json."""
    half = [0.5, 0.5, 0.5]
    return {
        "model_cfg": {
            "embed_dim": settings.embed_dim,
            "vision_cfg": {
                "timm_model_name": "mobilenetv2_100",
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "timm_proj_bias": True,
                "image_size": settings.image_size,
            },
            "text_cfg": {
                "context_length": settings.context,
                "vocab_size": 49408,
                "width": settings.width,
                "heads": settings.heads,
                "layers": settings.layers,
            },
        },
        "preprocess_cfg": {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "shortest"},
    }


def new_clip(settings: Settings) -> nn.Module:
    """A fresh CLIP of the recipe's shape."""
    return open_clip.CLIP(**clip_config(settings)["model_cfg"])


def _pairs(trunk: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, convolution name, batch norm name) in the order of the forward pass."""
    for parent in trunk.modules():
        conv = ""
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d):
                conv = name
            elif isinstance(child, BatchNormAct2d):
                yield parent, conv, name


def load_mobilenet(trunk: nn.Module, weights: Mapping[str, NDArray[Any]]) -> None:
    """Copy the dequantised convolutions into a fresh trunk, batch norms set to do nothing but add the bias."""
    names = sorted(n[:-2] for n in weights if n.endswith("_w"))[:-1]
    convs = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in trunk.modules() if isinstance(m, BatchNormAct2d)]
    if not len(names) == len(convs) == len(norms):
        raise ValueError(f"expected {len(convs)} convolutions, the weights hold {len(names)}.")
    with torch.no_grad():
        for name, conv, norm in zip(names, convs, norms, strict=True):
            conv.weight.copy_(torch.from_numpy(np.float32(weights[f"{name}_w"])))
            _identity_norm(norm, torch.from_numpy(np.float32(weights[f"{name}_b"])))


def _identity_norm(norm: nn.Module, bias: Tensor) -> None:
    assert isinstance(norm, BatchNormAct2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.weight.fill_(1.0)
    norm.bias.copy_(bias)
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0 - norm.eps)


def fold(trunk: nn.Module) -> None:
    """Turn every convolution + batch norm into one convolution with a bias, in place and exactly."""
    with torch.no_grad():
        for parent, conv_name, norm_name in list(_pairs(trunk)):
            conv, norm = getattr(parent, conv_name), getattr(parent, norm_name)
            gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            folded = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                groups=conv.groups,
                bias=True,
            )
            assert folded.bias is not None
            folded.weight.copy_(conv.weight * gain[:, None, None, None])
            folded.bias.copy_(norm.bias - norm.running_mean * gain)
            setattr(parent, conv_name, folded)
            setattr(parent, norm_name, _Relu6() if isinstance(norm.act, nn.ReLU6) else nn.Identity())
    trunk.to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]


def unfold(state: Mapping[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """The state of an ordinary CLIP from the state of one whose trunk is folded."""
    model = new_clip(settings)
    target = model.state_dict()
    names = {id(m): n for n, m in model.named_modules()}
    with torch.no_grad():
        for parent, conv_name, norm_name in _pairs(model.visual.trunk):
            prefix = names[id(parent)]
            _identity_norm(getattr(parent, norm_name), state[f"{prefix}.{conv_name}.bias"])
    target = model.state_dict()
    for name, value in state.items():
        if name in target and not name.endswith("num_batches_tracked"):
            target[name] = value.detach().clone()
    return target


class _ClampInPlace(torch.autograd.Function):
    """ReLU6 that keeps its output only and hands on a channels-last gradient (a mixed layout is 2x slower)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp_(0.0, 6.0)
        ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=CHANNELS_LAST)
        return torch.ops.aten.hardtanh_backward(grad, y, 0.0, 6.0)  # type: ignore[no-any-return]


class _Relu6(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _ClampInPlace.apply(x) if torch.is_grad_enabled() else x.clamp_(0.0, 6.0)  # type: ignore[no-any-return]


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Unit text features; columns after the last EOT of the batch are cut, which a causal tower cannot see."""
    length = int(tokens.argmax(dim=1).max()) + 1
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x[torch.arange(len(tokens)), tokens.argmax(dim=1)])
    return nn.functional.normalize(x.float() @ model.text_projection, dim=-1)


def pixels_to_input(pixels: NDArray[np.uint8] | Tensor) -> Tensor:
    """(B, S, S, 3) uint8 to (B, 3, S, S) float in [-1, 1], channels last."""
    x = torch.as_tensor(np.ascontiguousarray(pixels) if isinstance(pixels, np.ndarray) else pixels)
    return x.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def resize(x: Tensor, size: int) -> Tensor:
    """Bicubic to (B, 3, size, size), clipped to the input range."""
    if x.shape[-1] != size:
        x = nn.functional.interpolate(x, size=(size, size), mode="bicubic", antialias=True).clamp_(-1.0, 1.0)
    return x.contiguous(memory_format=CHANNELS_LAST)


def export(state: Mapping[str, Tensor], settings: Settings, out: Path) -> str:
    """Write open_clip_config.json and fp16 open_clip_model.safetensors; return the weights' sha256."""
    out.mkdir(parents=True, exist_ok=True)
    half = {
        name: (value.contiguous().half() if value.is_floating_point() else value).clone()
        for name, value in unfold(state, settings).items()
        if name != "attn_mask"
    }
    for name, value in half.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name} does not fit in fp16.")
    path = out / "open_clip_model.safetensors"
    save_file(half, path)
    path.chmod(0o644)
    (out / "open_clip_config.json").write_text(json.dumps(clip_config(settings), indent=2) + "\n", encoding="utf-8")
    data = path.read_bytes()
    if len(data) > SIZE_LIMIT:
        raise ValueError(f"{path.name} has {len(data)} bytes, the limit is {SIZE_LIMIT}.")
    return hashlib.sha256(data).hexdigest()
