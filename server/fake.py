"""A classifier without a model, for testing clients and the server itself.

Its scores are made from the bytes of the image and the name of the class, so an answer that reaches the
wrong caller is a wrong answer. It is never used unless it is passed to `create_app`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gram_core.errors import DeviceError, InvalidClasses, InvalidMemory, MethodUnavailable, OutOfMemory
from gram_core.images import DecodedImage
from gram_core.types import (
    Adaptation,
    Answer,
    Explanation,
    FloatArray,
    ImageResult,
    ModelInfo,
    Plan,
    PrototypeSeen,
    Tuning,
    ViewSeen,
    Work,
)

SCALE = 10.0
CONTEXT = 77
BATCH_FROM = 8


@dataclass(frozen=True)
class FakePrepared:
    """What the fake keeps of an image."""

    sha256: bytes
    width: int
    height: int
    format: str
    notes: tuple[str, ...]
    nbytes: int = 0


@dataclass(frozen=True)
class FakeClassSet:
    """Names and an id."""

    names: tuple[str, ...]
    id: str
    spoken: tuple[str, ...] = ()

    @property
    def texts(self) -> int:
        """One for each name."""
        return len(self.names)

    @property
    def tokens(self) -> int:
        """One for each word."""
        return sum(len(text.split()) for text in self.spoken)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class FakeSeen:
    """What a fake session keeps of images: their hashes."""

    sha256: tuple[bytes, ...]
    views: int


class FakeMemory:
    """The interface of `gram_core.memory.Memory`, first come, first kept."""

    def __init__(self, classes: int, capacity: int, views: int) -> None:
        self.classes, self.capacity, self.views = classes, capacity, views
        self.kept: list[tuple[bytes, int]] = []
        self.quota, self.drift = capacity, None

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 32 * len(self)

    @property
    def most_bytes(self) -> int:
        """As many as a real one would hold."""
        return self.capacity * self.views * 4 * 8

    @property
    def counts(self) -> list[int]:
        """Images by class."""
        return [sum(label == c for _, label in self.kept) for c in range(self.classes)]

    @property
    def digest(self) -> bytes:
        """Tells what is held."""
        return hashlib.sha256(b"".join(sorted(sha for sha, _ in self.kept))).digest()

    def snapshot(self) -> FakeSeen:
        """What is held now."""
        return FakeSeen(tuple(sha for sha, _ in self.kept), self.views)

    def add(self, views: int, sha256: Sequence[bytes], labels: Sequence[int]) -> int:
        """Keep what is new, while there is room."""
        before = len(self)
        for sha, label in zip(sha256, labels, strict=True):
            if views == self.views and len(self) < self.capacity and sha not in {held for held, _ in self.kept}:
                self.kept.append((sha, label))
        return len(self) - before

    def clear(self) -> None:
        """Forget all."""
        self.kept.clear()

    def dump(self, bound: dict[str, str]) -> bytes:
        """As JSON."""
        kept = [[sha.hex(), label] for sha, label in self.kept]
        whole = {"size": [self.classes, self.capacity, self.views], "kept": kept, "bound": bound}
        return json.dumps(whole).encode()


def _vectors(digests: Iterable[bytes]) -> FloatArray:
    """Unit vectors (n, 8) made of digests."""
    rows = [[byte + 1 for byte in digest[:8]] for digest in digests]
    made = np.array(rows, dtype=np.float32).reshape(len(rows), 8)
    unit: FloatArray = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    return unit


def _texts(classes: FakeClassSet) -> FloatArray:
    return _vectors(hashlib.sha256(name.encode()).digest() for name in classes.spoken)


class FakeSentinel:
    """Nothing can change."""

    def check(self, pieces: int = 1) -> None:
        """Fine."""


class FakeClassifier:
    """The interface of `gram_core.classifier.Classifier`; subclass it to make it slow or to make it fail."""

    def __init__(self) -> None:
        self.sentinel = FakeSentinel()
        self.out_of_memory = {True: 0, False: 0}
        self.text_weight = 0.0
        self.info = ModelInfo(
            name="fake",
            weights_sha256=hashlib.sha256(b"fake").hexdigest(),
            fingerprint="fake",
            device="cpu",
            dtype="float32",
            image_size=32,
            joint_dim=8,
            context_length=CONTEXT,
            parameters=0,
            logit_scale=SCALE,
            text_path="fake",
            text_path_note=None,
            root=True,
            checkpoint_sha256=None,
            checkpoint_note="a fake has none",
            methods=("infomax", "tpt", "none"),
            hosts=("residual", "coop"),
            default_method="infomax",
            batch_from=BATCH_FROM,
            defaults={"infomax": {"steps": 20, "views": 8}, "tpt": {"steps": 1, "views": 64}},
            shapes={"image_chunk": 8},
            build="fake",
        )

    def prepare(self, image: DecodedImage) -> FakePrepared:
        """Keep the digest."""
        return FakePrepared(image.sha256, image.width, image.height, image.format, image.notes)

    def class_set(
        self, classes: Sequence[str] | Mapping[str, Sequence[str]], templates: Sequence[str] | None = None
    ) -> FakeClassSet:
        """Refuse what a real tower refuses; one word counts as one token."""
        for index, template in enumerate(templates or ()):
            if template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
                message = f"template {index} must hold exactly one {{}} and no other brace."
                raise InvalidClasses(message, code="bad_template", index=index)
        for index, name in enumerate(classes):
            if (tokens := len(name.split())) > CONTEXT:
                message = f"class {index} needs {tokens} tokens, the text tower has {CONTEXT}."
                raise InvalidClasses(message, code="class_text_too_long", index=index)
        names = tuple(classes)
        spoken = tuple(" ".join(own) for own in classes.values()) if isinstance(classes, Mapping) else names
        identity = "cs_" + hashlib.sha256(repr((names, spoken, templates)).encode()).hexdigest()[:32]
        return FakeClassSet(names, identity, spoken)

    def plan(self, tuning: Tuning, images: int, classes: FakeClassSet) -> Plan:
        """The same resolution as the real one's, in short."""
        method = tuning.method or self.info.default_method
        if method not in self.info.methods:
            raise MethodUnavailable(f"this model has {', '.join(self.info.methods)} only.")
        scope = "batch" if method == "infomax" else "image"
        if tuning.scope not in ("auto", scope) and method != "none":
            raise MethodUnavailable(f"method {method} has scope {scope} only.")
        plan = Plan(method=method, host=None, scope=scope, steps=0, views=1, seed=tuning.seed)
        if method == "none":
            return replace(plan, skip="none_requested")
        defaults = self.info.defaults[method]
        plan = replace(
            plan,
            host=tuning.host or "residual",
            steps=int(defaults["steps"]) if tuning.steps is None else tuning.steps,
            views=int(defaults["views"]) if tuning.views is None else tuning.views,
        )
        if len(classes) == 1:
            return replace(plan, skip="single_class")
        if scope == "batch" and images < BATCH_FROM:
            return replace(plan, skip="too_few_images")
        return plan

    def cost(self, plan: Plan, images: int, classes: FakeClassSet) -> float:
        """Images times views; texts are free."""
        return float(images * (1 if plan.skip else 1 + plan.views) + 0 * len(classes))

    def seconds(self, plan: Plan, images: int, classes: FakeClassSet) -> float:
        """Nothing takes time here."""
        return 0.0 * len(classes) * images * plan.views

    def fit(self, plan: Plan, images: int, classes: FakeClassSet, budget_s: float, why: str) -> Plan:
        """Whatever takes no time fits into any."""
        fits = budget_s > self.seconds(plan, images, classes)
        return plan if fits or plan.skip is not None else replace(plan, skip=why)

    def memory(self) -> dict[str, float]:
        """No device."""
        return {}

    def warm(self, class_set: str) -> bool:
        """Nothing is ever computed."""
        return bool(class_set)

    def session(self, classes: FakeClassSet, capacity: int, views: int) -> FakeMemory:
        """An empty memory."""
        return FakeMemory(len(classes), capacity, views)

    def restored(self, data: bytes) -> tuple[FakeMemory, dict[str, str]]:
        """What `dump` wrote."""
        try:
            whole = json.loads(data)
            made = FakeMemory(*whole["size"])
            made.kept = [(bytes.fromhex(sha), label) for sha, label in whole["kept"]]
            bound: dict[str, str] = whole["bound"]
        except (ValueError, KeyError, TypeError):
            raise InvalidMemory("this is no session that this server exported.") from None
        return made, bound

    def run(self, works: Sequence[Work]) -> list[Answer | Exception]:
        """`classify` for each; what goes wrong with one is that one's outcome."""
        made: list[Answer | Exception] = []
        for work in works:
            try:
                answer = self.classify(work.images, work.classes, work.plan, explain=work.explain)
                if work.memory is not None and work.plan.views > 1:
                    answer = replace(answer, seen=FakeSeen(tuple(i.sha256 for i in work.images), work.plan.views))
                if work.features:
                    answer = replace(answer, features=(_vectors(i.sha256 for i in work.images), _texts(work.classes)))
                made.append(answer)
            except DeviceError:
                raise
            except Exception as error:
                self.out_of_memory[False] += isinstance(error, OutOfMemory)
                made.append(error)
        return made

    def classify(
        self, images: Sequence[FakePrepared], classes: FakeClassSet, plan: Plan, *, explain: bool = False
    ) -> Answer:
        """Scores from digests; adaptation doubles them."""
        started = time.perf_counter()
        results = tuple(self._result(image, classes, plan) for image in images)
        if explain:
            told = (self._explanation(image, plan) for image in images)
            results = tuple(replace(r, explanation=why) for r, why in zip(results, told, strict=True))
        ms = (time.perf_counter() - started) * 1000
        return Answer(results, "miss", len(images), len(classes), {"text": 0.0, "image": ms, "adapt": 0.0})

    def warm_up(self) -> None:
        """Nothing to warm."""

    def _explanation(self, image: FakePrepared, plan: Plan) -> Explanation:
        views = tuple(
            ViewSeen((v, 0, 8, 8) if v else None, v % 2 == 1, 1.0, v == 0) for v in range(min(plan.views, 64))
        )
        near = PrototypeSeen(f"thing {image.sha256[0]}", 1.0)
        return Explanation(views=views, prototypes=(near,), shift=0.5, rho=None if plan.skip else 0.1)

    def _result(self, image: FakePrepared, classes: FakeClassSet, plan: Plan) -> ImageResult:
        digests = [hashlib.sha256(image.sha256 + name.encode()).digest() for name in classes.names]
        cosines: FloatArray = np.array([digest[0] / 512 for digest in digests], dtype=np.float32)
        tuned = cosines if plan.skip else (cosines * 2).astype(np.float32)
        adaptation = Adaptation(
            method=plan.method,
            host=plan.host,
            scope=plan.scope,
            status="skipped" if plan.skip else ("partial" if plan.shed else "completed"),
            reason=plan.skip or plan.shed,
            steps=0 if plan.skip else plan.steps,
            steps_requested=plan.steps_requested,
            views=1 if plan.skip else plan.views,
            views_requested=plan.views_requested,
            views_kept=1,
            entropy_before=1.0,
            entropy_after=1.0 if plan.skip else 0.5,
            kl=0.0 if plan.skip else 0.1,
            label_changed=False,
            accepted=plan.skip is None,
            temperature=1.0,
            ms=0.0,
            digest="sha256:" + hashlib.sha256(tuned.tobytes()).hexdigest(),
        )
        return ImageResult(tuned, cosines, SCALE, adaptation)
