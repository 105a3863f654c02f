"""What the server holds: towers, texts and hosts behind one call, `classify`.

Immutable after `load` (caches apart) and free of HTTP. One engine thread calls `classify`; `prepare`, `class_set`,
`plan` and `cost` may be called from any thread. Zero-shot is always computed first and is the answer whenever tuning
is not asked for, not supported by the evidence, or not trusted (`docs/method.md`, "do no harm").
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gram_core import __version__, device, objectives, views
from gram_core import backbone as towers
from gram_core.backbone import Backbone
from gram_core.device import make_deterministic
from gram_core.errors import (
    DeviceError,
    FingerprintMismatch,
    GramError,
    InvalidCheckpoint,
    InvalidMemory,
    InvalidTuning,
    MethodUnavailable,
    OutOfMemory,
)
from gram_core.explain import explained
from gram_core.gram import Structure
from gram_core.images import DecodedImage
from gram_core.learned import INFOMAX, TPT, Learned, TuneConfig, config_of, load_learned
from gram_core.memory import Memory, Snapshot
from gram_core.pace import Line, Pace, key
from gram_core.prompts import METHODS, PromptMethod
from gram_core.text import ClassSet, TextEncoder
from gram_core.tuner import Seen, Task, Tuned, Tuner, never
from gram_core.types import (
    Adaptation,
    Answer,
    FloatArray,
    ImageResult,
    ModelInfo,
    Params,
    Plan,
    Tuning,
    Work,
)
from gram_core.views import Prepared
from prototypes.bank import load_root

__all__ = ["BATCH_FROM", "INFOMAX", "TPT", "Classifier", "Learned", "Seen", "TuneConfig", "load_learned"]

BATCH_FROM = 8  # images from which a joint tuning is trusted (method.md section 8)
GROUP, GROUP_TEXTS = 4, 40  # images tuned one at a time in one pass, and the texts up to which that pays, on a CPU
CUDA_GROUP, CUDA_GROUP_TEXTS = 8, 1024

T = TypeVar("T")
log = logging.getLogger("gram_core.classifier")


@dataclass(frozen=True)
class _Look:
    """How many views of an image are looked at, and which crops they are."""

    views: int
    seed: int
    scale: tuple[float, float]

    @classmethod
    def of(cls, plan: Plan, configs: Mapping[str, TuneConfig]) -> _Look:
        return cls(plan.views, plan.seed, configs[plan.method].view_scale)

    def cut(self, backbone: Backbone, image: Prepared) -> Tensor:
        """The crops (views - 1, 3, size, size) of one image."""
        size = (int(image.pixels.shape[1]), int(image.pixels.shape[2]))
        return views.cut(backbone, image, views.boxes(image.sha256, size, self.views, self.seed, self.scale))


class Classifier:
    """Frozen towers, class texts and hosts; `classify` answers before and after.

    `learned` makes the method gram; without it `note` says why. Args of `load`: see `gram_core.backbone.load`;
    `text_cache_bytes` bounds the cache of class features, `kl_cap` is the KL (nats) from zero-shot beyond which a
    tuned answer is discarded; `default_*` override the method's own defaults for callers that leave them open;
    `text_group` is how many images that are tuned one at a time share a pass of the text tower (1: none do).

    Attributes:
        pace: how long adaptation takes here, once warmed up.
        out_of_memory: how often memory ran out and a second, smaller try made it good (True) or did not (False).
        sentinel: hashes of everything that must never change.
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
        text_group: int | None = None,
        infomax: TuneConfig = INFOMAX,
        tpt: TuneConfig = TPT,
    ) -> None:
        self.backbone = backbone
        self.texts = TextEncoder(backbone, text_cache_bytes)
        self.kl_cap = kl_cap
        self.text_weight = 1.0
        self.pace = Pace()
        self.out_of_memory = {True: 0, False: 0}
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
        weights: Params | None = None
        structure: Structure | None = None
        self.controls: dict[str, Classifier] = {}  # variants that the harness has asked for
        if learned is not None:
            own = config_of(learned.checkpoint)
            self.configs["gram"] = replace(
                own,
                steps=own.steps if default_steps is None else default_steps,
                views=default_batch_views or own.views,
            )
            weights = {name: w.to(backbone.device) for name, w in learned.checkpoint.params.items()}
            kind = str(learned.checkpoint.settings.get("prototypes", "real"))
            structure = Structure.of(learned.bank, backbone.device).control(kind)
        self.tuner = Tuner(
            backbone,
            self.texts,
            self.hosts,
            self.kept,
            self.configs,
            self.root,
            kl_cap,
            learned,
            weights,
            structure,
            *((CUDA_GROUP, CUDA_GROUP_TEXTS) if backbone.device.type == "cuda" else (GROUP, GROUP_TEXTS)),
        )
        if text_group is not None:
            self.tuner.group = text_group
        learnt = [*(weights or {}).values(), *(t for kept in self.kept.values() for t in kept.values())]
        fixed = [t for t in (self.root, None if structure is None else structure.modes) if t is not None]
        self.sentinel = device.Sentinel([*backbone.tensors(), *learnt, *fixed])
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
            shapes=(shapes := self._shapes()),
            build=device.build(__version__, backbone.device, shapes.items()),
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
        deterministic: bool = False,
        **options: Any,
    ) -> Classifier:
        """Load a model from disk, with the root prototype and the GRAM checkpoint and bank beside its weights, if any.

        `checkpoint` names another folder for the last two. A model without a root takes the bank's own, as training
        does. `deterministic` holds for the whole process. Raises ModelUnavailable, UnsupportedTower,
        FingerprintMismatch when root, checkpoint or bank belong to other weights, InvalidCheckpoint when one is
        damaged, or when the folder named has none.
        """
        if deterministic:
            make_deterministic()
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
            text_group=self.tuner.group,
            infomax=self.configs["infomax"],
            tpt=self.configs["tpt"],
        )
        made.texts, made.hosts, made.kept = self.texts, self.hosts, self.kept
        structure = structure or made.tuner.structure
        made.tuner = replace(made.tuner, texts=made.texts, hosts=made.hosts, kept=made.kept, structure=structure)
        return made

    @property
    def weights(self) -> Params:
        """What the checkpoint learned; empty without one."""
        return self.tuner.weights or {}

    @property
    def structure(self) -> Structure:
        """The prototypes as gram relates to them; raises MethodUnavailable without a checkpoint."""
        if self.tuner.structure is None:
            raise MethodUnavailable(self._no_method("gram", self.info.methods, self.info.checkpoint_note))
        return self.tuner.structure

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

    def seconds(self, plan: Plan, images: int, classes: ClassSet) -> float:
        """How long the adaptation will take once zero-shot is there; 0 before the warm-up."""
        return self.pace.seconds(plan, images, len(classes), self.tuner.group_of(classes))

    def fit(self, plan: Plan, images: int, classes: ClassSet, budget_s: float, why: str) -> Plan:
        """The plan, or the largest smaller one that `budget_s` seconds are enough for; see `Pace.fit`."""
        return self.pace.fit(plan, images, len(classes), budget_s, why, self.tuner.group_of(classes))

    def warm(self, class_set: str) -> bool:
        """Whether the features of the class set with this id are kept."""
        return self.texts.holds(class_set)

    def session(self, classes: ClassSet, capacity: int, views: int) -> Memory:
        """An empty memory for a session on these classes."""
        return Memory(len(classes), views=views, dim=self.info.joint_dim, capacity=capacity)

    def restored(self, data: bytes) -> tuple[Memory, dict[str, str]]:
        """A session's memory from `Memory.dump`; raises InvalidMemory, also for one of features of another size."""
        memory, bound = Memory.restore(data)
        if memory.dim != self.info.joint_dim:
            raise InvalidMemory("this session's features have another size than this model's.")
        return memory, bound

    def memory(self) -> dict[str, float]:
        """Bytes held, by kind: class features kept, and what is allocated and reserved on a CUDA device."""
        held = {"text_cache": float(self.texts.held_bytes)}
        if self.backbone.device.type == "cuda":
            held["allocated"] = float(torch.cuda.memory_allocated(self.backbone.device))
            held["reserved"] = float(torch.cuda.memory_reserved(self.backbone.device))
        return held

    # ---- the engine thread ----

    def classify(self, images: Sequence[Prepared], classes: ClassSet, plan: Plan, *, explain: bool = False) -> Answer:
        """Zero-shot for every image, then the tuning that `plan` asks for; `explain` says why, per image.

        Answers come in the order of `images` and do not depend on it; in scope `image` they do not depend on the
        other images either. Raises OutOfMemory or DeviceError when not even zero-shot can be had.
        """
        (answer,) = self.run([Work(images, classes, plan, explain)])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run(self, works: Sequence[Work]) -> list[Answer | Exception]:
        """Answer several requests in shared passes of the towers; what is wrong with one is that one's outcome.

        Images and crops of different requests share passes of the image tower, bit for bit what they are alone;
        images that are tuned one at a time share passes of the text tower where their class sets agree (`Tuner`).
        Raises OutOfMemory when the originals don't fit even at a second try, and DeviceError.
        """
        with _device_errors(), torch.no_grad():
            clock = _Clock()
            cached: list[bool] = []
            failed: dict[int, Exception] = {}
            for n, work in enumerate(works):
                cached.append(self.texts.has(work.classes))
                with _failing(failed, n):
                    self._twice(partial(self.texts.features, work.classes))
            clock.lap("text")
            originals = self._twice(partial(self._original_features, [i for work in works for i in work.images]))
            rows = list(originals.split([len(work.images) for work in works]))
            cosines: dict[int, Tensor] = {}
            for n, work in enumerate(works):
                if n not in failed:
                    cosines[n] = self._cosines(rows[n], self.texts.features(work.classes))
            clock.lap("image")
            made: dict[int, list[ImageResult]] = {}
            for n, own in cosines.items():
                with _failing(failed, n):
                    self._tell_early(works[n], rows[n], own, cached[n], clock, made, n)
            cosines = {n: own for n, own in cosines.items() if n not in failed}
            there = time.perf_counter()
            stops = [partial(_since, there, work.stop) for work in works]
            fallen: dict[int, Exception] = {}
            wanted = [work for n, work in enumerate(works) if n in cosines]
            predicted = sum(self.seconds(work.plan, work.together, work.classes) for work in wanted)
            seen, stopped = self._look(works, rows, {n: stops[n] for n in cosines}, fallen)
            tasks: dict[int, Task] = {}
            for n, s in seen.items():
                if works[n].plan.skip is None:
                    with _failing(fallen, n):
                        remembered = self._recall(works[n], s)
                        tasks[n] = Task(s, cosines[n], works[n].classes, works[n].plan, stops[n], *remembered)
            tuned = self._tuned(tasks, fallen)
            for n, work in enumerate(works):
                if n in failed or n in made:
                    continue
                with _failing(failed, n):
                    if n in tuned:
                        made[n] = self._results(seen[n], cosines[n], work, tuned[n])
                    else:
                        made[n] = self._untuned(rows[n], cosines[n], work, stopped.get(n), fallen.get(n))
            clock.lap("adapt")
            cut_short = stopped or any(outcome.stopped for own in tuned.values() for outcome, _ in own)
            if not (failed or fallen or cut_short):
                self.pace.correct(predicted, clock.laps["adapt"] / 1000)
        answers: list[Answer | Exception] = []
        for n, work in enumerate(works):
            if n in failed:
                error = failed[n]
                answers.append(_no_memory() if isinstance(error, torch.OutOfMemoryError) else error)
                continue
            views_ = work.plan.views if n in seen else 1
            texts = (0 if cached[n] else work.classes.texts) + (self._text_passes(work, tuned[n]) if n in tuned else 0)
            cache = "hit" if cached[n] else "miss"
            answer = Answer(tuple(made[n]), cache, len(work.images) * views_, texts, dict(clock.laps))
            if work.memory is not None:
                answer = replace(answer, seen=seen.get(n))
            if work.features:
                answer = replace(answer, features=(_array(rows[n]), _array(self.texts.features(work.classes))))
            answers.append(answer)
        return answers

    def _tell_early(
        self,
        work: Work,
        originals: Tensor,
        cosines: Tensor,
        cached: bool,
        clock: _Clock,
        made: dict[int, list[ImageResult]],
        n: int,
    ) -> None:
        """Zero-shot: all there will be of a work that is not tuned, else what to say if time runs out."""
        final = work.final
        if not final and work.early is None:
            return
        results = self._untuned(originals, cosines, work if final else replace(work, explain=False), "deadline")
        if final:
            made[n] = results
        if work.early is not None:
            texts = 0 if cached else work.classes.texts
            laps = {**clock.laps, "adapt": 0.0}
            work.early(Answer(tuple(results), "hit" if cached else "miss", len(results), texts, laps))

    def see(self, images: Sequence[Prepared], views: int, seed: int, scale: tuple[float, float]) -> Seen:
        """What the image tower says of `images`: one view is the original alone, the others are crops of `scale`.

        With a plan's views and seed and its method's scale, `answer` gives on it what `classify` gives on the images.
        """
        with _device_errors(), torch.no_grad():
            originals = self._original_features(images)
            looks = {0: _Look(views, seed, scale)}
            laps: dict[str, float] = {}
            failed: dict[int, Exception] = {}
            crops = [rows for _, rows in self._crops([(0, i) for i in images], looks, lambda _: True, failed, laps)]
            if failed:
                raise failed[0]
            return replace(_seen(originals, crops, images), cut_ms=laps.get("cut", 0.0))

    def answer(
        self, seen: Seen, classes: ClassSet, plan: Plan, memory: Snapshot | None = None
    ) -> tuple[ImageResult, ...]:
        """`classify` on features that are there already, bit for bit."""
        with _device_errors(), torch.no_grad():
            cosines = self._cosines(seen.originals, self.texts.features(classes))
            work = Work((), classes, plan, memory=memory)
            if plan.skip:
                return tuple(self._untuned(seen.originals, cosines, work))
            (tuned,) = self.tuner.tune([Task(seen, cosines, classes, plan, never, *self._recall(work, seen))])
            if isinstance(tuned, Exception):
                raise tuned
            return tuple(self._results(seen, cosines, work, tuned))

    def warm_up(self) -> None:
        """One zero-shot forward and one tuning of every method, what they cost, and whether a shared pass is safe."""
        where = self.backbone.device
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
        self._measure(images)
        if not self._separate():
            log.warning("images that share a text pass move each other's last bits here; each is tuned by itself")
            self.tuner.group = 1
            shapes = self._shapes()
            self.info = replace(self.info, shapes=shapes, build=device.build(__version__, where, shapes.items()))

    # ---- inside ----

    def _measure(self, images: Sequence[Prepared]) -> None:
        """What a pass of each tower costs, and how long every tuning takes that may be asked for."""
        image_s = _seconds(lambda: self._original_features(images)) / len(images)
        fresh = [self.class_set([f"thing {tag}{i}" for i in range(16)]) for tag in "ab"]  # one is never cached
        text_s = _seconds(lambda: self.texts.features(fresh.pop()), times=1) / 16
        self.text_weight = text_s / image_s
        look = _Look(1 + self.backbone.view_chunk, 0, (0.5, 1.0))

        def look_at() -> Tensor:
            return self._encode_views(look.cut(self.backbone, images[0]))

        self.pace.view_s = _seconds(look_at) / self.backbone.view_chunk
        few, more = (self.class_set([f"thing {i}" for i in range(count)]) for count in (4, 16))
        for tuning in self._tunings():
            times = []
            for classes, steps in ((few, 1), (few, 2), (more, 2)):
                plan = self.plan(replace(tuning, steps=steps, views=8), BATCH_FROM, classes)
                count = BATCH_FROM if plan.scope == "batch" else self.tuner.group_of(classes)
                seen = self._noise(count, plan.views)
                times.append(_seconds(partial(self.answer, seen, classes, plan), times=1))
            each = self.tuner.group_of(few) if plan.scope == "image" else BATCH_FROM
            of = each * plan.views if plan.host == "residual" else (each if plan.scope == "image" else 1)
            line = Line.through(*times, steps=2, units=of * len(few), wider=of * len(more))
            self.pace.lines[key(plan)] = line

    def _tunings(self) -> Iterator[Tuning]:
        """Every combination of method, host and scope that is served."""
        for method in self.info.methods:
            if method == "gram":
                yield from (Tuning(method=method, scope=scope) for scope in ("batch", "image"))
            elif method != "none":
                yield from (Tuning(method=method, host=host) for host in self.hosts)

    def _separate(self) -> bool:
        """Whether an image's tuning in a shared pass is bit for bit what it is alone, at every place in it.

        On a CUDA device that is asked for only where the kernels are deterministic.
        """
        on_cuda = self.backbone.device.type == "cuda"
        if on_cuda and not torch.are_deterministic_algorithms_enabled():
            return True
        most = self.tuner.together // max(1, self.tuner.group)
        if self.tuner.group == 1 or most < 2:
            return True
        classes = self.class_set([f"thing {i}" for i in range(most)])
        plan = self.plan(Tuning(method="tpt", views=8), 1, classes)
        seen = self._noise(self.tuner.group, plan.views)
        whole = self.answer(seen, classes, plan)
        turned = self.answer(Seen(seen.views.flip(0), seen.sha256), classes, plan)[::-1]
        (alone,) = self.answer(Seen(seen.views[:1], seen.sha256[:1]), classes, plan)
        pairs = [(whole[0], alone), *zip(whole, turned, strict=True)]
        return all(a.cosines.tobytes() == b.cosines.tobytes() for a, b in pairs)

    def _noise(self, images: int, views_: int) -> Seen:
        made = torch.randn(images, views_, self.backbone.joint_dim, generator=torch.Generator().manual_seed(0))
        features = torch.nn.functional.normalize(made, dim=-1).to(self.backbone.device)
        return Seen(features, tuple(bytes([i]) * 32 for i in range(images)))

    def _shapes(self) -> dict[str, int]:
        tuner = self.tuner
        chunks = {"image_chunk": self.backbone.image_chunk, "view_chunk": self.backbone.view_chunk}
        return {**chunks, "prompt_group": tuner.group, "prompt_texts": tuner.together}

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

    def _recall(self, work: Work, seen: Seen) -> tuple[Any, ...]:
        """Of a session's memory what is not among the images themselves, and its cosines; nothing outside of one."""
        if work.memory is None:
            return ()
        others = work.memory.without(seen.sha256, seen.views.shape[1])
        if not others.sha256:
            return ()
        kept = Seen(others.views.to(seen.views), others.sha256)
        cosines = self._cosines(kept.originals, self.texts.features(work.classes))
        return kept, cosines, others.balanced, others.age

    def _cosines(self, features: Tensor, base: Tensor) -> Tensor:
        """(B, K) in the fixed image shape, so that a row has the same bits whatever B is."""
        chunk = self.backbone.image_chunk
        rows = [features.new_zeros(0, len(base))]
        for start in range(0, len(features), chunk):
            part = features[start : start + chunk]
            padded = torch.cat([part, part.new_zeros(chunk - len(part), part.shape[1])])
            rows.append((padded @ base.T)[: len(part)])
        return torch.cat(rows)

    def _look(
        self,
        works: Sequence[Work],
        originals: Sequence[Tensor],
        stops: Mapping[int, Callable[[], str | None]],
        fallen: dict[int, Exception],
    ) -> tuple[dict[int, Seen], dict[int, str]]:
        """Features of the views of every work that is to be tuned; the others' reasons, if they had to stop."""
        stopped: dict[int, str] = {}

        def goes_on(n: int) -> bool:
            if n in stopped or n in fallen:
                return False
            if (reason := stops[n]()) is not None:
                stopped[n] = reason
            return reason is None

        wanted = [n for n in stops if works[n].looked_at]
        cuts = [(n, image) for n in wanted for image in works[n].images]
        crops: dict[int, list[Tensor]] = {n: [] for n in wanted}
        looks = {n: _Look.of(works[n].plan, self.configs) for n in wanted}
        for n, rows in self._crops(cuts, looks, goes_on, fallen):
            crops[n].append(rows)
        seen = {}
        for n in wanted:
            if goes_on(n):
                seen[n] = _seen(originals[n], crops[n], works[n].images)
        return seen, stopped

    def _crops(
        self,
        cuts: Sequence[tuple[int, Prepared]],
        looks: Mapping[int, _Look],
        goes_on: Callable[[int], bool],
        fallen: dict[int, Exception],
        laps: dict[str, float] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """(owner, features of some of its crops), in the order of `cuts`, which are images and their owners.

        Crops of all owners share passes of the tower, and a row's value does not depend on its neighbours there.
        """
        chunk = self.backbone.view_chunk
        owners: list[int] = []
        waiting: list[Tensor] = []

        def flush(rows: int) -> Iterator[tuple[int, Tensor]]:
            pixels = torch.cat(waiting)
            sizes = [(n, len(list(group))) for n, group in groupby(owners[:rows])]
            owners[:], waiting[:] = owners[rows:], [pixels[rows:]]
            try:
                features = self._encode_views(pixels[:rows])
            except torch.OutOfMemoryError as error:
                fallen.update({n: error for n, _ in sizes})
                return
            for (n, _), part in zip(sizes, features.split([size for _, size in sizes]), strict=True):
                yield n, part

        for n, image in cuts:
            if looks[n].views == 1 or not goes_on(n):
                continue
            started = time.perf_counter()
            with _failing(fallen, n):
                crops = looks[n].cut(self.backbone, image)
                waiting.append(crops)
                owners += [n] * len(crops)
            if laps is not None:
                laps["cut"] = laps.get("cut", 0.0) + (time.perf_counter() - started) * 1000
            if len(owners) >= 8 * chunk:  # bounds the pixels held, whatever is asked for
                yield from flush(len(owners) - len(owners) % chunk)
        if owners:
            yield from flush(len(owners))

    def _encode_views(self, pixels: Tensor) -> Tensor:
        """Features of crops; without enough memory once more in the next smaller shape."""
        encode, half = partial(self.backbone.encode_images, pixels, views=True), max(1, self.backbone.view_chunk // 2)
        return self._twice(encode, partial(encode, chunk=half))

    def _tuned(self, tasks: Mapping[int, Task], fallen: dict[int, Exception]) -> dict[int, list[tuple[Tuned, int]]]:
        """Outcomes by work; what failed is in `fallen`. A tuning without enough memory is tried once more alone."""
        done = dict(zip(tasks, self.tuner.tune(list(tasks.values())), strict=True))
        for n, outcome in done.items():
            if isinstance(outcome, torch.OutOfMemoryError):
                self._free()
                (done[n],) = replace(self.tuner, group=1).tune([tasks[n]])
                self.out_of_memory[not isinstance(done[n], torch.OutOfMemoryError)] += 1
        fallen |= {n: outcome for n, outcome in done.items() if isinstance(outcome, Exception)}
        return {n: outcome for n, outcome in done.items() if not isinstance(outcome, Exception)}

    def _twice(self, work: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """The result of `work`; if memory runs out, of one more try with whatever memory can be freed."""
        try:
            return work()
        except torch.OutOfMemoryError:
            self._free()
        try:
            result = (again or work)()
        except torch.OutOfMemoryError:
            self.out_of_memory[False] += 1
            raise
        self.out_of_memory[True] += 1
        return result

    def _free(self) -> None:
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()

    def _text_passes(self, work: Work, tuned: Sequence[tuple[Tuned, int]]) -> int:
        if work.plan.host != "coop":
            return 0
        episodes = {id(own): own.steps for own, _ in tuned}
        return len(work.classes) * sum(steps + 1 for steps in episodes.values())

    def _untuned(
        self,
        originals: Tensor,
        cosines: Tensor,
        work: Work,
        stopped: str | None = None,
        fallen: Exception | None = None,
    ) -> list[ImageResult]:
        """Zero-shot, and why nothing was tuned."""
        plan = work.plan
        status, reason = "skipped", plan.skip or stopped
        if fallen is not None:
            status, reason = "fallback", "out_of_memory" if isinstance(fallen, torch.OutOfMemoryError) else "internal"
        results = []
        for own in cosines:
            values = _array(own)
            entropy = float(objectives.entropy((own * self.backbone.logit_scale).softmax(-1)))
            report = Adaptation(
                method=plan.method,
                host=plan.host,
                scope=plan.scope,
                status=status,
                reason=reason,
                steps=0,
                steps_requested=plan.steps_requested,
                views=1,
                views_requested=plan.views_requested,
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
            results.append(ImageResult(values, values, self.backbone.logit_scale, report))
        if not work.explain:
            return results
        seen = Seen(originals[:, None], tuple(i.sha256 for i in work.images))
        nothing: list[tuple[Tuned | None, int]] = [(None, 0)] * len(results)
        return explained(results, nothing, self.tuner, seen, work.classes, plan, work.images)

    def _results(
        self, seen: Seen, cosines: Tensor, work: Work, tuned: Sequence[tuple[Tuned, int]]
    ) -> list[ImageResult]:
        """One result per image, with reasons where they are asked for."""
        results = [self._result(cosines[n], own, row, work.plan) for n, (own, row) in enumerate(tuned)]
        if not work.explain:
            return results
        return explained(results, tuned, self.tuner, seen, work.classes, work.plan, work.images)

    def _original_features(self, images: Sequence[Prepared]) -> Tensor:
        """(B, D) features of the originals."""
        if not images:
            return torch.zeros(0, self.info.joint_dim, device=self.backbone.device)
        return self.backbone.encode_images(torch.stack([i.original for i in images]))

    def _result(self, cosines: Tensor, tuned: Tuned, row: int, plan: Plan) -> ImageResult:
        scale = self.backbone.logit_scale
        base = cosines * scale
        logits = tuned.logits[row]
        finite = tuned.reason != "not_finite"
        use = bool(tuned.accepted[row])
        before = _array(cosines)
        after = _array(logits / scale) if use else before
        temperature = tuned.temperature if use else 1.0
        entropy = float(objectives.entropy(base.softmax(-1)))
        status, reason = "completed", None if use else "not_accepted"
        if tuned.reason is not None:
            status, reason = "fallback", tuned.reason
        elif tuned.stopped is not None:
            status, reason = "partial", tuned.stopped
        elif plan.shed is not None:
            status, reason = "partial", plan.shed
        report = Adaptation(
            method=plan.method,
            host=plan.host,
            scope=plan.scope,
            status=status,
            reason=reason,
            steps=tuned.steps,
            steps_requested=plan.steps_requested,
            views=plan.views,
            views_requested=plan.views_requested,
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


def _seen(originals: Tensor, crops: Sequence[Tensor], images: Sequence[Prepared]) -> Seen:
    """Features (B, V, D) from the originals' (B, D) and, image by image, their crops'."""
    made = originals[:, None]
    if crops:
        made = torch.cat([made, torch.cat(list(crops)).reshape(len(images), -1, originals.shape[-1])], dim=1)
    return Seen(made, tuple(i.sha256 for i in images))


def _since(start: float, stop: Callable[[float], str | None]) -> str | None:
    return stop(time.perf_counter() - start)


@contextmanager
def _failing(failed: dict[int, Exception], n: int) -> Iterator[None]:
    """What goes wrong with one work is kept as its own failure; what the device says concerns all."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        failed[n] = error
    except Exception as error:  # a bug: its request fails alone
        if device.is_broken(error):
            raise
        if not isinstance(error, GramError):
            log.exception("a request failed alone")
        failed[n] = error


def _seconds(work: Callable[[], Any], times: int = 2) -> float:
    """The shortest of a few runs."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return max(1e-9, min(found))


class _Clock:
    """Milliseconds per stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = (now - self._last) * 1000
        self._last = now


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
        raise _no_memory() from error
    except RuntimeError as error:
        if not device.is_broken(error):
            raise
        raise DeviceError("the device failed; the process must be replaced.") from error


def _no_memory() -> OutOfMemory:
    return OutOfMemory("the device ran out of memory; ask for fewer images, views or classes.")
