"""The parts of the load, soak and batching programmes that decide what their figures mean."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import results
from benchmarks.assortment import SHARES, Requests, with_token
from benchmarks.batching import ratio, throughput
from benchmarks.figures import percentile, spread, theil_sen
from benchmarks.load import MIXES, VARIANTS, requests
from benchmarks.soak import Tally, memory, soak
from benchmarks.soak import verdict as soak_verdict
from benchmarks.traffic import Ask, Client, Outcome, classify, fire, get, head, keep_asking, schedule, slowly
from benchmarks.verdict import RATES, agrees, level_zero_s, summary, verdict
from server.settings import Settings
from tests.server_fixtures import HeldClassifier, live, png

QUESTION = {"classes": ["cat", "dog"]}


# ---- arrivals ----


def test_a_schedule_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    assert schedule(50, 10, 3) == schedule(50, 10, 3)
    assert schedule(50, 10, 3) != schedule(50, 10, 4)


def test_arrivals_are_poisson() -> None:
    times = schedule(200, 100, 0)
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] < 100
    # 20 000 arrivals, standard deviation 141; a fixed seed, so these can't fail by chance
    assert abs(len(times) - 20_000) < 4 * 141
    gaps = np.diff(times)
    assert stats.kstest(gaps, "expon", args=(0, 1 / 200)).pvalue > 0.01
    counts = np.histogram(times, 1000, (0, 100))[0]
    assert abs(counts.var() / counts.mean() - 1) < 0.15  # equal for Poisson; standard deviation 0.045
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03  # no memory


# ---- statistics ----


def test_a_percentile_is_one_of_the_values_by_nearest_rank() -> None:
    values = [float(v) for v in np.random.default_rng(0).permutation(200)]
    for share in (0.005, 0.5, 0.501, 0.95, 0.99, 1.0):
        assert percentile(values, share) == np.quantile(values, share, method="inverted_cdf")
    assert spread([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0, "max": 3.0}
    assert spread([])["p99"] is None


def test_theil_sen_equals_scipys_and_ignores_an_outlier() -> None:
    rng = np.random.default_rng(1)
    x = np.sort(rng.uniform(0, 10, 80))
    y = 3 * x + rng.normal(0, 1, 80)
    y[5] += 1000
    ours, reference = theil_sen(list(x), list(y)), stats.theilslopes(y, x, 0.95)
    assert ours == pytest.approx((reference.slope, reference.low_slope, reference.high_slope), rel=1e-12)
    assert ours[1] < 3 < ours[2]


def test_points_of_equal_x_have_no_slope_between_them() -> None:
    assert theil_sen([0, 0, 1, 1], [0, 9, 2, 11])[0] == pytest.approx(2)
    with pytest.raises(ValueError, match="same x"):
        theil_sen([1, 1], [0, 1])


def test_throughput_is_right_for_answers_one_by_one_and_for_answers_together() -> None:
    alone = [Outcome("good", 0, done=0.25 * (n + 1)) for n in range(24)]
    together = [Outcome("good", 0, done=2.0 * (1 + n // 8)) for n in range(24)]
    assert throughput(alone, 8) == pytest.approx(4)
    assert throughput(together, 8) == pytest.approx(4)


def test_the_interval_of_a_ratio_is_of_the_sign_test() -> None:
    one, batched = [1.0, 1.1, 0.9, 1.0, 1.2, 1.0], [2.0, 2.4, 1.8, 2.1, 2.5, 1.9]
    found = ratio(one, batched)
    assert found["ratio"] == pytest.approx(2.05)
    assert (found["low"], found["high"]) == (1.9, 2.182)  # the smallest and the largest of six pairs
    assert found["coverage"] == pytest.approx(1 - 2 / 2**6, abs=1e-3)
    assert ratio([1.0] * 4, [2.0] * 4)["coverage"] == 0.875
    many = ratio([1.0] * 12, [float(n) for n in range(12)])  # scipy: binom.ppf(0.025, 12, 0.5) - 1 values given up
    given_up = int(stats.binom.ppf(0.025, 12, 0.5)) - 1
    assert (many["low"], many["high"]) == (given_up, 11 - given_up)
    assert many["coverage"] == pytest.approx(1 - 2 * stats.binom.cdf(given_up, 12, 0.5), abs=1e-3)


# ---- requests ----


def test_a_mix_has_the_requests_that_it_promises_and_is_drawn_by_its_seed() -> None:
    photos = [png(n) for n in range(12)]
    made = requests(MIXES["mixed"], photos, 0)
    assert made == requests(MIXES["mixed"], photos, 0)
    assert made != requests(MIXES["mixed"], photos, 1)
    assert len(made) == VARIANTS
    assert sum(ask.kind == "bad" for ask in made) == 0.1 * VARIANTS
    assert sum(ask.cancel_s is not None for ask in made) == 0.05 * VARIANTS
    sizes = Counter(ask.pieces[0].count(b'name="image"') for ask in requests(MIXES["zero-shot"], photos, 0))
    assert set(sizes) == {1, 2, 3, 4}


def test_a_soaks_requests_have_their_shares() -> None:
    stream = Requests([png(n) for n in range(12)], {"max_body_bytes": 4096, "max_image_bytes": 2048}, 0)
    kinds = Counter(ask.kind.partition(":")[0] for ask in islice(stream, 4000))
    for kind, share in SHARES.items():
        assert abs(kinds[kind] / 4000 - share) < 4 * math.sqrt(share / 4000)


def test_a_replay_keeps_all_but_the_adaptation() -> None:
    ask = classify("good", [png()], {**QUESTION, "adaptation": {"method": "tpt"}})
    asked, _, content = with_token(ask, "gr1.abc").pieces[0].partition(b"\r\n\r\n")
    assert content.count(b'"adaptation": {"replay": "gr1.abc"}') == 1
    assert png() in content
    assert b"tpt" not in content
    assert f"Content-Length: {len(content)}".encode() in asked.split(b"\r\n")


# ---- the client, against a real server ----


def test_every_request_ends_in_one_way_and_is_counted_by_both_sides() -> None:
    classifier = HeldClassifier()
    with live(classifier, queue_seconds=0.01) as server:
        url = f"http://127.0.0.1:{server.port}"
        good = classify("good", [png()], QUESTION)
        bad = classify("bad", [b"text"], QUESTION, expected=(415,))
        left = classify("good", [png(1)], QUESTION, cancel_s=0.05)
        asks = [bad if n % 4 == 1 else left if n % 4 == 2 else good for n in range(40)]
        plan = [(0.005 * n, ask) for n, ask in enumerate(asks)]

        async def run() -> list[Outcome]:
            asyncio.get_running_loop().call_later(0.3, classifier.gate.set)
            return await fire(url, plan, time.monotonic())

        outcomes = asyncio.run(run())
        found = summary(outcomes, min(o.at for o in outcomes), 1.0)
        assert found["sent"] == 40
        assert found["lost"] == 0
        assert found["cancelled"] > 0  # nothing is answered before the gate opens
        assert found["answered"]["200"] > 0
        assert set(found["answered"]) <= {"200", "415", "429"}  # a full queue refuses a bad image unseen
        assert sum(found["answered"].values()) + found["cancelled"] == found["sent"]
        server.assert_well()
        counted = {
            str(code): int(server.metric("gram_requests_total", route="/v1/classify", code=str(code)))
            for code in (200, 415, 429, 499)
        }
        counted["200"] -= 1  # the one that was asked to see whether it is well
        assert agrees({**found, "counted": {code: n for code, n in counted.items() if n}})


def test_latency_counts_from_the_schedule_and_rejects_from_the_last_byte() -> None:
    with live() as server:
        url = f"http://127.0.0.1:{server.port}"

        async def late() -> tuple[Outcome, Outcome]:
            client = Client(url)
            slow = await client.ask(slowly(classify("bad", [b"text"], QUESTION), 4, 0.1))
            behind = await client.ask(classify("good", [png()], QUESTION), time.monotonic() - 1.0)
            client.close()
            return slow, behind

        slow, behind = asyncio.run(late())
        assert behind.status == 200
        assert behind.ms >= 1000
        assert slow.status == 415
        assert slow.ms >= 75  # three pauses of 25 ms
        assert slow.reject_ms < slow.ms - 70


def test_a_refusal_of_an_upload_that_is_too_large_is_heard() -> None:
    with live(max_body_bytes=100_000, max_image_bytes=50_000) as server:
        stream = Requests([png()], {"max_body_bytes": 100_000, "max_image_bytes": 50_000}, 0)
        client = Client(f"http://127.0.0.1:{server.port}")

        async def run() -> list[Outcome]:
            return [await client.ask(ask) for ask in (*stream.oversize, *stream.bad)]

        outcomes = asyncio.run(run())
        assert [o.end for o in outcomes] == ["answered"] * len(outcomes)
        assert all(o.expected for o in outcomes), [(o.kind, o.status) for o in outcomes if not o.expected]
        server.assert_well()


def test_nothing_more_is_sent_to_a_server_that_has_answered() -> None:
    received: list[int] = []

    async def run() -> Outcome:
        over = asyncio.Event()

        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 -\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            received.append(len(await reader.read()))
            writer.close()
            over.set()

        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as refusing:
            port = refusing.sockets[0].getsockname()[1]
            pieces = (head("image/png", "Content-Length: 10000"), *(bytes(1000) for _ in range(10)))
            outcome = await Client(f"http://127.0.0.1:{port}").ask(
                Ask("oversize", pieces, pause_s=5.0, expected=(413,))
            )
            await over.wait()
            return outcome

    assert asyncio.run(run()).expected
    assert received == [0]


def test_a_connection_that_ends_without_an_answer_is_lost() -> None:
    async def run() -> Outcome:
        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as nobody:
            port = nobody.sockets[0].getsockname()[1]
            return await Client(f"http://127.0.0.1:{port}").ask(get("/livez", "livez"))

    outcome = asyncio.run(run())
    assert (outcome.end, outcome.status) == ("lost", 0)


def test_a_closed_loop_asks_as_often_as_it_must() -> None:
    with live() as server:
        asks = [classify("good", [png()], QUESTION)]
        outcomes = asyncio.run(keep_asking(f"http://127.0.0.1:{server.port}", asks, 3, 0.0, least=2))
    assert [o.status for o in outcomes] == [200] * 6


def test_a_soak_counts_what_it_sent_and_replays_equal_answers() -> None:
    with live() as server:
        limits = {name: value for name, value in Settings() if name.startswith("max_")}
        stream = Requests([png(n) for n in range(12)], {**limits, "max_body_bytes": 33_554_432}, 0)
        stream.oversize = stream.oversize[:1]
        tally = asyncio.run(soak(f"http://127.0.0.1:{server.port}", stream, 3, 0.5, 1))
        server.assert_well()
    assert tally.ends["lost"] == 0
    assert tally.ends.total() == len(tally.times) > 0
    assert not tally.unexpected
    assert set(tally.replays) == {"equal"}


# ---- verdicts ----


def outcome(
    at: float, ms: float, status: int = 200, end: str = "answered", level: int = 0, did: str = "completed"
) -> Outcome:
    made = Outcome("good", at, started=at, sent=at, done=at + ms / 1000, end=end, status=status, level=level)
    made.adaptation = Counter({did: 1}) if status == 200 else Counter()
    return made


def one_mix(**changes: Any) -> dict[str, Any]:
    """Figures of a server that keeps every promise, but for `changes` of the burst."""
    rates = []
    for factor in RATES:
        rate = 10 * factor
        shed = {"level": 2, "did": "partial/brownout"} if factor > 1 else {}
        many = int(10 * min(rate, 12))
        taken = [outcome(9.8 * n / many, 100, **shed) for n in range(many)]
        refused = [outcome(n / 10, 3, 429) for n in range(int(10 * max(0.0, rate - 12)))]
        row = summary([*taken, *refused], 0.0, 10.0)
        counted = dict(row["answered"])
        rates.append(row | {"factor": factor, "rate": rate, "seconds": 10.0, "counted": counted, "level_told": True,
                            "level_zero_s": 1.0, "stolen_cores": 0.1,
                            "livez_ms": {**spread([1.0]), "failed": 0}})  # fmt: skip
    rates[-1] |= changes
    steps = [{"clients": 1, "requests_per_s": 10.0, "good_per_s": 10.0, "refused": 0, "browned_out": 0}]
    limit = {"per_s": 10.0, "clients": 1, "service_ms": 100.0, "steps": steps}
    return {"mix": {"images": [8, 8], "classes": 10}, "capacity": limit, "rates": rates, "after": rates[0]}


def failed(lines: list[dict[str, Any]]) -> list[str]:
    return [line["criterion"] for line in lines if line["passed"] is False]


def test_a_server_that_keeps_its_promises_passes() -> None:
    assert failed(verdict(one_mix(), 4.0)) == []


@pytest.mark.parametrize(
    ("changes", "criterion"),
    [
        ({"goodput": 7.0}, "goodput at 3 C"),
        ({"latency_ms": spread([5000.0])}, "accepted p99 at 3 C"),
        ({"reject_ms": {"count": 5, **spread([51.0])}}, "99 % of rejects within 50 ms"),
        ({"completed_share": 1.0}, "adaptation is shed before"),
        ({"level_zero_s": None}, "level 0 within 5 s"),
        ({"level_zero_s": 5.1}, "level 0 within 5 s"),
        ({"answered": {"200": 120, "429": 179, "500": 1}}, "no 5xx"),
        ({"answered": {"200": 120, "429": 179}}, "sent = answered + cancelled"),
        ({"counted": {"200": 120, "429": 179}}, "the server counted the same"),
    ],
)
def test_every_broken_promise_fails_its_criterion(changes: dict[str, Any], criterion: str) -> None:
    assert any(name.startswith(criterion) for name in failed(verdict(one_mix(**changes), 4.0)))


def test_refusals_and_long_tails_below_capacity_fail() -> None:
    found = one_mix()
    answered = {"200": 80, "429": 10}
    tail = spread([100.0] * 98 + [500.0] * 2)
    found["rates"][1] |= {"answered": answered, "counted": answered, "latency_ms": tail}
    assert failed(verdict(found, 4.0)) == ["no 429 up to 0.9 C", "p99 at most 4 x p50 up to 0.9 C"]


def test_p99_that_does_not_come_back_after_the_burst_fails() -> None:
    found = one_mix()
    found["after"] = found["after"] | {"latency_ms": spread([151.0])}
    assert failed(verdict(found, 4.0)) == ["p99 at 0.5 C after the burst at most 1.5 x that before"]
    found["after"] = found["after"] | {"latency_ms": spread([])}
    assert failed(verdict(found, 4.0)) == []


def test_a_level_that_returns_after_zero_is_not_over() -> None:
    def readings(*levels: int | None) -> list[Outcome]:
        return [Outcome("metrics", n, done=float(n), level=level) for n, level in enumerate(levels)]

    assert level_zero_s(readings(0, 0, 0), 1.5) == (True, 0.0)
    assert level_zero_s(readings(3, 3, 0, 1, 0), 1.5) == (True, 2.5)
    assert level_zero_s(readings(3, 3, 3, 3), 1.5) == (True, None)
    assert level_zero_s(readings(None, None), 1.5)[0] is False


def one_soak() -> dict[str, Any]:
    rest = {"descriptors": 14, "threads": 14, "device_bytes": None}
    samples = [(float(t), 900.0 - 50 * (t < 9) + t % 3) for t in range(100)]
    flat = memory(samples, [t / 10 for t in range(1000)], 10.0)
    return {
        "machine": "a machine", "date": "2026-01-01", "commit": "abc", "torch": "2", "model": "m", "clients": 4,
        "default_method": "gram", "requests": 1000, "seconds": 100.0, "ends": {"answered": 990, "cancelled": 10},
        "flags": [], "lost": 0, "memory": flat, "at_rest": [rest, dict(rest)], "text_cache_bytes": 10.0,
        "text_cache_bound": 20, "weights_intact": 1.0, "replays": {"equal": 3}, "unexpected": {},
        "class_sets": "skipped", "answers": {"good: 200": 980, "bad: a URL: 422": 10},
        "device": "cpu", "dtype": "float32", "replay_every": 100,
    }  # fmt: skip


def test_flat_memory_passes_whatever_the_warm_up_held() -> None:
    report = one_soak()
    assert abs(report["memory"]["slope_mib_per_million"][0]) < 1
    assert failed(soak_verdict(report)) == []


def test_the_slope_leaves_the_warm_up_out() -> None:
    growing = [(float(t), 900.0 + min(t, 50)) for t in range(100)]
    times = [t / 10 for t in range(1000)]
    assert memory(growing, times, 50.0)["slope_mib_per_million"][0] == 0
    assert memory(growing, times, 0.0)["slope_mib_per_million"][0] > 0


def test_a_leak_is_seen_whatever_the_noise() -> None:
    samples = [(float(t), 900.0 + 0.1 * t + t % 3) for t in range(100)]
    flat = memory(samples, [t / 10 for t in range(1000)], 10.0)  # 10 MiB per 1000 requests
    assert flat["slope_mib_per_million"][0] == pytest.approx(10_000, rel=0.2)
    assert len(flat["curve"]) == 60
    assert failed(soak_verdict({**one_soak(), "memory": flat})) == [
        "memory grows by less than 64 MiB per million requests"
    ]


@pytest.mark.parametrize(
    ("changes", "criterion"),
    [
        ({"text_cache_bytes": 21.0}, "text cache"),
        ({"weights_intact": 0.0}, "weights intact"),
        ({"replays": {"equal": 5, "different": 1}}, "replayed answers"),
        ({"unexpected": {"good: 500": 1}}, "every answer"),
        ({"lost": 1}, "nothing lost"),
        ({"at_rest": [{"descriptors": 14, "threads": 14, "device_bytes": None},
                      {"descriptors": 15, "threads": 14, "device_bytes": None}]}, "descriptors"),
    ],
)  # fmt: skip
def test_every_broken_promise_of_a_soak_fails_its_criterion(changes: dict[str, Any], criterion: str) -> None:
    assert [name.startswith(criterion) for name in failed(soak_verdict({**one_soak(), **changes}))] == [True]


def test_an_answer_that_is_not_the_documented_one_is_told() -> None:
    tally = Tally()
    for status in (200, 429, 500):
        tally.add(Outcome("good", 0, end="answered", status=status, expected=status == 200))
    assert dict(tally.unexpected) == {("good", 500): 1}


# ---- the record ----


def test_the_record_says_what_failed_and_what_could_not_be_asked() -> None:
    found = one_mix(goodput=7.0)
    report = {**one_soak(), "seconds": 60.0, "queue_seconds": 4.0, "percentiles": "nearest rank", "image": "JPEG"}
    report["mixes"] = {"default": {**found, "verdict": verdict(found, 4.0)}}
    text = "\n".join(results.load(report))
    assert "| goodput at 3 C at least 90 % of peak | 0.583 | **not met** |" in text
    assert "| 3.0 x 10.0 | 300 = 120 x 200, 180 x 429 + 0 | 7.00 |" in text
    report = {**one_soak(), "weights_intact": None}
    text = "\n".join(results.soak({**report, "verdict": soak_verdict(report)}))
    assert "| weights intact |  | not decided |" in text
    assert json.dumps(report)


def test_the_record_gives_every_ratio_its_interval() -> None:
    block = {"per_s": 1.0, "p50_ms": 2.0, "requests_per_run": 1.0}
    row = {
        "mode": "tpt",
        "clients": 8,
        "ratio": 2.0,
        "low": 1.5,
        "high": 2.5,
        "coverage": 0.969,
        "one": block,
        "batched": block,
    }
    text = "\n".join(
        results.batching({**one_soak(), "rows": [row], "missing": [], "block_seconds": 5, "flags": {"batched": []}})
    )
    assert "2.00 [1.50, 2.50]" in text
