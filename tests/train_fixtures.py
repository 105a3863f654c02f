"""A tiny model and a zip of coloured patterns that grow a tree, for the whole of training in seconds."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

THINGS = ("apple", "boat", "cat", "dog", "egg", "fish", "goat", "hat")
EACH = 10

RECIPE = """
pairs = ["things.zip"]
unseen = ["all"]
least = 1
phrases = 60
workers = 1

[tree]
quantile = 0.0
duplicate = 1.1
themes = 6

[views]
views = 3
styled_views = 2
domains = ["pencil"]
share = 0.4

[episodes]
held_out = 0.4
sizes = [4, 8]

[learner]
steps = 3
rank = 4
regulator_rate = 1e-3
survey = 64
settle = 100

[meta]
steps = 6
episodes = 4
validate_every = 3
validate_episodes = 4
keep_every = 2
"""


def write_things(folder: Path, each: int = EACH) -> Path:
    """`things.zip`: class folders of seeded images, each class in a colour and a stripe of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "things.zip", "w") as file:
        for k, thing in enumerate(THINGS):
            for i in range(each):
                rng = np.random.default_rng([k, i])
                y, x = np.mgrid[:40, :40]
                stripe = np.sin((x * (k % 3) + y * (k // 3)) * 0.4 + rng.uniform(0, 6))[..., None]
                colour = 255 * np.array([k & 1, k >> 1 & 1, k >> 2 & 1])
                array = (0.6 * colour + 60 * stripe + rng.normal(0, 20, (40, 40, 3)) + 50).clip(0, 255)
                content = io.BytesIO()
                Image.fromarray(array.astype(np.uint8)).save(content, "PNG")
                file.writestr(f"{thing}/{i:03d}.png", content.getvalue())
    return folder / "things.zip"


def write_recipe(path: Path, text: str = RECIPE) -> Path:
    path.write_text(text)
    return path
