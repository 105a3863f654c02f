"""What one rate of load comes to, and whether the criteria of the load programme hold. Pure: no server, no clock."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.figures import criterion, shares, spread
from benchmarks.traffic import Outcome

RATES = (0.5, 0.9, 1.5, 3.0)  # times capacity
RECOVERY_S = 5.0
REJECT_MS = 50.0
AS_BEFORE = 1.5  # p99 of a few hundred requests moves by this much from run to run without any cause


def summary(outcomes: Sequence[Outcome], start: float, seconds: float) -> dict[str, Any]:
    """Figures of the requests scheduled within `seconds` from `start`; times in milliseconds."""
    answered = [o for o in outcomes if o.end == "answered"]
    good = [o for o in answered if o.status == 200]
    rejects = [o.reject_ms for o in answered if o.status == 429]
    images: Counter[str] = sum((o.adaptation for o in good), Counter())
    completed = sum(n for did, n in images.items() if did.partition("/")[0] == "completed")
    refused = sum(o.status in (429, 503, 504) for o in answered)
    stages = sorted({name for o in good for name in o.timings})
    return {
        "sent": len(outcomes),
        "answered": {str(status): n for status, n in sorted(Counter(o.status for o in answered).items())},
        "codes": dict(Counter(o.code for o in outcomes if o.code)),
        "cancelled": sum(o.end == "cancelled" for o in outcomes),
        "lost": sum(o.end == "lost" for o in outcomes),
        "goodput": round(sum(o.done <= start + seconds for o in good) / seconds, 3),
        "latency_ms": spread([o.ms for o in good]),
        "reject_ms": {"count": len(rejects), **spread(rejects)},
        "answered_share": round(len(good) / (len(good) + refused), 4) if good or refused else 1.0,
        "adaptation": shares(images),
        "completed_share": round(completed / max(1, images.total()), 4),
        "brownout": shares(Counter(o.level for o in good)),
        "stages_ms": {name: round(statistics.median(o.timings.get(name, 0.0) for o in good), 1) for name in stages},
        "generator_lag_ms": spread([1000 * (o.started - o.at) for o in outcomes]),
    }


def verdict(found: dict[str, Any], queue_seconds: float) -> list[dict[str, Any]]:
    """The criteria of the load programme, on the figures of one mix; None where too few requests came to say."""
    limit, rates, after = found["capacity"], found["rates"], found["after"]
    calm = [row for row in rates if row["factor"] <= 0.9]
    burst, every = rates[-1], [*rates, after]
    lines = []

    def say(name: str, value: Any, passed: bool | None) -> None:
        lines.append(criterion(name, value, passed))

    refused = [row["answered"].get("429", 0) for row in calm]
    say("no 429 up to 0.9 C", refused, not any(refused))
    tails = [_ratio(row["latency_ms"]["p99"], row["latency_ms"]["p50"]) for row in calm]
    say("p99 at most 4 x p50 up to 0.9 C", tails, None if None in tails else all(t <= 4 for t in tails if t))
    peak = max(*(row["goodput"] for row in every), *(step["good_per_s"] for step in limit["steps"]))
    kept = _ratio(burst["goodput"], peak)
    say("goodput at 3 C at least 90 % of peak", kept, None if kept is None else kept >= 0.9)
    bound, slowest = 1000 * queue_seconds + 2 * limit["service_ms"], burst["latency_ms"]["p99"]
    name = f"accepted p99 at 3 C at most {bound:.0f} ms (queue + 2 service times)"
    say(name, slowest, slowest is not None and slowest <= bound)
    rejects = burst["reject_ms"]
    name = f"99 % of rejects within {REJECT_MS:.0f} ms of the last body byte"
    say(name, rejects["p99"], rejects["p99"] <= REJECT_MS if rejects["count"] else None)
    lines.append(sheds_first(rates))
    told, seconds = burst["level_told"], burst["level_zero_s"]
    name = f"level 0 within {RECOVERY_S:.0f} s after the burst"
    say(name, seconds if told else "not told", (seconds is not None and seconds <= RECOVERY_S) if told else None)
    grown = _ratio(after["latency_ms"]["p99"], rates[0]["latency_ms"]["p99"])
    name = f"p99 at 0.5 C after the burst at most {AS_BEFORE} x that before"
    say(name, grown, None if grown is None else grown <= AS_BEFORE)
    faults = sum(n for row in every for status, n in row["answered"].items() if status >= "500")
    say("no 5xx", faults, faults == 0)
    lost = [row["sent"] - sum(row["answered"].values()) - row["cancelled"] for row in every]
    say("sent = answered + cancelled", lost, not any(lost))
    say("the server counted the same, requests that we left apart", None, all(agrees(row) for row in every))
    return lines


def _ratio(above: float | None, below: float | None) -> float | None:
    return round(above / below, 3) if above is not None and below else None


def sheds_first(rates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Wherever requests are refused, a smaller share of images is adapted in full than of requests answered."""
    name, usual = "adaptation is shed before requests are", rates[0]["completed_share"]
    if not usual:
        return criterion(name, "nothing is adapted", None)
    pairs = [(row["factor"], round(row["completed_share"] / usual, 3), row["answered_share"]) for row in rates]
    return criterion(name, pairs, all(adapted < share for _, adapted, share in pairs if share < 0.99))


def uncounted(row: dict[str, Any]) -> dict[str, int]:
    """By status, what the server counted beyond what arrived here."""
    return {
        code: row["counted"].get(code, 0) - row["answered"].get(code, 0)
        for code in {**row["counted"], **row["answered"]}
    }


def agrees(row: dict[str, Any]) -> bool:
    """Whether all that the server counted beyond our answers can be requests that we left."""
    beyond = uncounted(row)
    return min(beyond.values(), default=0) >= 0 and sum(beyond.values()) <= row["cancelled"]


def level_zero_s(probes: Sequence[Outcome], end: float) -> tuple[bool, float | None]:
    """Whether the level is told, and the seconds from `end` until it was 0 and stayed so; None if it never was."""
    levels = [(o.done, o.level) for o in probes if o.level is not None]
    above = max((t for t, level in levels if level), default=end)
    at_zero = [t for t, level in levels if t > above and not level]
    if above <= end:
        return bool(levels), 0.0
    return True, round(min(at_zero) - end, 2) if at_zero else None
