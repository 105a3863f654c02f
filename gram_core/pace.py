"""How long adaptation takes on this machine: measured at warm-up, corrected by every run, asked before the next."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gram_core.types import Plan

FORGET = 0.9  # weight of the past in the correction, per run
MOST = 8.0  # the correction stays within [1 / MOST, MOST]


@dataclass(frozen=True)
class Line:
    """Seconds of one tuning: `once` + steps * (`step` + units * `unit`)."""

    once: float = 0.0
    step: float = 0.0
    unit: float = 0.0

    @classmethod
    def through(cls, one: float, more: float, wide: float, *, steps: int, units: float, wider: float) -> Line:
        """From three measurements: one step and `steps` steps on `units`, and `steps` steps on `wider` units."""
        each = max(0.0, (more - one) / (steps - 1))
        unit = max(0.0, (wide - more) / (steps * (wider - units)))
        return cls(max(0.0, one - each), max(0.0, each - units * unit), unit)

    def seconds(self, steps: int, units: float) -> float:
        """Of one tuning."""
        return self.once + steps * (self.step + units * self.unit)


@dataclass
class Pace:
    """Seconds of a plan. Units are texts for a host that passes the text tower, else features times classes.

    `group` images that are tuned one at a time share a pass (`gram_core.tuner`).
    """

    view_s: float = 0.0
    lines: dict[str, Line] = field(default_factory=dict)
    factor: float = 1.0

    def seconds(self, plan: Plan, images: int, classes: int, group: int = 1) -> float:
        """From the moment that zero-shot is there until the tuned answer is."""
        if plan.skip is not None:
            return 0.0
        line = self.lines.get(key(plan), Line())
        runs, each = (-(-images // group), group) if plan.scope == "image" else (1, images)
        units = float((each if plan.scope == "image" else 1) * classes)
        if plan.host == "residual":
            units = float(each * plan.views * classes)
        tuning = runs * line.seconds(plan.steps, units)
        return self.factor * (images * (plan.views - 1) * self.view_s + tuning)

    def fit(self, plan: Plan, images: int, classes: int, budget_s: float, why: str, group: int = 1) -> Plan:
        """The plan, or the largest smaller one that fits, for the reason `why`: steps first, then views.

        More budget never means fewer steps, and with the same steps never fewer views.
        """

        def fits(views: int, steps: int) -> bool:
            return self.seconds(replace(plan, views=views, steps=steps), images, classes, group) <= budget_s

        if plan.skip is not None or (budget_s > 0 and fits(plan.views, plan.steps)):
            return plan
        least = min(2, plan.views)  # one view is the original alone, which says nothing of what is invariant
        steps = next((s for s in range(plan.steps, min(1, plan.steps) - 1, -1) if fits(least, s)), None)
        if steps is None or budget_s <= 0:
            return replace(plan, skip=why)
        views = next(v for v in range(plan.views, least - 1, -1) if fits(v, steps))
        return plan.less(why, views=views, steps=steps)

    def correct(self, predicted_s: float, measured_s: float) -> None:
        """Learn from a run that did all that was predicted."""
        if predicted_s > 0 and measured_s > 0:
            right = self.factor * measured_s / predicted_s
            self.factor = min(MOST, max(1 / MOST, FORGET * self.factor + (1 - FORGET) * right))


def key(plan: Plan) -> str:
    """Plans that share a line."""
    return f"{plan.method} {plan.host} {plan.scope}"
