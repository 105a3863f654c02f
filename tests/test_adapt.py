"""The inner loop and its update rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gram_core.adapt import UPDATES, adapt, of, rms, sgd, sign
from gram_core.types import Params

CENTRES = torch.arange(12.0).reshape(3, 4)


def quadratic(params: Params) -> Tensor:
    return (params["x"] - CENTRES[: len(params["x"])]).square().sum(dim=1)


@pytest.mark.parametrize("name", UPDATES)
def test_batched_episodes_equal_each_episode_alone(name: str) -> None:
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    together = adapt(of(quadratic), {"x": start}, update=UPDATES[name], lr=0.1, steps=5)["x"]
    for e in range(3):
        centre = CENTRES[e : e + 1]

        def alone(p: Params, centre: Tensor = centre) -> Tensor:
            return (p["x"] - centre).square().sum(1)

        single = adapt(of(alone), {"x": start[e : e + 1]}, update=UPDATES[name], lr=0.1, steps=5)["x"]
        assert torch.equal(together[e : e + 1], single)


def test_sgd_equals_torchs_sgd() -> None:
    start = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    ours = adapt(of(quadratic), {"x": start}, update=sgd, lr=0.03, steps=7)["x"]
    theirs = start.clone().requires_grad_(True)
    optimiser = torch.optim.SGD([theirs], lr=0.03)
    for _ in range(7):
        optimiser.zero_grad()
        quadratic({"x": theirs}).sum().backward()
        optimiser.step()
    torch.testing.assert_close(ours, theirs.detach())


def test_sign_equals_the_first_step_of_adamw() -> None:
    start = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    ours = adapt(of(quadratic), {"x": start}, update=sign, lr=5e-3, steps=1)["x"]
    theirs = start.clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([theirs], lr=5e-3)  # decay 0.01, eps 1e-8: torch's and TPT's defaults
    quadratic({"x": theirs}).sum().backward()
    optimiser.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-7)


def test_a_positive_gate_changes_an_rms_step_and_never_a_sign_step() -> None:
    p, g = torch.zeros(1, 6), torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    gate = torch.linspace(0.5, 2.0, 6)[None]
    torch.testing.assert_close(sign(p, g * gate, 0.1), sign(p, g, 0.1), rtol=0, atol=1e-7)
    assert not torch.allclose(rms(p, g * gate, 0.1), rms(p, g, 0.1), atol=1e-3)
    torch.testing.assert_close(rms(p, 7.0 * g, 0.1), rms(p, g, 0.1))


def test_an_rms_step_has_the_size_of_its_learning_rate() -> None:
    g = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    step = rms(torch.zeros(2, 5, 3), g, 0.01)
    torch.testing.assert_close(step.square().mean(dim=(1, 2)).sqrt(), torch.full((2,), 0.01))


def test_zero_steps_return_the_input_and_no_step_touches_it() -> None:
    start = {"x": torch.randn(2, 4)}
    before = start["x"].clone()
    assert torch.equal(adapt(of(quadratic), start, lr=0.1, steps=0)["x"], before)
    adapt(of(quadratic), start, lr=0.1, steps=3)
    assert torch.equal(start["x"], before)
    assert not start["x"].requires_grad


def test_zero_gradients_leave_every_rule_finite() -> None:
    for update in UPDATES.values():
        assert update(torch.ones(1, 3), torch.zeros(1, 3), 0.1).isfinite().all()


def test_the_regulator_sees_every_gradient_and_decides_the_step() -> None:
    seen = []

    def flip(grads: Params) -> Params:
        seen.append(grads["x"].clone())
        return {"x": -grads["x"]}

    start = torch.zeros(1, 4) + 1.0
    there = adapt(of(quadratic), {"x": start}, regulate=flip, update=sgd, lr=0.1, steps=2)["x"]
    assert len(seen) == 2
    assert torch.equal(seen[0], 2 * (start - CENTRES[:1]))
    assert (there[:, 2:] < start[:, 2:]).all()
