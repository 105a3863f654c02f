"""What the server relies on: plans, do no harm, isolation, and both methods end to end on a tiny real CLIP."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional as F

from gram_core import objectives
from gram_core.backbone import Backbone, load
from gram_core.classifier import INFOMAX, TPT, Classifier
from gram_core.errors import FingerprintMismatch, InvalidTuning, MethodUnavailable
from gram_core.images import DecodedImage
from gram_core.types import ImageResult, Tuning
from gram_core.views import Prepared
from prototypes.bank import Root, save_root
from tests.conftest import TINY, reference, write_model

NAMES = ["cat", "dog", "fire truck", "a red bus", "house", "tree"]
Make = Callable[..., DecodedImage]


def root_of(backbone: Backbone) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(9)
    pixels = torch.from_numpy(rng.standard_normal((6, 3, 32, 32), dtype=np.float32))
    return F.normalize(backbone.encode_images(pixels).mean(0), dim=0).numpy()


@pytest.fixture(scope="module")
def classifier(tiny: Backbone) -> Classifier:
    return Classifier(tiny, root_of(tiny))


@pytest.fixture(scope="module")
def bare(tiny: Backbone) -> Classifier:
    return Classifier(tiny)


def images(classifier: Classifier, make: Make, n: int, first: int = 0) -> list[Prepared]:
    return [classifier.prepare(make(first + i, colour=i)) for i in range(n)]


def run(classifier: Classifier, batch: list[Prepared], names: list[str] = NAMES, **tuning: Any) -> list[ImageResult]:
    classes = classifier.class_set(names)
    plan = classifier.plan(Tuning(**tuning), len(batch), classes)
    return list(classifier.classify(batch, classes, plan).results)


def same(a: ImageResult, b: ImageResult) -> bool:
    left, right = (dataclasses.replace(x.adaptation, ms=0.0) for x in (a, b))
    return bool((a.cosines == b.cosines).all() and (a.baseline_cosines == b.baseline_cosines).all()) and left == right


# ---- zero-shot ----


def test_none_is_open_clips_zero_shot(classifier: Classifier, make_image: Make, tiny_dir: Path) -> None:
    decoded = [make_image(i) for i in range(5)]
    ours = run(classifier, [classifier.prepare(d) for d in decoded], method="none")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_dir}")
    model.eval()
    weights = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer(f"local-dir:{tiny_dir}"), NAMES, ["a photo of a {}."]
    )
    with torch.no_grad():
        pixels = torch.stack([preprocess(d.rgb) for d in decoded])
        expected = model.encode_image(pixels, normalize=True) @ weights
    np.testing.assert_allclose(np.stack([r.cosines for r in ours]), expected.numpy(), rtol=0, atol=1e-5)
    assert ours[0].scale == pytest.approx(float(model.logit_scale.detach().exp()))


@pytest.mark.parametrize("tuning", [{}, {"method": "tpt", "views": 8}, {"scope": "batch", "host": "coop", "steps": 2}])
def test_the_baseline_of_any_answer_is_none_bit_for_bit(
    tuning: dict[str, Any], classifier: Classifier, make_image: Make
) -> None:
    batch = images(classifier, make_image, 9)
    plain = run(classifier, batch, method="none")
    for got, expected in zip(run(classifier, batch, **tuning), plain, strict=True):
        assert (got.baseline_cosines == expected.cosines).all()
        assert (expected.cosines == expected.baseline_cosines).all()


def test_zero_shot_of_an_image_does_not_depend_on_its_neighbours(classifier: Classifier, make_image: Make) -> None:
    batch = images(classifier, make_image, 11)
    together = run(classifier, batch, method="none")
    for i in (0, 3, 4, 10):
        assert (run(classifier, [batch[i]], method="none")[0].cosines == together[i].cosines).all()


# ---- plans ----


@pytest.mark.parametrize(
    ("tuning", "count", "expected"),
    [
        ({}, 8, ("infomax", "residual", "batch", 20, 8, None)),
        ({}, 7, ("infomax", "residual", "batch", 20, 8, "too_few_images")),
        ({"scope": "image"}, 1, ("tpt", "coop", "image", 1, 64, None)),
        ({"method": "tpt"}, 30, ("tpt", "coop", "image", 1, 64, None)),
        ({"scope": "batch"}, 2, ("infomax", "residual", "batch", 20, 8, None)),
        ({"scope": "batch"}, 1, ("infomax", "residual", "batch", 20, 8, "too_few_images")),
        ({"host": "coop", "steps": 3, "views": 2}, 8, ("infomax", "coop", "batch", 3, 2, None)),
        ({"method": "none"}, 8, ("none", None, "image", 0, 1, "none_requested")),
    ],
)
def test_a_plan_fills_in_the_defaults(
    tuning: dict[str, Any], count: int, expected: tuple[Any, ...], classifier: Classifier
) -> None:
    plan = classifier.plan(Tuning(**tuning), count, classifier.class_set(NAMES))
    assert (plan.method, plan.host, plan.scope, plan.steps, plan.views, plan.skip) == expected


def test_one_class_is_never_tuned(classifier: Classifier) -> None:
    assert classifier.plan(Tuning(), 8, classifier.class_set(["cat"])).skip == "single_class"


def test_a_model_without_a_root_serves_tpt_and_zero_shot_and_says_so(bare: Classifier) -> None:
    assert bare.info.methods == ("tpt", "none")
    assert bare.info.default_method == "tpt"
    assert bare.info.root is False
    classes = bare.class_set(NAMES)
    assert bare.plan(Tuning(), 8, classes).method == "tpt"
    with pytest.raises(MethodUnavailable, match="no root prototype"):
        bare.plan(Tuning(method="infomax"), 8, classes)
    with pytest.raises(MethodUnavailable, match="scope image only"):
        bare.plan(Tuning(scope="batch"), 8, classes)
    with pytest.raises(MethodUnavailable, match="no root prototype"):
        Classifier(bare.backbone, default_method="infomax")


@pytest.mark.parametrize(
    ("tuning", "error"),
    [
        ({"method": "gram"}, MethodUnavailable),
        ({"host": "maple"}, MethodUnavailable),
        ({"method": "infomax", "scope": "image"}, MethodUnavailable),
        ({"method": "tpt", "scope": "batch"}, MethodUnavailable),
        ({"scope": "all"}, InvalidTuning),
        ({"views": 0}, InvalidTuning),
        ({"steps": -1}, InvalidTuning),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(
    tuning: dict[str, Any], error: type[Exception], classifier: Classifier
) -> None:
    with pytest.raises(error):
        classifier.plan(Tuning(**tuning), 8, classifier.class_set(NAMES))


def test_cost_counts_image_passes_and_weighted_text_passes(classifier: Classifier) -> None:
    classes = classifier.class_set(["one", "two", "three"])
    unit = classifier.text_weight
    none = classifier.plan(Tuning(method="none"), 8, classes)
    assert classifier.cost(none, 8, classes) == pytest.approx(8 + 3 * unit)
    joint = classifier.plan(Tuning(), 8, classes)
    assert classifier.cost(joint, 8, classes) == pytest.approx(64 + 3 * unit)
    prompt = classifier.plan(Tuning(host="coop", steps=5), 8, classes)
    assert classifier.cost(prompt, 8, classes) == pytest.approx(64 + (3 * 11 + 3) * unit)
    alone = classifier.plan(Tuning(method="tpt", views=16), 8, classes)
    assert classifier.cost(alone, 8, classes) == pytest.approx(128 + (8 * 3 * 3 + 3) * unit)


# ---- isolation ----


@pytest.mark.parametrize("host", ["residual", "coop"])
def test_a_batch_answer_does_not_depend_on_the_order_of_images(
    host: str, classifier: Classifier, make_image: Make
) -> None:
    batch = images(classifier, make_image, 10)
    straight = run(classifier, batch, host=host, steps=4)
    turned = run(classifier, batch[::-1], host=host, steps=4)
    assert all(same(a, b) for a, b in zip(straight, turned[::-1], strict=True))


def test_a_per_image_answer_does_not_depend_on_the_other_images(classifier: Classifier, make_image: Make) -> None:
    batch = images(classifier, make_image, 5)
    together = run(classifier, batch, method="tpt", views=8)
    alone = [run(classifier, [b], method="tpt", views=8)[0] for b in batch]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))


def test_answers_repeat_bit_for_bit_after_other_requests(classifier: Classifier, make_image: Make) -> None:
    first = images(classifier, make_image, 8)
    other = images(classifier, make_image, 9, first=50)
    a = run(classifier, first)
    run(classifier, other, names=["x", "y", "z"], host="coop", steps=2)
    b = run(classifier, first)
    assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_the_seed_moves_the_views_and_nothing_else(classifier: Classifier, make_image: Make) -> None:
    batch = images(classifier, make_image, 8)
    zero, one = run(classifier, batch, seed=0), run(classifier, batch, seed=1)
    assert (zero[0].baseline_cosines == one[0].baseline_cosines).all()
    assert any((a.cosines != b.cosines).any() for a, b in zip(zero, one, strict=True))


def test_the_weights_are_the_same_after_every_method(classifier: Classifier, make_image: Make) -> None:
    weights = classifier.backbone.text
    assert weights is not None
    before = weights.tokens.clone(), weights.layers[0].qkv[0].clone()
    batch = images(classifier, make_image, 8)
    run(classifier, batch, host="coop", steps=2)
    run(classifier, batch, method="tpt", views=4)
    assert torch.equal(before[0], weights.tokens)
    assert torch.equal(before[1], weights.layers[0].qkv[0])


# ---- tuning ----


def test_zero_steps_answer_zero_shot(classifier: Classifier, make_image: Make) -> None:
    batch = images(classifier, make_image, 8)
    for r in run(classifier, batch, steps=0, host="residual"):
        assert r.adaptation.status == "completed"
        # the residual at zero returns the cached class features; only the matmul's shape differs
        np.testing.assert_allclose(r.cosines, r.baseline_cosines, rtol=0, atol=1e-6)
        assert r.adaptation.temperature == pytest.approx(1.0, abs=1e-4)
    for r in run(classifier, batch[:2], method="tpt", steps=0, views=4):
        np.testing.assert_allclose(r.cosines, r.baseline_cosines, rtol=0, atol=1e-5)


def test_a_residual_of_zero_is_the_class_feature_bit_for_bit(classifier: Classifier) -> None:
    host, classes = classifier.hosts["residual"], classifier.class_set(NAMES)
    params = host.start({}, classes, 2)
    features = host.features(params, classes)
    assert all(torch.equal(features[e], classifier.texts.features(classes)) for e in range(2))


@pytest.mark.parametrize("templates", [None, ["art of the {}."], ["a photo of a {}.", "a bad photo of the {}."]])
def test_an_untuned_context_is_the_baseline_for_any_template(
    templates: list[str] | None, classifier: Classifier
) -> None:
    host, classes = classifier.hosts["coop"], classifier.class_set(NAMES, templates)
    features = host.features(host.start(host.init(), classes, 1), classes)[0]
    torch.testing.assert_close(features, classifier.texts.features(classes), rtol=0, atol=1e-5)


def test_joint_tuning_lowers_its_loss_and_keeps_the_confidence(classifier: Classifier, make_image: Make) -> None:
    results = run(classifier, images(classifier, make_image, 16))
    reports = [r.adaptation for r in results]
    assert {r.status for r in reports} == {"completed"}
    assert np.mean([r.entropy_after for r in reports]) < np.mean([r.entropy_before for r in reports])
    taken = [r for r in results if r.adaptation.accepted]
    assert taken
    after, before = ([float(f(r).max()) for r in taken] for f in (ImageResult.scores, ImageResult.baseline_scores))
    assert np.mean(after) == pytest.approx(np.mean(before), abs=1e-3)


def test_images_that_zero_shot_is_sure_of_keep_their_answer(classifier: Classifier, make_image: Make) -> None:
    sharp = Classifier(rescaled(classifier.backbone, 400.0), root_of(classifier.backbone))
    results = run(sharp, images(sharp, make_image, 12))
    sure = [r for r in results if not r.adaptation.accepted]
    assert sure
    for r in sure:
        assert r.adaptation.reason == "not_accepted"
        assert (r.cosines == r.baseline_cosines).all()
        assert r.adaptation.temperature == 1.0


def rescaled(backbone: Backbone, scale: float) -> Backbone:
    other = copy.copy(backbone)
    other.logit_scale = scale
    return other


def test_tpt_keeps_a_tenth_of_the_views_and_lowers_their_entropy(classifier: Classifier, make_image: Make) -> None:
    report = run(classifier, images(classifier, make_image, 1), method="tpt")[0].adaptation
    assert (report.views, report.views_kept, report.steps) == (64, 6, 1)
    assert report.status == "completed"
    assert report.scope == "image"


# ---- do no harm ----


def test_a_step_that_explodes_falls_back_to_zero_shot(tiny: Backbone, make_image: Make) -> None:
    wild = Classifier(tiny, root_of(tiny), infomax=dataclasses.replace(INFOMAX, lr={"residual": float("nan")}))
    for r in run(wild, images(wild, make_image, 8)):
        assert (r.adaptation.status, r.adaptation.reason) == ("fallback", "not_finite")
        assert (r.cosines == r.baseline_cosines).all()
        assert np.isfinite(r.adaptation.entropy_after)


def test_a_tuning_that_raises_entropy_falls_back(tiny: Backbone, make_image: Make) -> None:
    backwards = Classifier(tiny, tpt=dataclasses.replace(TPT, lr={"coop": -0.01}, views=8))
    r = run(backwards, images(backwards, make_image, 1), method="tpt")[0]
    assert (r.adaptation.status, r.adaptation.reason) == ("fallback", "diverged")
    assert (r.cosines == r.baseline_cosines).all()


def test_a_tuning_that_leaves_zero_shot_too_far_falls_back(tiny: Backbone, make_image: Make) -> None:
    capped = Classifier(tiny, root_of(tiny), kl_cap=1e-9)
    for r in run(capped, images(capped, make_image, 8)):
        assert (r.adaptation.status, r.adaptation.reason) == ("fallback", "kl_cap")
        assert (r.cosines == r.baseline_cosines).all()
        assert r.adaptation.temperature == 1.0


# ---- loading ----


def test_a_root_beside_the_weights_is_used_and_one_of_other_weights_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "rooted", TINY, seed=3)
    backbone = load(str(folder), device="cpu")
    save_root(folder, Root(root_of(backbone), backbone.fingerprint, 6, "noise"))
    loaded = Classifier.load(str(folder), device="cpu")
    assert loaded.info.default_method == "infomax"
    loaded.warm_up()
    assert loaded.text_weight > 0
    save_root(folder, Root(root_of(backbone), "0" * 64, 6, "noise"))
    with pytest.raises(FingerprintMismatch, match="root prototype beside model"):
        Classifier.load(str(folder), device="cpu")


def test_a_tower_without_a_causal_mask_serves_the_residual_host_only(tmp_path: Path, make_image: Make) -> None:
    config = {**TINY, "custom_text": True, "text_cfg": {**TINY["text_cfg"], "no_causal_mask": True}}
    folder = write_model(tmp_path / "open", config)
    backbone = load(str(folder), device="cpu")
    other = Classifier(backbone, root_of(backbone))
    assert other.info.hosts == ("residual",)
    assert {r.adaptation.status for r in run(other, images(other, make_image, 8))} == {"completed"}
    with pytest.raises(MethodUnavailable, match="no causal mask"):
        other.plan(Tuning(host="coop"), 8, other.class_set(NAMES))


# ---- TPT against its definition ----


def test_per_image_tuning_is_tpt_on_200_random_episodes(tiny: Backbone, tiny_dir: Path) -> None:
    """Top-1 and gradient against TPT written from the paper through open_clip's `encode_text` with all 77 tokens.

    Identical views for both sides: random unit features around a class direction, 16 views, 10 classes.
    """
    from gram_core.adapt import UPDATES, adapt, of
    from tests.test_text import spliced

    bare = Classifier(tiny)
    host = bare.hosts["coop"]
    model = reference(tiny_dir)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_dir}")
    gen = torch.Generator().manual_seed(0)
    words = [
        "cat",
        "dog",
        "truck",
        "plane",
        "bird",
        "horse",
        "deer",
        "frog",
        "boat",
        "tree",
        "fire hydrant",
        "cup of tea",
    ]
    agree, worst = 0, 0.0
    for episode in range(200):
        names = [words[i] for i in torch.randperm(len(words), generator=gen)[:10].tolist()]
        classes = bare.class_set(names)
        base = bare.texts.features(classes)
        views = F.normalize(base[episode % 10] + 0.2 * torch.randn(16, 32, generator=gen), dim=-1)
        kept = objectives.confident(host.scale * views[None] @ base.T, 0.1)[0]

        def loss(
            p: dict[str, torch.Tensor],
            kept: torch.Tensor = kept,
            views: torch.Tensor = views,
            c: Any = classes,
        ) -> torch.Tensor:
            return objectives.marginal_entropy(host.logits(p, views[kept][None], c))

        start = host.start(host.init(), classes, 1)
        grad = of(loss)(start)["context"][0]
        tuned = adapt(of(loss), start, update=UPDATES["sign"], lr=5e-3, steps=1)
        ours = host.logits(tuned, views[None, :1], classes)[0, 0]

        # the reference: TPT, sections 3.2 and 3.3, with AdamW(lr=5e-3) as published
        tokens = tokenizer([f"a photo of a {n}." for n in names])
        context = model.token_embedding(tokens[:1, 1:5])[0].clone().requires_grad_(True)
        optimiser = torch.optim.AdamW([context], lr=5e-3)
        logits = model.logit_scale.exp() * views @ spliced(model, tokens, context).T
        p = logits.softmax(-1)
        entropies = -(p * p.log()).sum(-1)
        selected = logits[torch.argsort(entropies)[: int(16 * 0.1)]]
        mean = selected.log_softmax(-1).logsumexp(0) - np.log(len(selected))
        (-(mean * mean.exp()).sum()).backward()
        assert context.grad is not None
        worst = max(worst, float((grad - context.grad).norm() / context.grad.norm()))
        optimiser.step()
        with torch.no_grad():
            theirs = model.logit_scale.exp() * views[0] @ spliced(model, tokens, context).T
        agree += int(ours.argmax() == theirs.argmax())
    assert agree == 200
    assert worst < 1e-4
