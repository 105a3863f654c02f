"""One contract suite over every host: a new prompt method is tested by being registered."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn import functional as F

from gram_core.adapt import adapt, of
from gram_core.backbone import Backbone
from gram_core.prompts import METHODS, PromptMethod
from gram_core.text import ClassSet, TextEncoder
from gram_core.types import Params

NAMES = ["cat", "dog", "fire truck", "cup of tea", "x"]


@pytest.fixture(scope="module")
def texts(tiny: Backbone) -> TextEncoder:
    return TextEncoder(tiny)


@pytest.fixture(params=sorted(METHODS))
def host(request: pytest.FixtureRequest, texts: TextEncoder) -> PromptMethod:
    return METHODS[request.param](texts)


@pytest.fixture(scope="module")
def classes(texts: TextEncoder) -> ClassSet:
    return texts.class_set(NAMES)


def started(host: PromptMethod, classes: ClassSet, episodes: int = 1, noise: float = 0.0) -> Params:
    params = host.start(host.init(), classes, episodes)
    gen = torch.Generator().manual_seed(0)
    return {k: p + noise * torch.randn(p.shape, generator=gen) for k, p in params.items()}


def features(texts: TextEncoder, episodes: int, images: int = 6) -> torch.Tensor:
    gen = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(episodes, images, texts.backbone.joint_dim, generator=gen), dim=-1)


def test_the_registered_name_is_the_hosts_own() -> None:
    assert {name: host.name for name, host in METHODS.items()} == {name: name for name in METHODS}


def test_at_the_start_the_features_are_plain_texts(host: PromptMethod, texts: TextEncoder, classes: ClassSet) -> None:
    made = host.features(started(host, classes, 2), classes)
    assert made.shape == (2, len(NAMES), texts.backbone.joint_dim)
    for episode in made:
        torch.testing.assert_close(episode, texts.features(classes), rtol=0, atol=1e-5)


def test_logits_are_scaled_cosines(host: PromptMethod, texts: TextEncoder, classes: ClassSet) -> None:
    params, images = started(host, classes, 2, noise=0.1), features(texts, 2)
    made = host.logits(params, images, classes)
    assert made.shape == (2, 6, len(NAMES))
    expected = texts.backbone.logit_scale * torch.einsum("ebd,ekd->ebk", images, host.features(params, classes))
    torch.testing.assert_close(made, expected)
    unit = host.features(params, classes).norm(dim=-1)
    torch.testing.assert_close(unit, torch.ones_like(unit))


def test_what_a_checkpoint_keeps_knows_no_class_list(host: PromptMethod, texts: TextEncoder) -> None:
    kept = host.init()
    before = {k: v.clone() for k, v in kept.items()}
    for names in (NAMES, ["one", "two"]):
        host.start(kept, texts.class_set(names), 3)
    assert all(torch.equal(kept[k], v) for k, v in before.items())
    assert all(len(v) == 1 for v in kept.values())


def test_the_gradient_reaches_every_variable_and_changes_none(
    host: PromptMethod, texts: TextEncoder, classes: ClassSet
) -> None:
    params, images = started(host, classes, 2, noise=0.1), features(texts, 2)
    before = {k: p.clone() for k, p in params.items()}

    def loss(p: Params) -> torch.Tensor:
        return host.logits(p, images, classes)[..., 0].sum(dim=1)

    grads = of(loss)(params)
    for name, grad in grads.items():
        assert grad.shape == params[name].shape
        assert (grad.flatten(1).norm(dim=1) > 0).all()
        assert torch.equal(params[name], before[name])


def test_episodes_do_not_see_each_other(host: PromptMethod, texts: TextEncoder, classes: ClassSet) -> None:
    params, images = started(host, classes, 3, noise=0.1), features(texts, 3)
    together = host.logits(params, images, classes)
    for e in range(3):
        alone = host.logits({k: p[e : e + 1] for k, p in params.items()}, images[e : e + 1], classes)
        torch.testing.assert_close(alone[0], together[e], rtol=0, atol=1e-5)


def test_four_threads_get_the_serial_answers(host: PromptMethod, texts: TextEncoder) -> None:
    sets = [texts.class_set([f"{n} {i}" for n in NAMES[: 2 + i % 3]]) for i in range(12)]
    images = features(texts, 1)

    def tune(i: int) -> torch.Tensor:
        def loss(p: Params) -> torch.Tensor:
            return host.logits(p, images, sets[i]).softmax(-1)[..., 0].sum(dim=1)

        params = adapt(of(loss), host.start(host.init(), sets[i], 1), lr=1e-2, steps=3)
        return host.logits(params, images, sets[i]).detach()

    serial = [tune(i) for i in range(12)]
    parallel: list[torch.Tensor | None] = [None] * 12

    def work(first: int) -> None:
        for i in range(first, 12, 4):
            parallel[i] = tune(i)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for got, expected in zip(parallel, serial, strict=True):
        assert got is not None
        assert torch.equal(got, expected)
