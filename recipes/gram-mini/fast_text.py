"""The text tower's training forward on packed tokens: shared prefixes once, no padding, the last layer at EOT only.

The product's exact text path (`gram_core.text.encode`) on the live parameters, so that gradients reach them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gram_core.backbone import LayerWeights, TextWeights
from gram_core.text import encode, pack


def live_weights(model: nn.Module) -> TextWeights:
    """The model's own parameters in the shape that `encode` reads; nothing is copied or detached."""
    layers = [
        LayerWeights(
            norm1=(b.ln_1.weight, b.ln_1.bias, b.ln_1.eps),
            qkv=(b.attn.in_proj_weight, b.attn.in_proj_bias),
            out=(b.attn.out_proj.weight, b.attn.out_proj.bias),
            scale1=None,
            norm2=(b.ln_2.weight, b.ln_2.bias, b.ln_2.eps),
            up=(b.mlp.c_fc.weight, b.mlp.c_fc.bias),
            act=b.mlp.gelu,
            down=(b.mlp.c_proj.weight, b.mlp.c_proj.bias),
            scale2=None,
        )
        for b in model.transformer.resblocks
    ]
    return TextWeights(
        tokens=model.token_embedding.weight,
        positions=model.positional_embedding,
        layers=tuple(layers),
        heads=model.transformer.resblocks[0].attn.num_heads,
        final_norm=(model.ln_final.weight, model.ln_final.bias, model.ln_final.eps),
        projection=model.text_projection,
        projection_bias=None,
        eos_id=None,
    )


def encode_packed(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """(N, D) unit features of token rows that end with their EOT; bf16 matrix products."""
    with torch.autocast("cpu", torch.bfloat16):
        return encode(live_weights(model), pack(rows))[0]
