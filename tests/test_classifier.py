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

from gram_core import gram, objectives
from gram_core.backbone import Backbone, file_sha256, load
from gram_core.checkpoint import Checkpoint, save_checkpoint
from gram_core.classifier import INFOMAX, TPT, Classifier, Learned, Seen, TuneConfig, load_learned
from gram_core.errors import FingerprintMismatch, InvalidCheckpoint, InvalidTuning, MethodUnavailable
from gram_core.images import DecodedImage
from gram_core.types import Explanation, ImageResult, Params, Tuning
from gram_core.views import Prepared
from prototypes.bank import PrototypeBank, Root, save_bank, save_root
from prototypes.hierarchy import CONCEPT, MODE, ROOT, THEME
from prototypes.vectors import unit
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
    alone = [run(classifier, [b], method="tpt", views=8)[0] for b in batch]
    assert all(same(a, b) for a, b in zip(run(classifier, batch, method="tpt", views=8), alone, strict=True))
    sharing = copy.copy(classifier)
    sharing.tuner = dataclasses.replace(classifier.tuner, together=64)
    shared = run(sharing, batch, method="tpt", views=8)  # in one pass of the text tower
    for a, b in zip(shared, alone, strict=True):
        assert (a.baseline_cosines == b.baseline_cosines).all()
        # 1e-6 by rounding; a coordinate of the sign update whose gradient is about 0 may turn, which is one step of it
        assert np.abs(a.scores() - b.scores()).max() < 1e-3


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


# ---- gram ----

SETTINGS: dict[str, Any] = {"host": "residual", "steps": 4, "views": 4, "lr": 1e-3, "update": "rms", "root": True,
                            "view_scale": [0.85, 1.0]}  # fmt: skip
OWN = TuneConfig(steps=4, views=4, lr={"residual": 1e-3, "coop": 1e-3}, update="rms", view_scale=(0.85, 1.0))
CONCEPTS = ("pet", "water", "pet", "street", "sky", "food", "tool")  # two concepts of one name


def bank_of(backbone: Backbone, seed: int = 9) -> PrototypeBank:
    """One theme of seven concepts of two modes, each the feature of an image of noise."""
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(rng.standard_normal((14, 3, 32, 32), dtype=np.float32))
    modes = unit(backbone.encode_images(pixels).numpy())
    concepts = unit(modes.reshape(7, 2, -1).mean(1))
    top = unit(modes.mean(0, keepdims=True))
    visual = np.concatenate([top, top, concepts, modes])
    m = len(visual)
    return PrototypeBank(
        visual=visual,
        text=unit(rng.standard_normal(visual.shape)),
        concentration=np.ones(m, np.float32),
        kappa=np.zeros(m, np.float32),
        parent=np.array([-1, 0, *[1] * 7, *np.repeat(np.arange(2, 9), 2)], np.int64),
        level=np.repeat([ROOT, THEME, CONCEPT, MODE], [1, 1, 7, 14]).astype(np.int64),
        node=np.arange(m, dtype=np.int64),
        count=np.ones(m, np.int64),
        visual_mean=0.5 * top[0],
        text_mean=np.zeros(visual.shape[1], np.float32),
        names=("all", "things", *CONCEPTS, *np.repeat(CONCEPTS, 2).tolist()),
        medoids=("",) * m,
        fingerprint=backbone.fingerprint,
    )


def weights_of(seed: int = 0, least: float = -2.0, margin: float = 0.0) -> Params:
    """Amounts that differ from request to request, and trust in all of them unless `least` says otherwise."""
    gen = torch.Generator().manual_seed(seed)
    made = gram.init(gen)
    for name in ("amounts.out", "amounts.out_bias"):
        made[name] = made[name] + 0.3 * torch.randn(made[name].shape, generator=gen)
    made["accept.margin"] = torch.full((1, 1), margin)
    made["trust.least"] = torch.full((1, 1), least)
    return made


def learned_of(backbone: Backbone, params: Params | None = None, **settings: Any) -> Learned:
    """What a training leaves, without the training."""
    checkpoint = Checkpoint(
        params=weights_of() if params is None else params,
        regulator="identity",
        settings=SETTINGS | settings,
        fingerprint=backbone.fingerprint,
        bank_sha256="",
        facts={},
    )
    return Learned(checkpoint, bank_of(backbone))


def gram_of(backbone: Backbone, params: Params | None = None, **options: Any) -> Classifier:
    return Classifier(backbone, root_of(backbone), learned=learned_of(backbone, params), infomax=OWN, **options)


@pytest.fixture(scope="module")
def taught(tiny: Backbone) -> Classifier:
    return gram_of(tiny)


def reasons(classifier: Classifier, batch: list[Prepared], **tuning: Any) -> list[tuple[ImageResult, Explanation]]:
    classes = classifier.class_set(NAMES)
    plan = classifier.plan(Tuning(**tuning), len(batch), classes)
    results = classifier.classify(batch, classes, plan, explain=True).results
    return [(r, r.explanation) for r in results if r.explanation is not None]


def test_a_learned_model_serves_gram_by_default_as_it_was_trained(taught: Classifier, make_image: Make) -> None:
    assert taught.info.methods == ("gram", "infomax", "tpt", "none")
    assert taught.info.default_method == "gram"
    assert taught.info.checkpoint_note is None
    assert taught.info.defaults["gram"] == {"host": "residual", "scope": "batch", "steps": 4, "views": 4, "lr": 1e-3}
    classes = taught.class_set(NAMES)
    for tuning, count, expected in (
        (Tuning(), 8, ("gram", "batch", None)),
        (Tuning(), 7, ("gram", "batch", "too_few_images")),
        (Tuning(scope="batch"), 2, ("gram", "batch", None)),
        (Tuning(scope="image"), 1, ("gram", "image", None)),
    ):
        plan = taught.plan(tuning, count, classes)
        assert (plan.method, plan.scope, plan.skip) == expected
    with pytest.raises(MethodUnavailable, match="learned for host residual"):
        taught.plan(Tuning(method="gram", host="coop"), 8, classes)
    results = run(taught, images(taught, make_image, 12))
    assert {(r.adaptation.method, r.adaptation.status) for r in results} == {("gram", "completed")}
    assert any((r.cosines != r.baseline_cosines).any() for r in results)


def test_far_from_every_prototype_gram_is_infomax_bit_for_bit(tiny: Backbone, make_image: Make) -> None:
    batch = images(gram_of(tiny), make_image, 11)
    nearest = [1 - e.shift for _, e in reasons(gram_of(tiny), batch) if e.shift is not None]
    far = gram_of(tiny, weights_of(least=float(np.mean(nearest)) + 3 * gram.DELTA + 1e-3))
    near = gram_of(tiny, weights_of(least=float(np.mean(nearest)) + 3 * gram.DELTA - 1e-3))
    for count in (2, 8, 11):
        got = run(far, batch[:count], scope="batch", method="gram")
        for ours, plain in zip(got, run(far, batch[:count], scope="batch", method="infomax"), strict=True):
            renamed = dataclasses.replace(ours.adaptation, method="infomax")
            assert same(dataclasses.replace(ours, adaptation=renamed), plain)
        assert count == 2 or any(r.adaptation.accepted for r in got)
    assert {e.trust for _, e in reasons(far, batch)} == {0.0}
    assert {e.structure_share for _, e in reasons(far, batch)} == {None}
    ours, plain = run(near, batch), run(near, batch, method="infomax")
    assert any((a.cosines != b.cosines).any() for a, b in zip(ours, plain, strict=True))


def test_little_trust_is_almost_infomax(tiny: Backbone, make_image: Make) -> None:
    batch = images(gram_of(tiny), make_image, 11)
    nu = np.mean([1 - e.shift for _, e in reasons(gram_of(tiny), batch) if e.shift is not None])
    told = {least: reasons(gram_of(tiny, weights_of(least=float(nu + least))), batch) for least in (-1.0, 0.0, 0.058)}
    trusts = [explained[0][1].trust for explained in told.values()]
    assert trusts == pytest.approx([1.0, 0.5, 0.052], abs=5e-3)
    moved = [r.adaptation.accepted for r in run(gram_of(tiny), batch, method="infomax")]  # the others' step is gram's
    shares = [
        np.mean([e.structure_share for (_, e), own in zip(explained, moved, strict=True) if own and e.structure_share])
        for explained in told.values()
    ]
    assert 1 > shares[0] > shares[1] > shares[2]
    assert shares[2] < 0.1


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_a_gram_answer_repeats_and_sees_no_order_of_images(scope: str, taught: Classifier, make_image: Make) -> None:
    batch = images(taught, make_image, 10)
    straight = run(taught, batch, scope=scope)
    run(taught, images(taught, make_image, 9, first=40), names=["x", "y", "z"])
    for other in (run(taught, batch, scope=scope), run(taught, batch[::-1], scope=scope)[::-1]):
        assert all(same(a, b) for a, b in zip(straight, other, strict=True))


def test_a_gram_answer_for_one_image_does_not_depend_on_the_others(taught: Classifier, make_image: Make) -> None:
    batch = images(taught, make_image, 5)
    together = run(taught, batch, scope="image")
    alone = [run(taught, [each], scope="image")[0] for each in batch]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    assert any((r.cosines != r.baseline_cosines).any() for r in together)


def test_identical_images_are_answered_alike(taught: Classifier, make_image: Make) -> None:
    results = run(taught, images(taught, make_image, 1) * 9)
    for r in results:
        assert np.isfinite(r.cosines).all()
        np.testing.assert_allclose(r.cosines, results[0].cosines, rtol=0, atol=1e-5)


def test_classes_in_another_order_get_the_same_scores(taught: Classifier, make_image: Make) -> None:
    batch = images(taught, make_image, 10)
    order = [3, 0, 5, 1, 4, 2]
    straight, turned = run(taught, batch), run(taught, batch, names=[NAMES[i] for i in order])
    for a, b in zip(straight, turned, strict=True):
        np.testing.assert_allclose(b.cosines, a.cosines[order], rtol=0, atol=1e-4)
        assert a.adaptation.accepted == b.adaptation.accepted


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_gram_without_steps_keeps_zero_shots_labels(scope: str, taught: Classifier, make_image: Make) -> None:
    for r in run(taught, images(taught, make_image, 9), scope=scope, steps=0):
        assert r.cosines.argmax() == r.baseline_cosines.argmax()
        np.testing.assert_allclose(r.cosines, r.baseline_cosines, rtol=0, atol=1e-6)


def test_a_regulated_step_that_is_not_finite_or_goes_too_far_falls_back(tiny: Backbone, make_image: Make) -> None:
    broken = gram_of(tiny)  # no checkpoint can hold such a weight
    broken.weights["context.spread"] = torch.full_like(broken.weights["context.spread"], torch.nan)
    for r in run(broken, images(broken, make_image, 8)):
        assert (r.adaptation.status, r.adaptation.reason) == ("fallback", "not_finite")
        assert (r.cosines == r.baseline_cosines).all()
    bold = weights_of()
    bold["amounts.out_bias"] += 4.0
    plain = gram_of(tiny, bold)
    batch = images(plain, make_image, 8)
    means = [np.mean([r.adaptation.kl for r in run(plain, batch, method=m)]) for m in ("infomax", "gram")]
    assert means[0] < means[1]
    capped = gram_of(tiny, bold, kl_cap=float(np.mean(means)))
    for r in run(capped, batch, method="gram"):
        assert (r.adaptation.status, r.adaptation.reason) == ("fallback", "kl_cap")
        assert (r.cosines == r.baseline_cosines).all()
    assert {r.adaptation.status for r in run(capped, batch, method="infomax")} == {"completed"}


def planted(classifier: Classifier, label: int, n: int = 16, seed: int = 0) -> Seen:
    """Features of `n` images of one class, so noisy that zero-shot is not sure."""
    gen = torch.Generator().manual_seed(seed)
    texts = classifier.texts.features(classifier.class_set(NAMES))
    noise = F.normalize(torch.randn(n, 1, texts.shape[1], generator=gen), dim=-1)
    views = texts[label] + 0.6 * noise + 0.02 * torch.randn(n, 4, texts.shape[1], generator=gen)
    return Seen(F.normalize(views, dim=-1), tuple(bytes([i]) * 32 for i in range(n)))


def test_a_batch_of_one_class_is_answered_no_worse_than_zero_shot_by_gram(tiny: Backbone) -> None:
    params = gram.init(torch.Generator().manual_seed(0))  # as trained: along the relations, and towards few classes
    names = list(gram.AMOUNTS)
    for name, value in (("neighbours", 0.0), ("request", 0.0), ("prior", 0.5)):
        params["amounts.out_bias"][0, names.index(name)] = value
    classifier = gram_of(tiny, params | {"accept.margin": torch.full((1, 1), 0.4)})
    classes = classifier.class_set(NAMES)
    plan = classifier.plan(Tuning(method="gram", scope="batch"), 16, classes)
    gains = []
    for label in range(len(NAMES)):
        results = classifier.answer(planted(classifier, label, seed=label), classes, plan)
        right = [np.mean([int(x.argmax()) == label for x in own]) for own in
                 ([r.baseline_cosines for r in results], [r.cosines for r in results])]  # fmt: skip
        assert right[1] >= right[0], label
        gains.append(right[1] - right[0])
    assert max(gains) > 0.1


def test_a_variant_is_the_same_model_with_other_weights(tiny: Backbone, make_image: Make) -> None:
    capped = gram_of(tiny, kl_cap=3.0)
    batch = images(capped, make_image, 9)
    other = capped.variant(learned_of(tiny, weights_of(seed=4)))
    assert (other.kl_cap, other.configs) == (3.0, capped.configs)
    plain = [run(each, batch, method="infomax") for each in (capped, other)]
    assert all(same(a, b) for a, b in zip(*plain, strict=True))
    assert not all(same(a, b) for a, b in zip(run(capped, batch), run(other, batch), strict=True))
    again = other.variant(learned_of(tiny), gram.Structure.of(bank_of(tiny)))
    assert all(same(a, b) for a, b in zip(run(capped, batch), run(again, batch), strict=True))


# ---- explanations ----


@pytest.mark.parametrize(
    ("tuning", "present"),
    [
        ({"method": "gram"}, {"trust", "skew", "rho", "structure_share", "prompt_shift"}),
        ({"method": "gram", "scope": "image"}, {"trust", "skew", "rho", "structure_share", "prompt_shift"}),
        ({"method": "infomax"}, {"rho", "prompt_shift"}),
        ({"method": "tpt", "views": 12}, {"prompt_shift"}),
        ({"method": "none"}, set()),
    ],
)
def test_an_explanation_holds_what_its_method_has(
    tuning: dict[str, Any], present: set[str], taught: Classifier, bare: Classifier, make_image: Make
) -> None:
    batch = images(taught, make_image, 9)
    told = reasons(taught, batch, **tuning)
    assert len(told) == 9
    for (result, e), quiet in zip(told, run(taught, batch, **tuning), strict=True):
        assert same(result, quiet)  # asking why changes nothing
        numbers = ("trust", "skew", "rho", "structure_share", "prompt_shift")
        assert {name for name in numbers if getattr(e, name) is not None} == present
        assert e.shift is not None
        assert 0 <= e.shift <= 2
        for name in present & {"trust", "skew", "structure_share"}:
            assert 0 <= getattr(e, name) <= 1
        assert all(getattr(e, name) > 0 for name in present & {"rho", "prompt_shift"})
        assert len(e.views) == result.adaptation.views
        assert [v.box is None for v in e.views] == [True] + [False] * (len(e.views) - 1)
        kept = sum(v.kept for v in e.views)
        assert kept == (0 if tuning["method"] == "none" else result.adaptation.views_kept)
        assert all(0 <= v.entropy <= np.log(len(NAMES)) + 1e-5 for v in e.views)
        assert e.views[0].entropy == pytest.approx(result.adaptation.entropy_before, abs=1e-4)
    if tuning["method"] in ("tpt", "none"):
        for _, e in reasons(bare, batch, **tuning):
            assert (e.prototypes, e.shift) == ((), None)


def test_the_concepts_told_are_the_heaviest_with_all_their_prototypes(taught: Classifier, make_image: Make) -> None:
    batch = images(taught, make_image, 9)
    originals = taught.see(batch, 1, 0, (0.85, 1.0)).originals
    weights = gram.relate(taught.structure, originals).weights[CONCEPT].double().numpy()
    for (_, e), own in zip(reasons(taught, batch), weights, strict=True):
        whole = {name: sum(w for w, n in zip(own, CONCEPTS, strict=True) if n == name) for name in set(CONCEPTS)}
        expected = sorted(whole.items(), key=lambda item: -item[1])[:5]
        assert [p.name for p in e.prototypes] == [name for name, _ in expected]
        assert [p.weight for p in e.prototypes] == pytest.approx([w for _, w in expected], abs=1e-5)
        assert sum(p.weight for p in e.prototypes) <= 1 + 1e-5


# ---- loading ----


def write_learned(folder: Path, backbone: Backbone, **changes: Any) -> Learned:
    """Bank and checkpoint in `folder`, as training writes them."""
    made = learned_of(backbone)
    save_bank(folder, made.bank)
    whole = {"bank_sha256": file_sha256(folder / "bank.safetensors"), **changes}
    return Learned(save_checkpoint(folder, dataclasses.replace(made.checkpoint, **whole)), made.bank)


def without(name: str) -> Params:
    return {key: w for key, w in weights_of().items() if key != name}


def test_checkpoint_and_bank_come_back_and_answer_alike(tmp_path: Path, tiny: Backbone, make_image: Make) -> None:
    made = write_learned(tmp_path, tiny)
    learned, note = load_learned(tmp_path, tiny.fingerprint)
    assert learned is not None
    assert note is None
    one, other = (Classifier(tiny, root_of(tiny), learned=own) for own in (made, learned))
    assert one.info == other.info
    assert one.info.checkpoint_sha256 == made.checkpoint.sha256
    batch = images(one, make_image, 9)
    assert all(same(a, b) for a, b in zip(run(one, batch), run(other, batch), strict=True))
    assert load_learned(tmp_path / "nowhere", tiny.fingerprint)[0] is None


@pytest.mark.parametrize("name", sorted(gram.init()))
def test_a_checkpoint_that_lacks_a_weight_or_has_another_shape_is_refused(
    name: str, tmp_path: Path, tiny: Backbone
) -> None:
    wrong = weights_of()[name]
    wider = torch.cat([wrong, wrong], dim=-1)
    for params in (without(name), without(name) | {name: wider}, without(name) | {name: wrong[..., None]}):
        write_learned(tmp_path, tiny, params=params)
        with pytest.raises(InvalidCheckpoint, match=r"lacks `.+`, or has another shape; train it again"):
            load_learned(tmp_path, tiny.fingerprint)


def test_a_layer_of_another_width_is_no_other_shape(tmp_path: Path, tiny: Backbone) -> None:
    write_learned(tmp_path, tiny, params=gram.init(hidden=5))
    assert load_learned(tmp_path, tiny.fingerprint)[0] is not None


def test_a_checkpoint_without_its_own_bank_is_refused(tmp_path: Path, tiny: Backbone) -> None:
    write_learned(tmp_path, tiny)
    save_bank(tmp_path, bank_of(tiny, seed=1))
    with pytest.raises(InvalidCheckpoint, match="trained with another prototype bank"):
        load_learned(tmp_path, tiny.fingerprint)
    save_bank(tmp_path, dataclasses.replace(bank_of(tiny), fingerprint="0" * 64))
    with pytest.raises(InvalidCheckpoint, match="was made for model 0000"):
        load_learned(tmp_path, tiny.fingerprint)
    whole = (tmp_path / "bank.safetensors").read_bytes()
    (tmp_path / "bank.safetensors").write_bytes(whole[:-7])
    with pytest.raises(InvalidCheckpoint, match="bank of the checkpoint can't be used"):
        load_learned(tmp_path, tiny.fingerprint)
    (tmp_path / "bank.json").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"lacks bank\.json"):
        load_learned(tmp_path, tiny.fingerprint)
    (tmp_path / "bank.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match="without its prototype bank"):
        load_learned(tmp_path, tiny.fingerprint)


def test_a_checkpoint_of_another_model_or_cut_off_is_refused(tmp_path: Path, tiny: Backbone) -> None:
    write_learned(tmp_path, tiny)
    with pytest.raises(FingerprintMismatch, match="was made for model"):
        load_learned(tmp_path, "0" * 64)
    for path in tmp_path.glob("*.safetensors"):
        if path.name != "bank.safetensors":
            path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidCheckpoint, match="train it again"):
        load_learned(tmp_path, tiny.fingerprint)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {}}, "settings can't be read"),
        ({"settings": SETTINGS | {"steps": "many"}}, "settings can't be read"),
        ({"settings": SETTINGS | {"view_scale": [0.5]}}, "settings can't be read"),
        ({"settings": SETTINGS | {"update": "adam"}}, "settings can't be read"),
        ({"settings": SETTINGS | {"host": "pilot"}}, "settings can't be read"),
    ],
)
def test_a_training_that_is_not_what_is_served_is_refused(tiny: Backbone, changes: dict[str, Any], said: str) -> None:
    made = learned_of(tiny)
    wrong = Learned(dataclasses.replace(made.checkpoint, **changes), made.bank)
    with pytest.raises(InvalidCheckpoint, match=said):
        Classifier(tiny, root_of(tiny), learned=wrong)


def test_a_checkpoint_is_loaded_from_beside_the_weights_or_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", TINY, seed=4)
    backbone = load(str(folder), device="cpu")
    save_root(folder, Root(root_of(backbone), backbone.fingerprint, 6, "noise"))
    assert Classifier.load(str(folder), device="cpu").info.default_method == "infomax"
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere"):
        with pytest.raises(InvalidCheckpoint, match=missing):
            Classifier.load(str(folder), device="cpu", checkpoint=tmp_path / missing)
    made = write_learned(tmp_path / "own", backbone)
    loaded = Classifier.load(str(folder), device="cpu", checkpoint=tmp_path / "own")
    assert loaded.info.default_method == "gram"
    assert loaded.info.checkpoint_sha256 == made.checkpoint.sha256
    write_learned(folder, backbone)
    loaded = Classifier.load(str(folder), device="cpu")
    assert loaded.info.default_method == "gram"
    loaded.warm_up()


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


@pytest.mark.parametrize("episodes", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_per_image_tuning_is_tpt_on_random_episodes(tiny: Backbone, tiny_dir: Path, episodes: int) -> None:
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
    for episode in range(episodes):
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
    assert agree == episodes
    assert worst < 1e-4
