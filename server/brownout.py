"""Adaptation sheds before requests do: how full the queue is, and what is left of a plan then (api.md section 10)."""

from __future__ import annotations

from dataclasses import replace

from gram_core.types import Plan

HYSTERESIS = 0.1  # of the queue's bound: a level ends this far below where it began


class Brownout:
    """The level, 0 to 3, of a queue whose fill is told; an empty tuple of thresholds is never."""

    def __init__(self, thresholds: tuple[float, ...]) -> None:
        self.thresholds = thresholds
        self.level = 0

    def update(self, fill: float) -> int:
        """The level at this fill, from 0 (empty) to 1 (the next request is refused)."""
        while self.level < len(self.thresholds) and fill >= self.thresholds[self.level]:
            self.level += 1
        while self.level > 0 and fill < self.thresholds[self.level - 1] - HYSTERESIS:
            self.level -= 1
        return self.level


def shed(plan: Plan, level: int) -> Plan:
    """What of `plan` is run at a level: 1 at most half its views, 2 a quarter and one step, 3 the baseline only."""
    if level <= 0 or plan.skip is not None:
        return plan
    if level == 1:
        return plan.less("brownout", views=max(1, plan.views // 2), steps=plan.steps)
    if level == 2:
        return plan.less("brownout", views=max(1, plan.views // 4), steps=1)
    return replace(plan, skip="brownout")
