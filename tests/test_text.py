"""The exact text path against open_clip's own `encode_text`, and the class set."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, SIMPLE_IMAGENET_TEMPLATES
from torch.nn import functional as F

from gram_core.backbone import Backbone, load
from gram_core.errors import InvalidClasses, UnsupportedTower
from gram_core.text import START_TEMPLATE, ClassSet, TextEncoder, encode, pack
from tests.conftest import TINY, reference, write_model

NAMES = ["cat", "dog", "fire truck", "Egyptian Mau, a spotted breed", "x", "cathedral"]

LAYOUTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "quick_gelu": {"quick_gelu": True},
    "custom_text": {"custom_text": True},
    "projection_bias": {"custom_text": True, "text_cfg": {**TINY["text_cfg"], "proj_bias": True}},
    "layer_scale": {"text_cfg": {**TINY["text_cfg"], "ls_init_value": 0.3}},
    "eos_pool": {"text_cfg": {**TINY["text_cfg"], "pool_type": "eos", "eos_id": 49407}},
    "no_projection": {"text_cfg": {**TINY["text_cfg"], "width": 32, "heads": 2, "proj_type": "none"}},
}


def theirs(folder: Path, texts: list[str]) -> torch.Tensor:
    model = reference(folder)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    with torch.no_grad():
        return F.normalize(model.encode_text(tokens), dim=-1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_text_layout_gives_open_clips_features(layout: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / layout, {**TINY, **LAYOUTS[layout]})
    encoder = TextEncoder(load(str(folder), device="cpu"))
    assert encoder.backbone.text_path == "exact"
    ours = encoder.features(encoder.class_set(NAMES))
    # two float32 evaluations of three layers of width 64, in another order
    torch.testing.assert_close(ours, theirs(folder, [f"a photo of a {n}." for n in NAMES]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_the_fast_path_agrees_at_any_number_of_classes(count: int, tiny: Backbone, tiny_dir: Path) -> None:
    names = [*dict.fromkeys(n.replace("_", " ") for n in IMAGENET_CLASSNAMES), "spare one", "spare two"][:count]
    encoder = TextEncoder(tiny)
    ours = encoder.features(encoder.class_set(names))
    torch.testing.assert_close(ours, theirs(tiny_dir, [f"a photo of a {n}." for n in names]), rtol=0, atol=1e-5)


def test_a_template_ensemble_is_open_clips(tiny: Backbone, tiny_dir: Path) -> None:
    templates = ["itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}."]
    encoder = TextEncoder(tiny)
    ours = encoder.features(encoder.class_set(NAMES, templates))
    expected = open_clip.build_zero_shot_classifier(
        reference(tiny_dir), open_clip.get_tokenizer(f"local-dir:{tiny_dir}"), NAMES, templates
    ).T
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert len(SIMPLE_IMAGENET_TEMPLATES) == 7


def test_sentences_average_like_a_template_ensemble(tiny: Backbone) -> None:
    encoder = TextEncoder(tiny)
    templates = ["a photo of a {}.", "a drawing of a {}."]
    by_template = encoder.features(encoder.class_set(NAMES, templates))
    sentences = {n: [t.replace("{}", n) for t in templates] for n in NAMES}
    torch.testing.assert_close(encoder.features(encoder.class_set(sentences)), by_template, rtol=0, atol=1e-5)


def test_an_end_of_text_marker_inside_a_name_is_read_where_open_clip_reads_it(tiny: Backbone, tiny_dir: Path) -> None:
    names = ["cat <end_of_text> dog", "cat"]
    encoder = TextEncoder(tiny)
    ours = encoder.features(encoder.class_set(names))
    torch.testing.assert_close(ours, theirs(tiny_dir, [f"a photo of a {n}." for n in names]), rtol=0, atol=1e-5)


def spliced(model: Any, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """TPT's forward through open_clip's own `encode_text`: the embeddings at positions 1..N are replaced."""

    def replace(_: Any, __: Any, x: torch.Tensor) -> torch.Tensor:
        n = len(context)
        return torch.cat([x[:, :1], context.expand(len(x), -1, -1), x[:, n + 1 :]], dim=1)

    handle = model.token_embedding.register_forward_hook(replace)
    try:
        return F.normalize(model.encode_text(tokens), dim=-1)
    finally:
        handle.remove()


def test_features_and_gradients_under_a_context_match_open_clip_for_every_episode(
    tiny: Backbone, tiny_dir: Path
) -> None:
    encoder = TextEncoder(tiny)
    classes = encoder.class_set(NAMES)
    context = encoder.start_context() + 0.3 * torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(1))
    context.requires_grad_(True)
    weight = torch.randn(3, len(NAMES), 32, generator=torch.Generator().manual_seed(2))
    ours = encoder.encode_context(classes, context)
    (grad,) = torch.autograd.grad((ours * weight).sum(), context)
    model = reference(tiny_dir)
    tokens = open_clip.get_tokenizer(f"local-dir:{tiny_dir}")([START_TEMPLATE.replace("{}", n) for n in NAMES])
    for e in range(3):
        own = context[e].detach().requires_grad_(True)
        expected = spliced(model, tokens, own)
        torch.testing.assert_close(ours[e], expected, rtol=0, atol=1e-5)
        (expected_grad,) = torch.autograd.grad((expected * weight[e]).sum(), own)
        relative = (grad[e] - expected_grad).norm() / expected_grad.norm()
        assert relative < 1e-4


def test_the_gradient_in_chunks_is_the_gradient_in_one_piece(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"thing {i}" for i in range(40)]
    grads = []
    for chunk in (512, 16):
        monkeypatch.setattr("gram_core.text.CHUNK", chunk)
        encoder = TextEncoder(tiny)
        context = encoder.start_context()[None].requires_grad_(True)
        features = encoder.encode_context(encoder.class_set(names), context)
        (grad,) = torch.autograd.grad(features[..., 0].sum(), context)
        grads.append(grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_a_pack_holds_no_padding_and_shares_the_longest_prefix() -> None:
    made = pack([[1, 5, 6, 7, 9], [1, 5, 6, 9], [1, 5, 6, 8, 8, 9]])
    assert made.prefix.tolist() == [1, 5, 6]
    assert made.suffix.tolist() == [9, 7, 9, 8, 8, 9]
    assert made.at.tolist() == [3, 3, 4, 3, 4, 5]
    assert made.groups == ((0, 1, 1), (1, 1, 2), (3, 1, 3))
    assert made.order.tolist() == [1, 0, 2]


def test_packing_in_any_order_gives_each_text_its_own_feature(tiny: Backbone) -> None:
    encoder = TextEncoder(tiny)
    features = encoder.features(encoder.class_set(NAMES))
    for i in range(len(NAMES)):
        turned = NAMES[i:] + NAMES[:i]
        again = encoder.features(encoder.class_set(turned))
        torch.testing.assert_close(again, features.roll(-i, 0), rtol=0, atol=1e-6)


def test_a_context_that_the_shared_prefix_cannot_hold_is_refused(tiny: Backbone) -> None:
    assert tiny.text is not None
    with pytest.raises(ValueError, match="needs a shared prefix of 5"):
        encode(tiny.text, pack([[49406, 320, 49407], [49406, 321, 49407]]), torch.zeros(1, 4, 64))


def test_equal_content_has_an_equal_id_and_is_computed_once(tiny: Backbone) -> None:
    encoder = TextEncoder(tiny)
    first, second = (
        encoder.class_set(["cat", " dog "]),
        encoder.class_set(["cat", "dog"], ["a photo of a {}."]),
    )
    assert first.id == second.id
    assert first.id.startswith("cs_")
    assert len(first.id) == 35
    assert encoder.features(first) is encoder.features(second)
    assert encoder.class_set(["dog", "cat"]).id != first.id
    assert encoder.class_set(["cat", "dog"], ["art of a {}."]).id != first.id


def test_a_class_set_that_is_kept_is_tokenized_once(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TextEncoder(tiny)
    asked: list[int] = []
    tokenize = tiny.tokenize
    monkeypatch.setattr(tiny, "tokenize", lambda texts, **k: asked.append(len(texts)) or tokenize(texts, **k))
    first = encoder.class_set(["cat", "dog"])
    assert asked == [2]  # the default template is what a context starts from
    assert encoder.class_set(["cat", " dog"]) is first
    assert asked == [2]
    assert encoder.held_bytes >= first.tuned.numel() * first.tuned.element_size()
    encoder.class_set(["cat", "dog"], ["a drawing of a {}."])
    encoder.class_set({"cat": ["a cat."], "dog": ["a dog.", "a hound."]})
    assert asked == [2, 2, 2, 3, 2]


def test_the_feature_cache_stays_within_its_bytes(tiny: Backbone) -> None:
    encoder = TextEncoder(tiny, cache_bytes=10 * 32 * 4 * 3)
    sets = [encoder.class_set([f"thing {i} {j}" for j in range(10)]) for i in range(5)]
    kept = [encoder.features(s).clone() for s in sets]
    assert encoder.held_bytes <= encoder.cache_bytes
    assert [encoder.has(s) for s in sets] == [False, False, True, True, True]
    assert torch.equal(encoder.features(sets[0]), kept[0])


@pytest.mark.parametrize(
    ("classes", "templates", "code", "index"),
    [
        ([], None, "invalid_request", None),
        (["cat", "  "], None, "invalid_request", 1),
        (["cat", 3], None, "invalid_request", 1),
        (["cat", "a\x00b"], None, "invalid_request", 1),
        (["cat", "dog", "ca\u0301t", "c\u00e1t"], None, "duplicate_class", 3),
        (["cat"], ["no braces"], "bad_template", 0),
        (["cat"], ["{} and {}"], "bad_template", 0),
        (["cat"], ["{0}"], "bad_template", 0),
        (["cat"], ["{:>20000000}"], "bad_template", 0),
        ({"cat": ["a cat"]}, ["a {}"], "templates_not_allowed", None),
        ({"cat": []}, None, "invalid_request", 0),
        (["cat", "ab " * 80], None, "class_text_too_long", 1),
    ],
)
def test_classes_that_cannot_be_used_say_why(
    classes: Any, templates: Any, code: str, index: int | None, tiny: Backbone
) -> None:
    with pytest.raises(InvalidClasses) as caught:
        TextEncoder(tiny).class_set(classes, templates)
    assert caught.value.code == code
    assert caught.value.index == index


def test_a_name_that_fills_the_context_is_accepted_and_one_token_more_is_not(tiny: Backbone) -> None:
    encoder = TextEncoder(tiny)
    assert len(encoder.class_set(["x " * 69 + "x"])) == 1  # 77 = start, 4 of context, 70, full stop, end
    with pytest.raises(InvalidClasses, match="class 0 does not fit"):
        encoder.class_set(["x " * 70 + "x"])


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"no_causal_mask": True}, "no causal mask"),
        ({"pool_type": "last"}, "pooled by 'last'"),
        ({"embed_cls": True}, "class token"),
    ],
)
def test_a_tower_the_fast_path_cannot_cut_goes_through_open_clip(
    change: dict[str, Any], note: str, tmp_path: Path
) -> None:
    config = {**copy.deepcopy(TINY), "custom_text": True}
    config["text_cfg"].update(change)
    folder = write_model(tmp_path / "other", config)
    encoder = TextEncoder(load(str(folder), device="cpu"))
    assert encoder.backbone.text_path == "open_clip"
    assert note in str(encoder.backbone.text_note)
    ours = encoder.features(encoder.class_set(NAMES))
    torch.testing.assert_close(ours, theirs(folder, [f"a photo of a {n}." for n in NAMES]), rtol=0, atol=1e-6)
    with pytest.raises(UnsupportedTower, match="no context can be tuned"):
        encoder.start_context()


def test_class_sets_are_immutable_values(tiny: Backbone) -> None:
    made: ClassSet = TextEncoder(tiny).class_set(["cat", "dog"])
    with pytest.raises(AttributeError):
        made.names = ("x",)  # type: ignore[misc]
