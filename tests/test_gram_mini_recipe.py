"""The recipe of the bundled model: its pure parts, and that what is shipped is what it says it is."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RECIPE, ASSETS = ROOT / "recipes" / "gram-mini", ROOT / "gram_core" / "assets" / "gram-mini"
sys.path.insert(0, str(RECIPE))

import losses  # noqa: E402
import settings  # noqa: E402
import sources  # noqa: E402
import towers  # noqa: E402
import wordnet  # noqa: E402
from augment import augment  # noqa: E402


def test_the_recipe_file_reads_and_misspelt_keys_do_not(tmp_path: Path) -> None:
    assert settings.load_settings(RECIPE / "model.toml").image_size == 161
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[text]\nstep = 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no key 'step'"):
        settings.load_settings(wrong)
    wrong.write_text('[text]\nsteps = "many"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="must be int"):
        settings.load_settings(wrong)


def test_the_split_depends_on_keys_and_seed_not_on_their_order() -> None:
    keys = [f"{i:04d}" for i in range(200)]
    kept, held = sources.split_keys("flickr8k", keys, 0.2, 0)
    assert len(held) == 40
    assert sorted(kept + held) == list(range(200))
    _, backwards = sources.split_keys("flickr8k", keys[::-1], 0.2, 0)
    assert {keys[i] for i in held} == {keys[::-1][i] for i in backwards}
    # Two independent draws of 40 of 200 agree with probability 1 / C(200, 40), about 10^-42.
    assert held != sources.split_keys("flickr8k", keys, 0.2, 1)[1]
    assert held != sources.split_keys("noto-emoji", keys, 0.2, 0)[1]


def test_a_missing_ingredient_is_named(tmp_path: Path) -> None:
    for name in sources.SOURCES:
        with pytest.raises(FileNotFoundError, match="is missing"):
            sources.read_source(name, tmp_path)


@pytest.fixture
def tree() -> wordnet.Tree:
    children = {"root": ["animal", "car"], "animal": ["dog", "cat"], "dog": ["pug", "hound"]}
    return wordnet.Tree(("pug", "hound", "cat", "car"), children, root="root")


def test_cuts_of_the_tree_are_disjoint_and_keep_all_probability(tree: wordnet.Tree) -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(50):
        cut = tree.cut(rng, stop=0.5, largest=3)
        np.testing.assert_array_equal(tree.membership(cut).sum(axis=0), np.ones(4))
        seen.add(tuple(sorted(cut)))
    # Three cuts exist below the root; each has probability at least 1/4 a draw: missing one, under 10^-5.
    assert seen == {("animal", "car"), ("car", "cat", "dog"), ("car", "cat", "hound", "pug")}


def test_folding_and_unfolding_keep_what_the_image_tower_says() -> None:
    torch.manual_seed(0)
    cfg = settings.Settings(layers=1)
    model = towers.new_clip(cfg).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0.0, 0.1)
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, 65, 65).clamp(-1, 1)
    with torch.no_grad():
        plain = model.visual(x)
        towers.fold(model.visual.trunk)
        folded = model.visual(x)
        again = towers.new_clip(cfg).eval()
        again.load_state_dict(towers.unfold(model.state_dict(), cfg))
        # float32 through 52 layers, products in another order
        torch.testing.assert_close(folded, plain, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(again.visual(x), plain, rtol=1e-3, atol=1e-4)


def test_the_folded_tower_has_the_gradients_of_autograd() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    goal = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    ours = torch.autograd.grad((towers._Relu6()(4.0 * x) * goal).sum(), x)[0]
    theirs = torch.autograd.grad((torch.nn.functional.relu6(4.0 * x) * goal).sum(), x)[0]
    torch.testing.assert_close(ours, theirs)


def test_text_cut_after_the_last_eot_has_the_features_of_open_clip() -> None:
    torch.manual_seed(0)
    model = towers.new_clip(settings.Settings(layers=2)).eval()
    tokens = torch.zeros(2, 32, dtype=torch.long)
    tokens[0, :4] = torch.tensor([49406, 320, 1929, 49407])
    tokens[1, :6] = torch.tensor([49406, 320, 1125, 539, 320, 49407])
    with torch.no_grad():
        theirs = model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(towers.encode_text(model, tokens), theirs, rtol=0, atol=1e-5)


def test_a_target_outside_the_names_does_not_count() -> None:
    image = torch.nn.functional.normalize(torch.randn(2, 8), dim=1)
    text = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    target = torch.tensor([[0.2, 0.6, 0.2], [0.0, 0.0, 0.0]])
    both = losses.distil(image, text, target, torch.tensor(10.0), torch.ones(3))
    alone = losses.distil(image[:1], text, target[:1], torch.tensor(10.0), torch.ones(3))
    torch.testing.assert_close(both, alone)


def test_augmentation_keeps_shape_and_range_and_follows_its_generator() -> None:
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    out = augment(x, 65, np.random.default_rng(3))
    assert out.shape == (4, 3, 65, 65)
    assert out.abs().max() <= 1.0


def test_what_is_shipped_matches_its_checksums_and_fits() -> None:
    lines = (ASSETS / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines)
    files = {p.name for p in ASSETS.iterdir() if p.is_file() and p.name != "SHA256SUMS"}
    assert set(listed) == files
    for name, digest in listed.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest, name
    assert (ASSETS / "open_clip_model.safetensors").stat().st_size <= towers.SIZE_LIMIT


def test_the_held_out_list_is_the_seeded_one() -> None:
    content = json.loads((ASSETS / "held_out.json").read_text(encoding="utf-8"))
    assert set(content["held_out"]) == set(sources.SOURCES)
    for name, keys in content["held_out"].items():
        assert len(set(keys)) == len(keys) == content["counts"][name]["held_out"]
    assert len(content["held_out"]["flickr8k"]) == 1618


def test_the_shipped_configuration_is_the_recipes() -> None:
    config = json.loads((ASSETS / "open_clip_config.json").read_text(encoding="utf-8"))
    assert config == towers.clip_config(settings.load_settings(RECIPE / "model.toml"))
