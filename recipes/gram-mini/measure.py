"""Measure a model directory zero-shot through open_clip's ordinary API and preprocessing.

    python recipes/gram-mini/measure.py --data DIR --model DIR [--limit N] [--sets cifar10 ...]

prints, for "a photo of a {}.", top-1 with its 95 % Wilson interval and the expected calibration error
(15 bins), then the towers' images and texts per second.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from choosing import TEMPLATE, class_name, list_zip
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

SETS = {
    "cifar10": ("cifar10.zip", "test/", "choosing"),
    "imagenette": ("imagenette.zip", "", "choosing"),
    "tiny-imagenet-val": ("tiny-imagenet-32.zip", "val/", "choosing"),
    "pacs-photo": ("pacs.zip", "photo/", "reporting"),
    "pacs-sketch": ("pacs.zip", "sketch/", "reporting"),
}


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share."""
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


def calibration_error(probs: NDArray[np.float32], labels: NDArray[np.int64], bins: int = 15) -> float:
    """Expected calibration error over equal-width bins of the top probability."""
    top, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    which = np.minimum((top * bins).astype(int), bins - 1)
    gaps = [abs(right[which == b].mean() - top[which == b].mean()) * (which == b).mean() for b in set(which.tolist())]
    return float(sum(gaps))


@torch.inference_mode()
def encode_zip(model: nn.Module, preprocess: Any, path: Path, files: list[str], batch: int = 64) -> Tensor:
    """Unit features of these files."""
    parts = []
    with zipfile.ZipFile(path) as archive:
        for at in range(0, len(files), batch):
            images = [Image.open(io.BytesIO(archive.read(f))).convert("RGB") for f in files[at : at + batch]]
            x = torch.stack([preprocess(i) for i in images]).contiguous(memory_format=torch.channels_last)
            parts.append(model.encode_image(x, normalize=True))
    return torch.cat(parts)


@torch.inference_mode()
def per_second(model: nn.Module, tokenizer: Any, size: int) -> str:
    """Images and texts per second, best of three, eager fp32."""
    x = torch.randn(64, 3, size, size).contiguous(memory_format=torch.channels_last)
    texts = tokenizer(["a photo of a dog."] * 64)
    out = []
    for name, call in (("images", lambda: model.encode_image(x)), ("texts", lambda: model.encode_text(texts))):
        call()
        spans = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            spans.append(time.perf_counter() - start)
        out.append(f"{64 / min(spans):.0f} {name}/s")
    return ", ".join(out) + f" (fp32, batch 64, {torch.get_num_threads()} threads)"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=0, help="measure a seeded subset of at most this many images")
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=list(SETS))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{args.model}", precision="fp32")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{args.model}")
    model.eval()
    model.visual.to(memory_format=torch.channels_last)
    scale = model.logit_scale.exp().item()
    for name in args.sets:
        file, prefix, role = SETS[name]
        files, folders = list_zip(args.data / file, prefix)
        classes = sorted(set(folders))
        if args.limit and len(files) > args.limit:
            keep = sorted(np.random.default_rng(0).permutation(len(files))[: args.limit].tolist())
            files, folders = [files[i] for i in keep], [folders[i] for i in keep]
        labels = np.array([classes.index(f) for f in folders])
        with torch.inference_mode():
            texts = model.encode_text(
                tokenizer([TEMPLATE.replace("{}", class_name(c)) for c in classes]), normalize=True
            )
            logits = scale * encode_zip(model, preprocess, args.data / file, files) @ texts.T
        probs = logits.softmax(dim=1).numpy()
        right = int((probs.argmax(axis=1) == labels).sum())
        low, high = wilson(right, len(labels))
        error = calibration_error(probs, labels)
        sys.stdout.write(f"{name:18} {role:9} n={len(labels):5} top-1 {100 * right / len(labels):5.1f} "
                         f"[{100 * low:.1f}, {100 * high:.1f}]  ECE {100 * error:.1f}\n")  # fmt: skip
        sys.stdout.flush()
    sys.stdout.write(per_second(model, tokenizer, model.visual.image_size[0]) + "\n")


if __name__ == "__main__":
    main()
