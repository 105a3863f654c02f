"""(Re)build the root prototype of a model: the normalised mean image feature of image-text pairs.

    python recipes/gram-mini/root.py --data DIR --model DIR

reads the Flickr8k shards in DIR/flickr8k through open_clip's own loading and preprocessing, and writes
root.safetensors and root.json beside the weights.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from sources import read_source

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gram_core.backbone import fingerprint
from prototypes.bank import Root, save_root


@torch.inference_mode()
def build_root(folder: Path, data: Path, *, batch: int = 64) -> Root:
    """Average the unit image features of every photo of the shards; save and return the root."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", precision="fp32")
    model.eval()
    mark = fingerprint(model)
    model.visual.to(memory_format=torch.channels_last)
    source = read_source("flickr8k", data)
    total = torch.zeros(0)
    for at in range(0, len(source.files), batch):
        images = [Image.open(io.BytesIO(x)).convert("RGB") for x in source.files[at : at + batch]]
        x = torch.stack([preprocess(i) for i in images]).contiguous(memory_format=torch.channels_last)
        features = model.encode_image(x, normalize=True).double().sum(dim=0)
        total = features if at == 0 else total + features
    mean = (total / total.norm()).float().numpy()
    count = len(source.files)
    root = Root(
        visual=np.asarray(mean), fingerprint=mark, count=count, source=f"Flickr8k, all {count} photos (4 shards)"
    )
    save_root(folder, root)
    return root


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    root = build_root(args.model, args.data)
    sys.stdout.write(f"root of {root.count} photos for model {root.fingerprint[:16]}\n")


if __name__ == "__main__":
    main()
