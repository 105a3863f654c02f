"""Losses, the rehearsal weight, acceptance and the temperature."""

from __future__ import annotations

import math

import pytest
import torch

from gram_core import objectives
from gram_core.adapt import adapt, of


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_entropy_is_zero_for_certainty_and_log_k_for_ignorance() -> None:
    p = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4])
    torch.testing.assert_close(objectives.entropy(p), torch.tensor([0.0, math.log(4)]))
    p.requires_grad_(True)
    (grad,) = torch.autograd.grad(objectives.entropy(p).sum(), p)
    assert grad.isfinite().all()


def test_kl_is_zero_at_equality_and_matches_torch() -> None:
    p, q = logits(5, 7), logits(5, 7, seed=1)
    assert objectives.kl(p, p).abs().max() < 1e-6
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(objectives.kl(p, q), expected)


def test_confidence_selection_keeps_the_lowest_entropies_as_tpt_does() -> None:
    x = logits(1, 64, 10)
    p = x[0].softmax(-1)
    entropies = -(p * p.log()).sum(1)
    expected = set(torch.argsort(entropies)[: int(64 * 0.1)].tolist())
    assert set(objectives.confident(x, 0.1)[0].tolist()) == expected
    assert objectives.confident(logits(1, 4, 3), 0.1).shape == (1, 1)


def test_marginal_entropy_is_tpts_average_entropy() -> None:
    x = logits(1, 6, 10)
    log_p = x[0].log_softmax(-1)
    averaged = (log_p.logsumexp(0) - math.log(6)).clamp_min(torch.finfo(torch.float32).min)
    torch.testing.assert_close(objectives.marginal_entropy(x)[0], -(averaged * averaged.exp()).sum())


def test_infomax_does_not_see_the_order_of_images() -> None:
    x, root = logits(1, 12, 4, 5), logits(1, 5, seed=3)
    turned = x[:, torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(objectives.infomax(x, root, 0.7), objectives.infomax(turned, root, 0.7))


def test_infomax_without_a_root_is_mutual_information_with_a_minus_sign() -> None:
    x = logits(1, 12, 1, 5)
    p = x[0, :, 0].softmax(-1)
    marginal = p.mean(0)
    expected = -(p * p.log()).sum(1).mean() + (marginal * marginal.log()).sum()
    torch.testing.assert_close(objectives.infomax(x)[0], expected)
    assert objectives.infomax(x)[0] <= 0


def test_the_root_takes_its_share_of_the_marginal() -> None:
    x, root = logits(1, 4, 1, 3), torch.tensor([[50.0, 0.0, 0.0]])
    p = x[0, :, 0].softmax(-1)
    mixed = (p.mean(0) + 0.5 * torch.tensor([1.0, 0, 0])) / 1.5
    expected = objectives.entropy(p).mean() - objectives.entropy(mixed)
    torch.testing.assert_close(objectives.infomax(x, root, 0.5)[0], expected)


def test_rehearsal_weight_follows_the_formula_and_grows_with_skew() -> None:
    uniform, skewed = torch.full((1, 10), 0.1), torch.tensor([[0.91] + [0.01] * 9])
    assert float(objectives.rehearsal_weight(uniform, 32)) == pytest.approx(0.1 + 5 / 32)
    expected = max(math.log(10) - 9 / 64, 0.5 * math.log(10))
    deficit = 1 - float(objectives.entropy(skewed)) / expected
    assert float(objectives.rehearsal_weight(skewed, 32)) == pytest.approx(0.1 + 2 * deficit + 5 / 32, abs=1e-5)
    # many classes and few images: the bias would exceed half of log C, the floor holds
    few = float(objectives.rehearsal_weight(torch.full((1, 1000), 1e-3), 8))
    assert few == pytest.approx(0.1 + 5 / 8)


def test_only_undecided_images_take_the_tuned_answer_and_fewer_images_overrule_less() -> None:
    base = torch.tensor([[2.0, 1.4, 0.0], [2.0, 0.5, 0.0], [1.0, 0.9, 1.0]])
    same = torch.eye(3)  # the label stays: neighbours are not asked

    def taken(copies: int) -> list[bool]:
        x = base.repeat(copies, 1)
        return objectives.accepted(x, x, same.repeat(copies, 1))[:3].tolist()

    assert taken(11) == [True, False, True]  # 33 images: gaps below 0.80
    assert taken(3) == [False, False, True]  # 9 images: gaps below 0.53


def test_a_new_label_needs_the_consent_of_the_nearest_images() -> None:
    features = torch.nn.functional.normalize(
        torch.tensor(
            [[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [0.9, 0.1], [0.0, 1.0], [0.1, 1.0], [-0.1, 1.0], [0.1, 0.9]]
        ),
        dim=-1,
    )
    base = torch.tensor([[1.0, 0.9, 0.0]] + [[0.0, 3.0, 0.0]] * 3 + [[1.0, 0.9, 0.0]] + [[3.0, 0.0, 0.0]] * 3)
    tuned = base.clone()
    tuned[[0, 4]] = torch.tensor([0.0, 2.0, 0.0])  # both want to change from class 0 to class 1
    taken = objectives.accepted(base, tuned, features)
    assert bool(taken[0])  # its neighbours are class 1
    assert not bool(taken[4])  # its neighbours are class 0


@pytest.mark.parametrize("target", [0.35, 0.6, 0.95])
def test_the_temperature_gives_the_confidence_asked_for(target: float) -> None:
    x = logits(2, 20, 6)
    t = objectives.temperature(x, torch.full((2,), target))
    scaled = (x / t[:, None, None]).softmax(-1)
    torch.testing.assert_close(scaled.amax(-1).mean(1), torch.full((2,), target), rtol=0, atol=1e-4)
    assert torch.equal(scaled.argmax(-1), x.argmax(-1))


def test_plain_infomax_is_pulled_off_a_single_class_batch_and_the_root_holds_it() -> None:
    """The planted case of docs/method.md: 32 images of one class, a prior that names all classes."""
    gen = torch.Generator().manual_seed(0)
    classes = torch.nn.functional.normalize(torch.randn(8, 32, generator=gen), dim=-1)
    images = torch.nn.functional.normalize(classes[0] + 0.12 * torch.randn(32, 32, generator=gen), dim=-1)
    root = torch.nn.functional.normalize(classes[1:].sum(0), dim=-1)

    def tune(with_root: bool) -> float:
        def loss(p: dict[str, torch.Tensor]) -> torch.Tensor:
            t = torch.nn.functional.normalize(classes + p["z"], dim=-1)
            x = 12 * images[None, :, None] @ t.transpose(-1, -2)[:, None]
            extra = (12 * root @ t.transpose(-1, -2)) if with_root else None
            rho = objectives.rehearsal_weight(first, 32) if with_root else 0.0
            return objectives.infomax(x, extra, rho)

        first = (12 * images @ classes.T).softmax(-1).mean(0)[None]
        params = adapt(of(loss), {"z": torch.zeros(1, 8, 32)}, lr=1e-2, steps=60)
        t = torch.nn.functional.normalize(classes + params["z"][0], dim=-1)
        return float(((images @ t.T).argmax(1) == 0).float().mean())

    zero_shot = float(((images @ classes.T).argmax(1) == 0).float().mean())
    assert zero_shot > 0.7
    assert tune(with_root=False) < zero_shot - 0.2
    assert tune(with_root=True) >= zero_shot


def test_a_guarded_answer_changes_accepted_images_alone_and_keeps_their_mean_confidence() -> None:
    gen = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(24, 8, generator=gen), dim=-1)
    base = logits(24, 5) / 4
    tuned = base + logits(24, 5, seed=1)
    answer, taken, heat = objectives.guarded(base, tuned, features)
    assert torch.equal(taken, objectives.accepted(base, tuned, features))
    assert 0 < int(taken.sum()) < 24
    assert torch.equal(answer[~taken], base[~taken])
    torch.testing.assert_close(answer[taken], tuned[taken] / heat)
    sure = [x[taken].softmax(-1).amax(-1).mean() for x in (answer, base)]
    torch.testing.assert_close(*sure, rtol=0, atol=1e-4)
    decided = base + 100 * torch.nn.functional.one_hot(base.argmax(-1), 5)
    answer, taken, heat = objectives.guarded(decided, tuned, features)
    assert torch.equal(answer, decided)
    assert not taken.any()
    assert float(heat) == 1.0
