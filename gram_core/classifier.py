"""What the server holds: towers, texts and hosts behind one call, `classify`.

Immutable after `load` (caches apart) and free of HTTP. One engine thread calls `classify`; `prepare`, `class_set`,
`plan` and `cost` may be called from any thread. Zero-shot is always computed first and is the answer whenever tuning
is not asked for, not supported by the evidence, or not trusted (`docs/method.md`, "do no harm").
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gram_core import backbone as towers
from gram_core import baselines, gram, objectives, views
from gram_core.adapt import UPDATES, Regulate, identity
from gram_core.backbone import Backbone, file_sha256
from gram_core.checkpoint import Checkpoint, load_checkpoint
from gram_core.errors import (
    DeviceError,
    FingerprintMismatch,
    InvalidCheckpoint,
    InvalidTuning,
    MethodUnavailable,
    OutOfMemory,
)
from gram_core.gram import Structure
from gram_core.images import DecodedImage
from gram_core.prompts import METHODS, PromptMethod
from gram_core.text import ClassSet, TextEncoder
from gram_core.types import (
    Adaptation,
    Answer,
    Explanation,
    FloatArray,
    ImageResult,
    ModelInfo,
    Params,
    Plan,
    PrototypeSeen,
    Tuning,
    ViewSeen,
)
from gram_core.views import Prepared
from prototypes.bank import PrototypeBank, load_bank, load_root
from prototypes.hierarchy import CONCEPT, MODE

BATCH_FROM = 8  # images from which a joint tuning is trusted (method.md section 8)
ENTROPY_SLACK = 0.01  # nats by which tuning may raise the entropy it is meant to lower
TOLD_VIEWS, TOLD_PROTOTYPES = 64, 5  # of an explanation, so that it stays within 8 KiB


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How a method steps and sees: one configuration for all data."""

    steps: int
    views: int
    lr: Mapping[str, float]
    update: str
    view_scale: tuple[float, float]
    keep: float = 1.0
    root: bool = True  # rehearsed in the joint loss


# Chosen on the choosing sets (benchmarks/RESULTS.md): mild crops, small steps; strong crops and 1e-3 lost on CIFAR-10.
INFOMAX = TuneConfig(steps=20, views=8, lr={"residual": 2e-4, "coop": 2e-3}, update="rms", view_scale=(0.85, 1.0))
TPT = TuneConfig(
    steps=1, views=64, lr={"coop": 5e-3, "residual": 1e-3}, update="sign", view_scale=(0.08, 1.0), keep=0.1
)


@dataclass(frozen=True, eq=False)
class Seen:
    """Frozen features of B images: `views` (B, V, D) with the original first, the images' hashes, and the
    milliseconds that cutting their crops took (on a CUDA device: that starting to cut them took)."""

    views: Tensor
    sha256: tuple[bytes, ...]
    cut_ms: float = 0.0

    @property
    def originals(self) -> Tensor:
        """(B, D)."""
        return self.views[:, 0]


@dataclass(frozen=True, eq=False)
class _Tuned:
    """Outcome of one tuning over n images; `logits` (n, K) before the temperature, `accepted` (n,)."""

    logits: Tensor
    accepted: Tensor
    reason: str | None
    kept: int
    temperature: float
    ms: float
    chosen: frozenset[int] | None = None
    variables: Params | None = None
    rho: float | None = None
    trust: float | None = None
    skew: float | None = None
    share: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Learned:
    """What meta-training left: weights, and the prototypes they were learned with."""

    checkpoint: Checkpoint
    bank: PrototypeBank


class Classifier:
    """Frozen towers, class texts and hosts; `classify` answers before and after.

    `learned` makes the method gram; without it `note` says why. Args of `load`: see `gram_core.backbone.load`;
    `text_cache_bytes` bounds the cache of class features, `kl_cap` is the KL (nats) from zero-shot beyond which a
    tuned answer is discarded; `default_*` override the method's own defaults for callers that leave them open.
    """

    def __init__(
        self,
        backbone: Backbone,
        root: FloatArray | None = None,
        *,
        learned: Learned | None = None,
        note: str | None = None,
        text_cache_bytes: int = 2**28,
        kl_cap: float = 5.0,
        default_method: str = "auto",
        default_steps: int | None = None,
        default_views: int | None = None,
        default_batch_views: int | None = None,
        infomax: TuneConfig = INFOMAX,
        tpt: TuneConfig = TPT,
    ) -> None:
        self.backbone = backbone
        self.texts = TextEncoder(backbone, text_cache_bytes)
        self.kl_cap = kl_cap
        self.text_weight = 1.0
        hosts = {name: make for name, make in METHODS.items() if make.why_not(self.texts) is None}
        self.hosts: dict[str, PromptMethod] = {name: make(self.texts) for name, make in hosts.items()}
        self.kept: dict[str, Params] = {name: host.init() for name, host in self.hosts.items()}
        self.root = None if root is None else torch.from_numpy(root).to(backbone.device)
        self.configs = {
            "infomax": replace(
                infomax,
                steps=infomax.steps if default_steps is None else default_steps,
                views=default_batch_views or infomax.views,
            ),
            "tpt": replace(tpt, views=default_views or tpt.views),
        }
        if learned is not None and root is None:
            learned, note = None, "this model has no root prototype, which gram's joint tuning rehearses"
        self.learned = learned
        self.controls: dict[str, Classifier] = {}  # variants that the harness has asked for
        if learned is not None:
            own = _config_of(learned.checkpoint)
            self.configs["gram"] = replace(
                own,
                steps=own.steps if default_steps is None else default_steps,
                views=default_batch_views or own.views,
            )
            self.weights = {name: w.to(backbone.device) for name, w in learned.checkpoint.params.items()}
            kind = str(learned.checkpoint.settings.get("prototypes", "real"))
            self.structure = Structure.of(learned.bank, backbone.device).control(kind)
        methods = (
            (("gram",) if learned is not None else ()) + (("infomax",) if root is not None else ()) + ("tpt", "none")
        )
        if default_method == "auto":
            default_method = methods[0]
        if default_method not in methods:
            raise MethodUnavailable(
                self._no_method(default_method, methods, note or "no GRAM checkpoint lies beside this model")
            )
        self.info = ModelInfo(
            name=backbone.name,
            weights_sha256=backbone.weights_sha256,
            fingerprint=backbone.fingerprint,
            device=str(backbone.device),
            dtype=str(backbone.dtype).removeprefix("torch."),
            image_size=backbone.image_size,
            joint_dim=backbone.joint_dim,
            context_length=backbone.context_length,
            parameters=backbone.parameters,
            logit_scale=backbone.logit_scale,
            text_path=backbone.text_path,
            text_path_note=backbone.text_note,
            root=root is not None,
            checkpoint_sha256=None if learned is None else learned.checkpoint.sha256,
            checkpoint_note=None if learned is not None else note or "no GRAM checkpoint lies beside this model",
            methods=methods,
            hosts=tuple(self.hosts),
            default_method=default_method,
            batch_from=BATCH_FROM,
            defaults={
                name: {
                    "host": self._default_host(name),
                    "scope": "image" if name == "tpt" else "batch",
                    "steps": config.steps,
                    "views": config.views,
                    "lr": config.lr[self._default_host(name)],
                }
                for name, config in self.configs.items()
                if name in methods
            },
            shapes={"image_chunk": backbone.image_chunk, "view_chunk": backbone.view_chunk},
        )

    @classmethod
    def load(
        cls,
        model: str = "gram-mini",
        *,
        device: str = "auto",
        precision: str = "auto",
        model_dir: Path | None = None,
        weights_sha256: str | None = None,
        checkpoint: Path | None = None,
        **options: Any,
    ) -> Classifier:
        """Load a model from disk, with the root prototype and the GRAM checkpoint and bank beside its weights, if any.

        `checkpoint` names another folder for the last two. A model without a root takes the bank's own, as training
        does. Raises ModelUnavailable, UnsupportedTower, FingerprintMismatch when root, checkpoint or bank belong to
        other weights, InvalidCheckpoint when one is damaged, or when the folder named has none.
        """
        backbone = towers.load(
            model, device=device, precision=precision, model_dir=model_dir, weights_sha256=weights_sha256
        )
        try:
            root = load_root(towers.locate(model, model_dir).folder, fingerprint=backbone.fingerprint)
        except ValueError as error:
            raise FingerprintMismatch(
                f"the root prototype beside model {backbone.name!r} can't be used: {error}"
            ) from error
        if root is not None and root.visual.shape != (backbone.joint_dim,):
            raise FingerprintMismatch(
                f"the root prototype has {root.visual.shape[0]} dimensions, the model {backbone.joint_dim}; rebuild it."
            )
        learned, note = load_learned(checkpoint or towers.locate(model, model_dir).folder, backbone.fingerprint)
        if checkpoint is not None and learned is None:
            raise InvalidCheckpoint(f"{checkpoint} holds no GRAM checkpoint. Name the folder that training wrote.")
        if root is None and learned is not None:
            root = learned.bank.root
        return cls(backbone, None if root is None else root.visual, learned=learned, note=note, **options)

    def variant(self, learned: Learned, structure: Structure | None = None) -> Classifier:
        """The same towers and texts with other weights, or other prototypes at test time: what an ablation needs."""
        made = Classifier(
            self.backbone,
            None if self.root is None else self.root.cpu().numpy(),
            learned=learned,
            kl_cap=self.kl_cap,
            infomax=self.configs["infomax"],
            tpt=self.configs["tpt"],
        )
        made.texts, made.hosts, made.kept = self.texts, self.hosts, self.kept
        if structure is not None:
            made.structure = structure
        return made

    # ---- any thread ----

    def prepare(self, image: DecodedImage) -> Prepared:
        """Preprocess one decoded image on the CPU."""
        return views.prepare(self.backbone, image)

    def class_set(
        self, classes: Sequence[str] | Mapping[str, Sequence[str]], templates: Sequence[str] | None = None
    ) -> ClassSet:
        """Check and tokenize classes; see `TextEncoder.class_set`."""
        return self.texts.class_set(classes, templates)

    def plan(self, tuning: Tuning, images: int, classes: ClassSet) -> Plan:
        """Fill in every default, and say beforehand when nothing will be tuned.

        Raises MethodUnavailable or InvalidTuning.
        """
        method = tuning.method or self.info.default_method
        if tuning.method is None and method == "gram" and tuning.host not in (None, self._default_host("gram")):
            method = "infomax"  # the checkpoint was learned for its own host alone
        if tuning.method is None and tuning.scope == "image" and method == "infomax":  # gram has that scope
            method = "tpt"  # one image carries no joint direction
        if method not in self.info.methods:
            raise MethodUnavailable(self._no_method(method, self.info.methods, self.info.checkpoint_note))
        if tuning.scope not in ("auto", "image", "batch"):
            raise InvalidTuning("scope must be auto, image or batch.")
        plan = Plan(method=method, host=None, scope="image", steps=0, views=1, seed=tuning.seed)
        if method == "none":
            return replace(plan, skip="none_requested")
        wanted = "image" if method == "tpt" or (method, tuning.scope) == ("gram", "image") else "batch"
        if tuning.scope not in ("auto", wanted):
            raise MethodUnavailable(
                f"method {method} has scope {wanted} only; for scope {tuning.scope} choose "
                + (
                    "tpt."
                    if wanted == "batch"
                    else ("infomax." if self.info.root else "another model: this one has no root prototype.")
                )
            )
        config = self.configs[method]
        host = tuning.host or self._default_host(method)
        if method == "gram" and host in self.hosts and host != self._default_host(method):
            raise MethodUnavailable(
                f"gram was learned for host {self._default_host(method)}; leave host out, or choose infomax."
            )
        if host not in self.hosts:
            reason = METHODS[host].why_not(self.texts) if host in METHODS else None
            raise MethodUnavailable(
                f"host {host!r} can't run on this model: {reason}."
                if reason
                else f"no such host; choose {', '.join(self.hosts)}."
            )
        plan = replace(
            plan,
            host=host,
            scope=wanted,
            steps=config.steps if tuning.steps is None else tuning.steps,
            views=config.views if tuning.views is None else tuning.views,
        )
        if plan.steps < 0 or plan.views < 1:
            raise InvalidTuning("steps must be at least 0 and views at least 1.")
        if len(classes) == 1:
            return replace(plan, skip="single_class")
        least = BATCH_FROM if tuning.scope == "auto" else 2
        if wanted == "batch" and images < least:
            return replace(plan, skip="too_few_images")
        return plan

    def cost(self, plan: Plan, images: int, classes: ClassSet) -> float:
        """Image-tower passes plus weighted text passes (api.md section 10)."""
        new_texts = 0 if self.texts.has(classes) else classes.texts
        if plan.skip:
            return images + self.text_weight * new_texts
        prompts = 0 if plan.host == "residual" else (images if plan.scope == "image" else 1)
        text = prompts * len(classes) * (2 * plan.steps + 1) + new_texts
        return images * plan.views + self.text_weight * text

    # ---- the engine thread ----

    def classify(self, images: Sequence[Prepared], classes: ClassSet, plan: Plan, *, explain: bool = False) -> Answer:
        """Zero-shot for every image, then the tuning that `plan` asks for; `explain` says why, per image.

        Answers come in the order of `images` and do not depend on it; in scope `image` they do not depend on the
        other images either. Raises OutOfMemory or DeviceError when not even zero-shot can be had.
        """
        with _device_errors(), torch.no_grad():
            clock = _Clock()
            cached = self.texts.has(classes)
            base = self.texts.features(classes)
            clock.lap("text")
            originals = self._original_features(images)
            cosines = self._cosines(originals, base)
            clock.lap("image")
            passes = len(images)
            views_ = originals[:, None]
            if not plan.skip:
                scale = self.configs[plan.method].view_scale
                views_ = self._view_features(images, originals, plan.views, plan.seed, scale)
                passes += len(images) * (plan.views - 1)
            seen = Seen(views_, tuple(i.sha256 for i in images))
            told = list(images) if explain else None
            results, text_passes = self._results(seen, cosines, classes, plan, told)
            clock.lap("adapt")
        text_passes += 0 if cached else classes.texts
        return Answer(tuple(results), "hit" if cached else "miss", passes, text_passes, clock.laps)

    def see(self, images: Sequence[Prepared], views: int, seed: int, scale: tuple[float, float]) -> Seen:
        """What the image tower says of `images`: one view is the original alone, the others are crops of `scale`.

        With a plan's views and seed and its method's scale, `answer` gives on it what `classify` gives on the images.
        """
        with _device_errors(), torch.no_grad():
            originals = self._original_features(images)
            clock = _Clock()
            seen = self._view_features(images, originals, views, seed, scale, clock)
            return Seen(seen, tuple(i.sha256 for i in images), clock.laps.get("cut", 0.0))

    def answer(self, seen: Seen, classes: ClassSet, plan: Plan) -> tuple[ImageResult, ...]:
        """`classify` on features that are there already, bit for bit."""
        with _device_errors(), torch.no_grad():
            cosines = self._cosines(seen.originals, self.texts.features(classes))
            return tuple(self._results(seen, cosines, classes, plan)[0])

    def warm_up(self) -> None:
        """One zero-shot forward and one tuning of every method, and the measured weight of a text pass."""
        classes = self.class_set(["cat", "dog", "car", "tree", "house", "person", "boat", "plate of food"])
        rng = np.random.default_rng(0)
        side = self.backbone.image_size
        images = [
            Prepared(
                torch.from_numpy(rng.standard_normal((3, side, side), dtype=np.float32)),
                torch.from_numpy(rng.integers(0, 255, (3, side, side), dtype=np.uint8)),
                rng.bytes(32),
                side,
                side,
                "png",
                (),
            )
            for _ in range(BATCH_FROM)
        ]
        self.classify(images, classes, self.plan(Tuning(method="none"), BATCH_FROM, classes))
        for method in self.info.methods:
            if method != "none":
                views_ = min(8, self.configs[method].views)
                plan = self.plan(Tuning(method=method, views=views_), BATCH_FROM, classes)
                self.classify(images, classes, plan)
        if self.learned is not None:  # noise is far from every prototype; these images are prototypes themselves
            near = self.structure.modes[torch.arange(BATCH_FROM) % len(self.structure.modes)]
            seen = Seen(near[:, None].expand(-1, 2, -1).contiguous(), tuple(i.sha256 for i in images))
            self.answer(seen, classes, self.plan(Tuning(method="gram", views=2), BATCH_FROM, classes))
        started = time.perf_counter()
        self.backbone.encode_images(torch.stack([i.original for i in images]))
        image_s = (time.perf_counter() - started) / len(images)
        fresh = self.class_set([f"thing {i}" for i in range(16)])
        started = time.perf_counter()
        self.texts.features(fresh)
        self.text_weight = (time.perf_counter() - started) / len(fresh) / max(image_s, 1e-9)

    # ---- inside ----

    def _default_host(self, method: str) -> str:
        if method == "gram" and self.learned is not None:
            return str(self.learned.checkpoint.settings["host"])
        return "coop" if method == "tpt" and "coop" in self.hosts else "residual"

    def _no_method(self, method: str, methods: tuple[str, ...], note: str | None = None) -> str:
        if method == "gram":
            return f"gram is not served: {note}; choose {', '.join(methods)}."
        if method == "infomax":
            return (
                "this model has no root prototype, which infomax needs to be safe on skewed batches; "
                "choose tpt or none."
            )
        return f"no such method on this model; choose {', '.join(methods)}."

    def _cosines(self, features: Tensor, base: Tensor) -> Tensor:
        """(B, K) in the fixed image shape, so that a row has the same bits whatever B is."""
        chunk = self.backbone.image_chunk
        rows = []
        for start in range(0, len(features), chunk):
            part = features[start : start + chunk]
            padded = torch.cat([part, part.new_zeros(chunk - len(part), part.shape[1])])
            rows.append((padded @ base.T)[: len(part)])
        return torch.cat(rows)

    def _plain(self, cosines: Tensor, plan: Plan) -> ImageResult:
        values = _array(cosines)
        entropy = float(objectives.entropy((cosines * self.backbone.logit_scale).softmax(-1)))
        report = Adaptation(
            method=plan.method,
            host=plan.host,
            scope=plan.scope,
            status="skipped",
            reason=plan.skip,
            steps=0,
            steps_requested=plan.steps,
            views=1,
            views_requested=plan.views,
            views_kept=1,
            entropy_before=entropy,
            entropy_after=entropy,
            kl=0.0,
            label_changed=False,
            accepted=False,
            temperature=1.0,
            ms=0.0,
            digest=_digest(values),
        )
        return ImageResult(values, values, self.backbone.logit_scale, report)

    def _results(
        self,
        seen: Seen,
        cosines: Tensor,
        classes: ClassSet,
        plan: Plan,
        told: list[Prepared] | None = None,
    ) -> tuple[list[ImageResult], int]:
        """One result per image, with reasons where the images are `told`, and the text passes that tuning took."""
        count = len(seen.views)
        if plan.skip:
            plain = [self._plain(cosines[n], plan) for n in range(count)]
            tuned: list[tuple[_Tuned | None, int]] = [(None, 0)] * count
            return self._explained(plain, tuned, seen, classes, plan, told), 0
        episodes = count if plan.scope == "image" else 1
        text_passes = episodes * len(classes) * (plan.steps + 1) if plan.host == "coop" else 0
        if plan.scope == "image":
            tune = self._tune_alone if plan.method == "gram" else self._tune_image
            rows = zip(seen.views, seen.originals, cosines, strict=True)
            tuned = [(tune(f, o, c, classes, plan), 0) for f, o, c in rows]
        else:
            order = sorted(range(count), key=lambda n: seen.sha256[n])
            index = torch.tensor(order, device=seen.originals.device)
            together = self._tune_gram if plan.method == "gram" else self._tune_batch
            batch = together(seen.views[index], seen.originals[index], cosines[index], classes, plan)
            place = {n: at for at, n in enumerate(order)}
            tuned = [(batch, place[n]) for n in range(count)]
        results = [self._result(cosines[n], own, row, plan) for n, (own, row) in enumerate(tuned) if own is not None]
        return self._explained(results, tuned, seen, classes, plan, told), text_passes

    def _original_features(self, images: Sequence[Prepared]) -> Tensor:
        """(B, D) features of the originals."""
        return self.backbone.encode_images(torch.stack([i.original for i in images]))

    def _view_features(
        self,
        images: Sequence[Prepared],
        originals: Tensor,
        count: int,
        seed: int,
        scale: tuple[float, float],
        clock: _Clock | None = None,
    ) -> Tensor:
        """(B, V, D): for each image the original's feature, then those of its crops.

        Crops of several images share a pass of the tower; a row's value does not depend on its neighbours there.
        """
        if count == 1:
            return originals[:, None]
        chunk = self.backbone.view_chunk
        features: list[Tensor] = []
        waiting: list[Tensor] = []
        held = 0
        for image in images:
            size = (int(image.pixels.shape[1]), int(image.pixels.shape[2]))
            crops = views.boxes(image.sha256, size, count, seed, scale)
            started = time.perf_counter()
            waiting.append(views.cut(self.backbone, image, crops))
            if clock is not None:
                clock.laps["cut"] = clock.laps.get("cut", 0.0) + (time.perf_counter() - started) * 1000
            held += len(crops)
            if held >= 8 * chunk:  # bounds the pixels held, whatever is asked for
                pixels = torch.cat(waiting)
                full = held - held % chunk
                features.append(self.backbone.encode_images(pixels[:full], views=True))
                waiting, held = [pixels[full:]], held - full
        if held:
            features.append(self.backbone.encode_images(torch.cat(waiting), views=True))
        crops_BVD = torch.cat(features).reshape(len(images), count - 1, -1)
        return torch.cat([originals[:, None], crops_BVD], dim=1)

    def _joint(
        self, features: Tensor, originals: Tensor, cosines: Tensor, classes: ClassSet, plan: Plan
    ) -> tuple[Tensor, baselines.Joint, str | None]:
        """Joint tuning of one variable on `features` (B, V, D) of all images: the originals' logits, and what speaks
        against it."""
        assert plan.host is not None
        assert self.root is not None
        host, config = self.hosts[plan.host], self.configs[plan.method]
        start = host.start(self.kept[plan.host], classes, 1)
        regulate: Regulate = identity
        if plan.method == "gram" and self.learned is not None:
            texts, name = self.texts.features(classes), self.learned.checkpoint.regulator
            start = gram.start(self.weights, texts)
            if name != "identity":
                near = gram.relate(self.structure, originals)
                scale = self.backbone.logit_scale
                regulate = gram.regulate(name, self.weights, self.structure, near, texts, start, scale)
        joint = baselines.infomax(
            host,
            classes,
            start,
            features[None],
            root=self.root if config.root else None,
            lr=config.lr[plan.host],
            steps=plan.steps,
            update=config.update,
            regulate=regulate,
        )
        before = objectives.entropy(joint.before.softmax(-1).mean(2)).mean()
        after = objectives.entropy(joint.after.softmax(-1).mean(2)).mean()
        logits = host.logits(joint.params, originals[None], classes)[0]
        return logits, joint, self._distrust(logits, cosines, float(before), float(after))

    def _tune_batch(
        self, features: Tensor, originals: Tensor, cosines: Tensor, classes: ClassSet, plan: Plan
    ) -> _Tuned:
        """Information maximisation, with the guards of docs/method.md."""
        started = time.perf_counter()
        logits, joint, reason = self._joint(features, originals, cosines, classes, plan)
        accepted = objectives.accepted(cosines * self.backbone.logit_scale, logits, originals)
        settled = self._settle(logits, cosines, accepted, reason, plan.views, started)
        return replace(settled, variables=joint.params, rho=joint.rho)

    def _tune_gram(self, features: Tensor, originals: Tensor, cosines: Tensor, classes: ClassSet, plan: Plan) -> _Tuned:
        """GRAM: the joint tuning, and how far the answer goes along it and along what the request's relations say.

        Where the request is far from every prototype this is `_tune_batch`, bit for bit.
        """
        started = time.perf_counter()
        scale, structure = self.backbone.logit_scale, self.structure
        logits, joint, reason = self._joint(features, originals, cosines, classes, plan)
        base = cosines * scale
        guarded = objectives.accepted(base, logits, originals)
        plain = self._settle(logits, cosines, guarded, reason, plan.views, started)
        plain = replace(plain, variables=joint.params, rho=joint.rho, trust=0.0)
        relation = gram.relate(structure, originals)
        trust = gram.trust(relation.novelty, self.weights["trust.least"][0, 0])
        if reason is not None or float(trust) == 0.0 or plan.steps == 0:
            return plain
        texts = self.texts.features(classes)
        seen = gram.context(structure, relation, originals, texts, scale)
        along = gram.directions(structure, features, texts, base, logits, scale)
        amounts = gram.amounts(self.weights, seen)
        moved, log_prior = gram.move(base, along, amounts)
        before = torch.where(plain.accepted[:, None], logits / plain.temperature, base)
        answer = gram.settle(base, before, moved, trust)
        reason = self._distrust(answer, cosines, 0.0, 0.0)
        accepted = gram.accepted(base, answer, self.weights["accept.margin"][0, 0])
        if reason is not None:
            accepted = torch.zeros_like(accepted)
        added = trust * (moved - base - amounts["tuned"] * along["tuned"])
        theirs, own = added.norm(dim=-1), (answer - base - added).norm(dim=-1)
        return replace(
            plain,
            logits=answer,
            accepted=accepted,
            reason=reason,
            temperature=1.0,
            ms=(time.perf_counter() - started) * 1000,
            trust=float(trust),
            skew=float((1 - objectives.entropy(log_prior.softmax(-1)) / np.log(len(classes))).clamp(0, 1)),
            share=theirs / (own + theirs).clamp_min(1e-12),
        )

    def _tune_alone(self, features: Tensor, original: Tensor, cosines: Tensor, classes: ClassSet, plan: Plan) -> _Tuned:
        """GRAM on one image: a request of one."""
        return self._tune_gram(features[None], original[None], cosines[None], classes, plan)

    def _tune_image(self, features: Tensor, original: Tensor, cosines: Tensor, classes: ClassSet, plan: Plan) -> _Tuned:
        """TPT on `features` (V, D) of one image, and what speaks against it."""
        started = time.perf_counter()
        assert plan.host is not None
        host, config = self.hosts[plan.host], self.configs[plan.method]
        base = self.backbone.logit_scale * features @ self.texts.features(classes).T
        kept = objectives.confident(base[None], config.keep)[0]
        chosen = features[kept][None]
        start = host.start(self.kept[plan.host], classes, 1)
        lr = config.lr[plan.host]
        params = baselines.marginal(host, classes, start, chosen, lr=lr, update=config.update, steps=plan.steps)
        # one text pass answers both: the kept views for the check, the original for the answer
        final = host.logits(params, torch.cat([chosen, original[None, None]], dim=1), classes)
        before = objectives.marginal_entropy(base[kept][None])
        after = objectives.marginal_entropy(final[:, :-1])
        logits = final[0, -1:]
        reason = self._distrust(logits, cosines[None], float(before), float(after))
        always = torch.ones(1, dtype=torch.bool, device=logits.device)
        settled = self._settle(logits, cosines[None], always, reason, len(kept), started)
        return replace(settled, variables=params, chosen=frozenset(kept.tolist()))

    def _distrust(self, logits: Tensor, cosines: Tensor, before: float, after: float) -> str | None:
        """Why a tuning is discarded, or None (api.md section 3)."""
        if not bool(logits.isfinite().all()) or not np.isfinite(after):
            return "not_finite"
        if after > before + ENTROPY_SLACK:
            return "diverged"
        distance = objectives.kl(logits, cosines * self.backbone.logit_scale).mean()
        return "kl_cap" if float(distance) > self.kl_cap else None

    def _settle(
        self, logits: Tensor, cosines: Tensor, accepted: Tensor, reason: str | None, kept: int, started: float
    ) -> _Tuned:
        """Give the accepted answers, as a group, the mean confidence that zero-shot has on the same images."""
        sharpness = 1.0
        if reason is not None:
            accepted = torch.zeros_like(accepted)
        elif bool(accepted.any()):
            confidence = (cosines[accepted] * self.backbone.logit_scale).softmax(-1).amax(-1).mean()[None]
            sharpness = float(objectives.temperature(logits[accepted][None], confidence))
        return _Tuned(logits, accepted, reason, kept, sharpness, (time.perf_counter() - started) * 1000)

    def _explained(
        self,
        results: list[ImageResult],
        tuned: Sequence[tuple[_Tuned | None, int]],
        seen: Seen,
        classes: ClassSet,
        plan: Plan,
        images: list[Prepared] | None,
    ) -> list[ImageResult]:
        """`results` with their reasons, where `images` ask for them."""
        if images is None:
            return results
        scale, texts = self.backbone.logit_scale, self.texts.features(classes)
        near = None if self.learned is None else gram.relate(self.structure, seen.originals)
        concepts = None if near is None else self._concepts(near)
        made = []
        for n, (result, (own, row)) in enumerate(zip(results, tuned, strict=True)):
            entropies = objectives.entropy((scale * seen.views[n] @ texts.T).softmax(-1)).tolist()
            pixels = (int(images[n].pixels.shape[1]), int(images[n].pixels.shape[2]))
            crops: list[views.Box | None] = [None]
            if len(entropies) > 1:
                shown = self.configs[plan.method].view_scale
                crops += views.boxes(seen.sha256[n], pixels, len(entropies), plan.seed, shown)
            kept = None if own is None else own.chosen
            told = Explanation(
                views=tuple(
                    ViewSeen(
                        None if crop is None else (crop.top, crop.left, crop.height, crop.width),
                        crop is not None and crop.flip,
                        entropy,
                        own is not None and (kept is None or v in kept),
                    )
                    for v, (crop, entropy) in enumerate(zip(crops, entropies, strict=True))
                )[:TOLD_VIEWS],
            )
            if near is not None and concepts is not None:
                told = replace(told, prototypes=concepts[n], shift=max(0.0, 1 - float(near.nearest[MODE][n])))
            if own is not None:
                moved = None if own.variables is None else _shift(own.variables, self._at_start(plan, classes))
                share = None if own.share is None else float(own.share[row])
                told = replace(
                    told, trust=own.trust, skew=own.skew, rho=own.rho, structure_share=share, prompt_shift=moved
                )
            made.append(replace(result, explanation=told))
        return made

    def _concepts(self, near: gram.Relation) -> list[tuple[PrototypeSeen, ...]]:
        """Per image, the concepts that weigh most; prototypes of one name count together."""
        rows = self.structure.rows[CONCEPT]
        names, place = np.unique([self.structure.names[row] for row in rows.tolist()], return_inverse=True)
        weights = near.weights[CONCEPT].double().cpu().numpy()
        shares = np.stack([np.bincount(place, own, len(names)) for own in weights])
        most = np.argsort(-shares, axis=1, kind="stable")[:, :TOLD_PROTOTYPES].tolist()
        return [
            tuple(PrototypeSeen(str(names[i]), float(own[i])) for i in top)
            for own, top in zip(shares, most, strict=True)
        ]

    def _at_start(self, plan: Plan, classes: ClassSet) -> Params:
        assert plan.host is not None
        return self.hosts[plan.host].start(self.kept[plan.host], classes, 1)

    def _result(self, cosines: Tensor, tuned: _Tuned, row: int, plan: Plan) -> ImageResult:
        scale = self.backbone.logit_scale
        base = cosines * scale
        logits = tuned.logits[row]
        finite = tuned.reason != "not_finite"
        use = bool(tuned.accepted[row])
        before = _array(cosines)
        after = _array(logits / scale) if use else before
        temperature = tuned.temperature if use else 1.0
        entropy = float(objectives.entropy(base.softmax(-1)))
        report = Adaptation(
            method=plan.method,
            host=plan.host,
            scope=plan.scope,
            status="completed" if tuned.reason is None else "fallback",
            reason=tuned.reason or (None if use else "not_accepted"),
            steps=plan.steps,
            steps_requested=plan.steps,
            views=plan.views,
            views_requested=plan.views,
            views_kept=tuned.kept,
            entropy_before=entropy,
            entropy_after=float(objectives.entropy(logits.softmax(-1))) if finite else entropy,
            kl=float(objectives.kl(logits, base)) if finite else 0.0,
            label_changed=use and int(after.argmax()) != int(before.argmax()),
            accepted=use,
            temperature=temperature,
            ms=tuned.ms,
            digest=_digest(after, temperature),
        )
        return ImageResult(after, before, scale, report)


class _Clock:
    """Milliseconds per stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = (now - self._last) * 1000
        self._last = now


def load_learned(folder: Path, fingerprint: str) -> tuple[Learned | None, str | None]:
    """Checkpoint and bank in `folder`, or the reason why there are none.

    Raises InvalidCheckpoint or FingerprintMismatch when they are there and can't be used.
    """
    checkpoint = load_checkpoint(folder, fingerprint=fingerprint)
    if checkpoint is None:
        return None, "no GRAM checkpoint lies beside this model"
    try:
        bank = load_bank(folder, fingerprint=fingerprint)
    except ValueError as error:
        raise InvalidCheckpoint(f"the prototype bank of the checkpoint can't be used: {error}") from error
    if bank is None:
        raise InvalidCheckpoint(f"{folder} holds a checkpoint without its prototype bank; restore bank.safetensors.")
    if file_sha256(folder / "bank.safetensors") != checkpoint.bank_sha256:
        raise InvalidCheckpoint(f"the checkpoint in {folder} was trained with another prototype bank; restore that.")
    first = checkpoint.params.get("amounts.hidden")
    for name, w in gram.init(hidden=gram.HIDDEN if first is None else first.shape[-1]).items():
        got = checkpoint.params.get(name)
        if got is None or got.shape != w.shape:
            raise InvalidCheckpoint(f"the checkpoint in {folder} lacks `{name}`, or has another shape; train it again.")
    return Learned(checkpoint, bank), None


def _config_of(checkpoint: Checkpoint) -> TuneConfig:
    """How the checkpoint was trained to tune; raises InvalidCheckpoint where its header doesn't say, or where that is
    not what `Classifier` does."""
    try:
        s: Any = checkpoint.settings
        scale = (float(s["view_scale"][0]), float(s["view_scale"][1]))
        lr = {str(s["host"]): float(s["lr"])}
        _ = METHODS[str(s["host"])], UPDATES[str(s["update"])]
        return TuneConfig(
            steps=int(s["steps"]),
            views=int(s["views"]),
            lr=lr,
            update=str(s["update"]),
            view_scale=scale,
            root=bool(s.get("root", True)),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InvalidCheckpoint(f"the checkpoint's settings can't be read ({error!r}); train it again.") from error


def _shift(after: Params, before: Params) -> float:
    """Root mean square of the change of all variables."""
    moved = torch.cat([(after[name] - before[name]).flatten() for name in after])
    return float(moved.square().mean().sqrt())


def _array(values: Tensor) -> FloatArray:
    return values.detach().float().cpu().numpy().copy()


def _digest(cosines: FloatArray, temperature: float = 1.0) -> str:
    """Hash of the float32 scores of all classes in the answer used."""
    data = (cosines / np.float32(temperature)).astype(np.float32).tobytes()
    return "sha256:" + hashlib.sha256(data).hexdigest()


@contextmanager
def _device_errors() -> Iterator[None]:
    """torch's device errors as this package's own."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("the device ran out of memory; ask for fewer images, views or classes.") from error
    except torch.AcceleratorError as error:
        raise DeviceError("the device failed; the process must be replaced.") from error
