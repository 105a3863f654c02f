"""The Prometheus metrics of one app, in a registry of its own.

Label values come from closed sets, never from a caller's text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from gram_core.types import Answer, ModelInfo

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = tuple(0.001 * 1.5**n for n in range(35))
COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
COSTS = tuple(4.0**n for n in range(9))
NATS = (-8, -4, -2, -1, -0.5, -0.25, -0.1, -0.01, 0, 0.01, 0.1, 0.25, 0.5, 1, 2, 4, 8)
RATIOS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
PIXELS = tuple(1000.0 * 4**n for n in range(9))


class Metrics:
    """One attribute per metric; `ran` records a batch, `observe` what became of an answered request."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gram_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"gram_{name}", text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests_total", "Requests; code 499: the client left.", "route", "code")
        self.request_seconds = histogram(
            "request_duration_seconds", "From the first byte to the last.", SECONDS, "route"
        )
        self.stage_seconds = histogram("stage_duration_seconds", "Where the time went.", SECONDS, "stage")
        self.rejected = counter("rejected_total", "Requests refused for load or time.", "reason")
        self.disconnects = counter("client_disconnects_total", "Clients that left.", "stage")
        self.batch_images = histogram("batch_images", "Images in one run of the classifier.", COUNTS)
        self.batch_cost = histogram("batch_cost", "Cost of one run of the classifier.", COSTS)
        self.batch_wait = histogram("batch_wait_seconds", "From submission until its batch began.", SECONDS)
        self.pace = histogram("cost_model_ratio", "Measured over predicted seconds of a batch's adaptation.", RATIOS)
        self.images = counter("images_total", "Images classified.")
        self.batches = counter("batches_total", "Runs of the classifier.")
        self.image_passes = counter("image_passes_total", "Images through the image tower, views included.")
        self.text_passes = counter("text_passes_total", "Texts through the text tower, gradients included.")
        self.decodes = counter("image_decode_total", "Images decoded or refused.", "format", "result")
        self.pixels = histogram("image_pixels", "Pixels of the images accepted.", PIXELS)
        self.text_cache = counter("text_cache_requests_total", "Class sets looked up.", "result")
        self.adaptation = counter(
            "adaptation_total", "Images by what adaptation did.", "method", "scope", "status", "reason"
        )
        self.adaptation_steps = histogram("adaptation_steps", "Steps taken.", COUNTS, "method")
        self.adaptation_views = histogram("adaptation_views", "Views used.", COUNTS, "method")
        self.adaptation_seconds = histogram("adaptation_duration_seconds", "Tuning time.", SECONDS, "method")
        self.entropy_delta = histogram("adaptation_entropy_delta", "Entropy after minus before, nats.", NATS, "method")
        self.kl = histogram("adaptation_kl", "KL(adapted || baseline), nats.", NATS, "method")
        self.label_changed = counter("adaptation_label_changed_total", "Labels that moved.", "method")
        self.out_of_memory = counter("out_of_memory_total", "Runs without enough memory.", "recovered")
        self._memory_seen = {True: 0, False: 0}
        self.device_memory = Gauge("gram_device_memory_bytes", "On the device.", ["kind"], registry=registry)
        self.session_evictions = counter("session_evictions_total", "Sessions that ended.", "reason")
        self.text_cache_bytes = Gauge(
            "gram_text_cache_bytes", "Tokens and features of classes kept.", registry=registry
        )
        self.loop_lag = Gauge("gram_event_loop_lag_seconds", "How late the event loop was.", registry=registry)
        self.inflight = Gauge("gram_requests_inflight", "Requests being served.", registry=registry)
        self.startup_seconds = Gauge("gram_startup_seconds", "Start-up phases.", ["phase"], registry=registry)
        labels = ["version", "model", "weights", "checkpoint", "device", "dtype"]
        self.info = Gauge("gram_info", "What is served.", labels, registry=registry)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read when scraped."""
        Gauge(f"gram_{name}", text, registry=self.registry).set_function(read)

    def ran(self, answers: Sequence[Answer], cost: float, waited_ms: Sequence[float], predicted_s: float) -> None:
        """Count one run of the classifier."""
        self.batches.inc()
        images = sum(len(answer.results) for answer in answers)
        self.images.inc(images)
        self.batch_images.observe(images)
        self.batch_cost.observe(cost)
        for ms in waited_ms:
            self.batch_wait.observe(ms / 1000)
        for answer in answers:
            self.image_passes.inc(answer.image_passes)
            self.text_passes.inc(answer.text_passes)
        measured_s = answers[0].timings_ms.get("adapt", 0.0) / 1000 if answers else 0.0
        whole = all(r.adaptation.status != "partial" for answer in answers for r in answer.results)
        if predicted_s > 0 and measured_s > 0 and whole:
            self.pace.observe(measured_s / predicted_s)

    def memory(self, ran_out: Mapping[bool, int], held: Mapping[str, float]) -> None:
        """How often memory ran out since the last call, and what is held now, by kind."""
        for recovered, times in ran_out.items():
            self.out_of_memory.labels(str(recovered).lower()).inc(times - self._memory_seen[recovered])
            self._memory_seen[recovered] = times
        for kind, size in held.items():
            if kind == "text_cache":
                self.text_cache_bytes.set(size)
            else:
                self.device_memory.labels(kind).set(size)

    def observe(self, answers: Sequence[Answer], stages_ms: Mapping[str, float]) -> None:
        """Count one answered request and the adaptation of each of its images."""
        for answer in answers:
            self.text_cache.labels(answer.text_cache).inc()
        for stage, ms in stages_ms.items():
            self.stage_seconds.labels(stage).observe(ms / 1000)
        for result in (result for answer in answers for result in answer.results):
            did = result.adaptation
            self.adaptation.labels(did.method, did.scope, did.status, did.reason or "").inc()
            self.adaptation_steps.labels(did.method).observe(did.steps)
            self.adaptation_views.labels(did.method).observe(did.views)
            self.adaptation_seconds.labels(did.method).observe(did.ms / 1000)
            self.entropy_delta.labels(did.method).observe(did.entropy_after - did.entropy_before)
            self.kl.labels(did.method).observe(did.kl)
            self.label_changed.labels(did.method).inc(int(did.label_changed))  # also by 0: a rate needs the series

    def serving(self, version: str, model: ModelInfo) -> None:
        """Say which model is loaded."""
        weights, checkpoint = model.weights_sha256[:12], (model.checkpoint_sha256 or "none")[:12]
        self.info.labels(version, model.name, weights, checkpoint, model.device, model.dtype).set(1)

    def render(self) -> bytes:
        """The text that `/metrics` answers."""
        return generate_latest(self.registry)
