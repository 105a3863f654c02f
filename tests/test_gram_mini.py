"""The bundled model as shipped: its files, its features, and that it recognises everyday photographs."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from torch.nn import functional as F

from gram_core.backbone import ASSETS, bundled_models
from gram_core.classifier import Classifier
from gram_core.images import decode
from gram_core.types import Tuning
from tests.conftest import reference

FOLDER = ASSETS / "gram-mini"
LARGEST = 38_000_000


@pytest.fixture(scope="module")
def mini() -> Classifier:
    return Classifier.load("gram-mini", device="cpu")


def photo(name: str) -> bytes:
    return (files("skimage") / "data" / name).read_bytes()


def test_it_ships_within_its_size_with_its_hashes() -> None:
    assert "gram-mini" in bundled_models()
    assert (FOLDER / "open_clip_model.safetensors").stat().st_size <= LARGEST
    for line in (FOLDER / "SHA256SUMS").read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name


def test_the_card_and_the_held_out_list_are_there() -> None:
    card = (FOLDER / "MODEL_CARD.md").read_text()
    for word in ("Flickr8k", "Tiny-ImageNet", "MobileNetV2", "licence", "interval"):
        assert word.lower() in card.lower(), word
    held = json.loads((FOLDER / "held_out.json").read_text())
    assert "seed" in json.dumps(held)


def test_it_serves_gram_by_default(mini: Classifier) -> None:
    assert mini.info.default_method == "gram"
    assert mini.info.methods == ("gram", "infomax", "tpt", "none")
    assert mini.info.checkpoint_sha256 == hashlib.sha256((FOLDER / "gram.safetensors").read_bytes()).hexdigest()
    assert mini.info.defaults["gram"] == mini.info.defaults["infomax"]  # what is compared differs in nothing else
    assert mini.info.text_path == "exact"
    assert set(mini.info.hosts) >= {"coop", "residual"}
    assert mini.info.image_size == 161


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_the_exact_text_path_is_open_clips(count: int, mini: Classifier) -> None:
    names = [*dict.fromkeys(IMAGENET_CLASSNAMES), "spare one", "spare two"][:count]
    ours = mini.texts.features(mini.class_set(names))
    model, tokenizer = reference(FOLDER), open_clip.get_tokenizer(f"local-dir:{FOLDER}")
    with torch.no_grad():
        tokens = tokenizer([f"a photo of a {n}." for n in names])
        expected = F.normalize(model.encode_text(tokens), dim=-1)  # type: ignore[operator]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_image_features_are_open_clips(mini: Classifier) -> None:
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")
    decoded = decode(photo("chelsea.png"))
    pixels = preprocess(decoded.rgb)[None]
    prepared = mini.prepare(decoded)
    assert torch.equal(prepared.original, pixels[0])
    with torch.no_grad():
        expected = F.normalize(reference(FOLDER).encode_image(pixels), dim=-1)  # type: ignore[operator]
    torch.testing.assert_close(mini.backbone.encode_images(pixels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("chelsea.png", "cat"),
        ("coffee.png", "cup of coffee"),
        ("rocket.jpg", "rocket"),
        ("motorcycle_left.png", "motorcycle"),
    ],
)
def test_it_recognises_an_everyday_photograph(file: str, name: str, mini: Classifier) -> None:
    names = ["cat", "dog", "cup of coffee", "rocket", "motorcycle", "tree", "airplane", "pizza"]
    classes = mini.class_set(names)
    plan = mini.plan(Tuning(method="none"), 1, classes)
    result = mini.classify([mini.prepare(decode(photo(file)))], classes, plan).results[0]
    assert names[int(result.scores().argmax())] == name


def test_the_towers_load_through_open_clip_alone(tmp_path: Path) -> None:
    """No code of ours is needed to use the weights."""
    for file in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / file).write_bytes((FOLDER / file).read_bytes())
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=True).eval()
    image = open_clip.image_transform(161, is_train=False)(decode(photo("coffee.png")).rgb)
    with torch.no_grad():
        assert model.encode_image(image[None]).shape == (1, 512)
