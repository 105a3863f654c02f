"""The outer loop: what a learner learns over many episodes, first order (Finn et al., ICML 2017; SUPMER, 2023).

Step s averages the losses of episodes s M to s M + M - 1. An episode depends on its number alone and nothing else here
draws, so a run goes on exactly where its last kept state stood, and processes that share the episodes of a step do what
one does, bit for bit: gradients are added in the order of episodes. What an episode holds is the learner's affair.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, distributed
from torch.nn import functional as F

from gram_core import gram, objectives
from gram_core.adapt import UPDATES, Loss, Regulate, adapt, of
from gram_core.config import option
from gram_core.episodes import SUPERVISED, Episode
from gram_core.errors import InvalidConfig, InvalidData, TrainingDiverged
from gram_core.pairs import Meter, beside
from gram_core.prompts.residual import shifted
from gram_core.regulators import REGULATORS, Context, Regulator, bind
from gram_core.types import Params

STATE, FORMAT = "state.safetensors", 1
PATIENCE = timedelta(days=7)  # what one process does alone may take long: torchrun ends the others if it fails
SURE = 1.96  # standard errors either side of a mean: 95 %

Metrics: TypeAlias = dict[str, float]
Interval: TypeAlias = list[float]
"""Mean, half the width of its 95 % interval, and the number of episodes behind it."""

E_co = TypeVar("E_co", covariant=True)
E_contra = TypeVar("E_contra", contravariant=True)
E = TypeVar("E")


class Tasks(Protocol[E_co]):
    """Where episodes come from: the i-th is the same whenever, wherever and by whomever it is asked for."""

    def episode(self, i: int, progress: float, /) -> E_co: ...


class Learner(Protocol[E_contra]):
    """What is learned. `loss` and `measure` are pure in `params`."""

    def init(self, generator: torch.Generator) -> Params:
        """The start, float32, each with a leading E of 1."""

    def groups(self) -> Mapping[str, float]:
        """Learning rates by the parts of `params`: "regulator" is for "regulator.residual.u"."""

    def loss(self, params: Params, episode: E_contra, /) -> tuple[Tensor, Metrics]:
        """The outer loss of one episode (a scalar, differentiable in `params`), and numbers to watch."""

    def measure(self, params: Params, episode: E_contra, /) -> Metrics:
        """What is reported of an episode of held-out themes."""


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """The outer loop's options."""

    steps: int = option(2000, "steps of the outer loop")
    episodes: int = option(4, "episodes of one step, over all processes")
    clip: float = option(1.0, "largest norm of the gradient of each part")
    weight_decay: float = option(0.0, "of AdamW")
    validate_every: int = option(250, "steps between looks at the held-out themes")
    validate_episodes: int = option(64, "episodes of each look")
    keep_every: int = option(50, "steps after which the state is kept: what a killed run loses at most")
    seed: int = option(0, "seed of the weights that training starts from")

    def __post_init__(self) -> None:
        least = {"steps": 1, "episodes": 1, "validate_every": 1, "validate_episodes": 0, "keep_every": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        if not (self.clip > 0 and self.weight_decay >= 0):
            raise InvalidConfig(f"clip is {self.clip} and weight_decay {self.weight_decay}; give > 0 and >= 0.")


# ---- processes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The processes that share the work; one alone where `torch.distributed` has not been started."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> World:
        """What `torch.distributed` says."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    def share(self, numbers: range) -> range:
        """This process's part."""
        return numbers[self.rank :: self.size]

    def add(self, values: Tensor) -> None:
        """Replace `values`, on the CPU, by their sum over all processes; exact where all but one of them give 0."""
        if self.size > 1:
            distributed.all_reduce(values)

    def gather(self, mine: Any) -> list[Any]:
        """What every process gave (JSON values), by rank."""
        if self.size == 1:
            return [mine]
        text = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([len(text)]))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(text)] = text
        all_ = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(all_, padded)
        whole = zip(all_, lengths, strict=True)
        return [json.loads(bytes(one[: int(length)].numpy())) for one, length in whole]


@contextmanager
def joined() -> Iterator[None]:
    """The processes that `torchrun` started, connected while the block lasts; nothing where it started none."""
    if "RANK" not in os.environ:
        yield
        return
    store, rank, size = next(distributed.rendezvous("env://"))  # type: ignore[attr-defined]  # it is there
    own = distributed.PrefixStore(attempt(store, rank, size), store)  # type: ignore[attr-defined]  # likewise
    distributed.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def attempt(store: Any, rank: int, size: int) -> str:
    """A name that the processes of this start have in common, and those of no earlier one; `store` is torch's.

    torchrun keeps its store over restarts, with the addresses of processes that are dead: gloo would wait for them for
    ever. Rank 0 answers whoever is there until every rank has heard it; nobody else answers a fresh token.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"here/{rank}", mine)
        name: str = store.get(f"name/{mine}").decode()
        store.set(f"heard/{name}/{rank}", "")
        return name
    while not store.check([f"heard/{mine}/{other}" for other in range(1, size)]):
        for other in range(1, size):
            store.set(f"name/{store.get(f'here/{other}').decode()}", mine)
        time.sleep(0.05)
    return mine


# ---- one step ----------------------------------------------------------------------------------------------------


class Optimizer:
    """AdamW with a cosine from each part's learning rate to zero, over leaves that it moves in place."""

    def __init__(self, params: Params, groups: Mapping[str, float], config: MetaConfig) -> None:
        parts: dict[str, list[str]] = {}
        for name in params:
            part = name.partition(".")[0]
            if part not in groups:
                raise ValueError(f"no learning rate for {name!r}; there are some for {', '.join(groups)}")
            parts.setdefault(part, []).append(name)
        if not parts:
            raise InvalidConfig("there is nothing to learn: this learner and regulator have no weights. Choose others.")
        self.params, self.parts, self.config = params, parts, config
        self.rates = {part: groups[part] for part in parts}
        made = [{"params": [params[name] for name in names], "lr": 0.0} for names in parts.values()]
        self.adam = torch.optim.AdamW(made, weight_decay=config.weight_decay, foreach=False)

    def step(self, step: int, grads: Params) -> Metrics:
        """Clip each part's gradient, then step number `step` from 0; the norms before clipping."""
        norms = {}
        rate = 0.5 * (1 + math.cos(math.pi * step / self.config.steps))
        for group, (part, names) in zip(self.adam.param_groups, self.parts.items(), strict=True):
            norm = math.sqrt(sum(float(grads[name].double().square().sum()) for name in names))
            for name in names:
                self.params[name].grad = grads[name] * min(1.0, self.config.clip / max(norm, 1e-12))
            group["lr"] = self.rates[part] * rate
            norms[f"gradient {part}"] = norm
        self.adam.step()
        self.adam.zero_grad()
        return norms

    def state(self) -> Params:
        """AdamW's two moments of every parameter; zeros before the first step."""
        made = {}
        for name, p in self.params.items():
            kept = self.adam.state.get(p, {})
            made[f"mean/{name}"] = kept.get("exp_avg", torch.zeros_like(p))
            made[f"square/{name}"] = kept.get("exp_avg_sq", torch.zeros_like(p))
        return made

    def restore(self, state: Params, step: int) -> None:
        """Go on after `step` steps."""
        for name, p in self.params.items():
            self.adam.state[p] = {
                "step": torch.tensor(float(step)),
                "exp_avg": state[f"mean/{name}"].to(p),
                "exp_avg_sq": state[f"square/{name}"].to(p),
            }


def outer_step(
    learner: Learner[E], tasks: Tasks[E], params: Params, optimizer: Optimizer, step: int, world: World
) -> Metrics:
    """Move `params` by the mean gradient of the step's episodes; the mean of their losses and metrics.

    Raises TrainingDiverged, in every process, naming the episode whose loss or gradient is not finite.
    """
    config = optimizer.config
    sizes = [p.numel() for p in params.values()]
    first = step * config.episodes
    each_of = torch.zeros(config.episodes, sum(sizes), dtype=torch.float64)
    mine = []
    for i in world.share(range(first, first + config.episodes)):
        loss, metrics = learner.loss(params, tasks.episode(i, step / config.steps))
        grad = each_of[i - first]
        if loss.requires_grad:  # an episode may say nothing about what is learned
            each = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
            grad.copy_(torch.cat([g.detach().flatten().cpu().double() for g in each]))
        mine.append([i, {"loss": float(loss.detach()), **metrics}, bool(grad.isfinite().all())])
    world.add(each_of)
    total = torch.zeros_like(each_of[0])
    for grad in each_of:
        total += grad
    reports = sorted(report for part in world.gather(mine) for report in part)
    for i, metrics, finite in reports:
        if not (finite and math.isfinite(metrics["loss"])):
            what = "a gradient" if math.isfinite(metrics["loss"]) else "a loss"
            raise TrainingDiverged(
                f"step {step}: episode {i} gives {what} that is not finite ({metrics['loss']}). The last kept state is "
                "unharmed. Look at that episode's features, or lower the learning rates."
            )
    pieces = (total / config.episodes).split(sizes)
    grads = {name: piece.view_as(p).to(p) for (name, p), piece in zip(params.items(), pieces, strict=True)}
    norms = optimizer.step(step, grads)
    return {name: mean for name, (mean, _, _) in intervals([metrics for _, metrics, _ in reports]).items()} | norms


def validate(learner: Learner[E], tasks: Tasks[E], params: Params, count: int, world: World) -> dict[str, Interval]:
    """`learner.measure` over the first `count` episodes, as they are at the end of the curriculum."""
    with torch.no_grad():
        mine = [[i, learner.measure(params, tasks.episode(i, 1.0))] for i in world.share(range(count))]
    reports = sorted(report for part in world.gather(mine) for report in part)
    for i, metrics in reports:
        wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
        if wrong:
            raise TrainingDiverged(f"held-out episode {i} gives {', '.join(wrong)} that is not finite.")
    return intervals([metrics for _, metrics in reports])


def intervals(rows: Sequence[Metrics]) -> dict[str, Interval]:
    """Each metric over the episodes that have it; episodes are independent, so the interval is that of a mean."""
    made = {}
    for name in sorted({name for row in rows for name in row}):
        values = torch.tensor([row[name] for row in rows if name in row], dtype=torch.float64)
        n = len(values)
        half = SURE * float(values.std()) / math.sqrt(n) if n > 1 else 0.0
        made[name] = [float(values.mean()), half, n]
    return made


# ---- the state ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class State:
    """After `step` steps: what was learned, the optimizer's moments, and every look at the held-out themes."""

    step: int
    params: Params
    moments: Params
    history: list[dict[str, Any]]


def save_state(path: Path, state: State, made_from: str) -> None:
    """One file that takes the place of the older one when it is whole and on the disk."""
    tensors = {f"param/{name}": p.detach() for name, p in state.params.items()} | state.moments
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    about = {
        "format": FORMAT,
        "step": state.step,
        "made_from": made_from,
        "sha256": _digest(tensors),
        "history": state.history,
    }
    with beside(path) as file:
        file.write(save(tensors, {"state": json.dumps(about, allow_nan=False)}))


def load_state(path: Path, made_from: str) -> State | None:
    """The kept state; None where there is none. Raises InvalidData when it is damaged or of other settings."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            # cloned: how a tensor lies in memory moves the last bits of a product, and a fresh run's lie as torch likes
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (a safetensors file has no other iterator)
            about = json.loads((file.metadata() or {})["state"])
        theirs, step, history = str(about["made_from"]), int(about["step"]), list(about["history"])
        whole = about["format"] == FORMAT and about["sha256"] == _digest(tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InvalidData(f"{path} is cut off or no state of meta-training ({error!r}). {_OTHERWISE}") from None
    if not whole:
        raise InvalidData(f"{path} is changed, or of another version. {_OTHERWISE}")
    if theirs != made_from:
        raise InvalidData(f"{path} is the state of a run with other data or options. {_OTHERWISE}")
    params = {name.removeprefix("param/"): tensor for name, tensor in tensors.items() if name.startswith("param/")}
    moments = {name: tensor for name, tensor in tensors.items() if not name.startswith("param/")}
    return State(step, params, moments, history)


_OTHERWISE = "Delete it to begin anew, restore it, or name another folder with --out."


def _digest(tensors: Params) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


# ---- a learner ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """What is learned, and the inner loop that it is learned for."""

    regulator: str = option("identity", "gradient regulator: a name in gram_core.regulators")
    start: bool = option(False, "learn where the residual starts, as a map of class features")
    prototypes: str = option("real", "what requests are related to; controls: permuted, random, none")
    hidden: int = option(16, "units of the amounts' layer")
    harm: float = option(0.0, "weight of what a request loses against zero-shot")
    even: float = option(2.0, "weight of requests of equally frequent classes")
    bias: float = option(0.03, "largest move of class features along the root, to vary how a model likes names")
    amounts_rate: float = option(6e-3, "learning rate of the amounts")
    loss: float = option(0.75, "points that simulated requests of equally frequent classes may lose on average")
    survey: int = option(512, "simulated requests that contexts are measured by")
    settle: int = option(1600, "simulated requests that the margin of acceptance is chosen on")
    steps: int = option(20, "inner steps")
    lr: float = option(2e-4, "inner step size")
    update: str = option("rms", "inner step rule: a name in gram_core.adapt")
    root: bool = option(True, "rehearse the root prototype in the joint loss")
    rank: int = option(16, "rank of the start's map")
    start_rate: float = option(1e-3, "learning rate of the start")
    regulator_rate: float = option(1e-4, "learning rate of the regulator")

    def __post_init__(self) -> None:
        for name, known in (("regulator", REGULATORS), ("update", UPDATES), ("prototypes", gram.PROTOTYPES)):
            if getattr(self, name) not in known:
                raise InvalidConfig(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}.")
        if self.steps < 0 or self.rank < 1:
            raise InvalidConfig(f"steps is {self.steps} and rank {self.rank}; give >= 0 and >= 1.")
        rates = ("lr", "start_rate", "regulator_rate", "amounts_rate", "harm", "even", "bias", "loss", "settle")
        least = dict.fromkeys(rates, 0) | {"hidden": 1, "survey": 2}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be at least {low}.")


Asked: TypeAlias = tuple[str, Tensor, Tensor, Tensor]
"""A part of the outer loss: its name, tuned and zero-shot logits (n, K), labels (n,)."""


@dataclass(frozen=True, eq=False)
class ResidualLearner:
    """The residual host: where a tuning starts, and the regulator of its gradients (docs/method.md).

    The start is a low-rank map of the class's own text feature, z_c = U V^T t_c, which knows no class list; U = 0 at
    first. Simulated requests are tuned on the joint loss with rehearsal, supervised tasks on cross-entropy. Outer
    loss: half the cross-entropy of the tuned images themselves, half that of the queries; of queries alone where the
    labels were tuned on. A query with other names has no tuned residual: it asks the start.

    Args:
        texts: (N, D) features of `episodes.Tasks.names`; root: (D,) the root prototype, or None; scale: CLIP's.
    """

    texts: Tensor
    root: Tensor | None
    scale: float
    config: LearnerConfig

    @property
    def regulator(self) -> Regulator:
        return REGULATORS[self.config.regulator]

    def init(self, generator: torch.Generator) -> Params:
        width = self.texts.shape[-1]
        rank = min(self.config.rank, width)
        made = self.regulator.init({"residual": (None, width)}, generator)
        start = {
            "start.u": torch.zeros(1, width, rank),
            "start.v": torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q[None].contiguous(),
        }
        weights = start | {f"regulator.{name}": w for name, w in made.items()}
        return {name: w.to(self.texts.device) for name, w in weights.items()}

    def groups(self) -> Mapping[str, float]:
        return {"start": self.config.start_rate, "regulator": self.config.regulator_rate}

    def loss(self, params: Params, episode: Episode) -> tuple[Tensor, Metrics]:
        return self._outer(episode, list(self._asked(params, episode)))

    def measure(self, params: Params, episode: Episode) -> Metrics:
        """Cross-entropy and accuracy (points over zero-shot) of each part, and how much nearer the regulated gradient
        is to that of the cross-domain query: cos(psi(g_S), g_Q) - cos(g_S, g_Q)."""
        asked = list(self._asked(params, episode))
        loss, metrics = self._outer(episode, asked)
        metrics = {"loss": float(loss.detach()), **metrics}
        for name, tuned, zero_shot, labels in asked:
            right = [float((logits.argmax(-1) == labels).double().mean()) for logits in (tuned, zero_shot)]
            metrics[f"{name} gain"] = 100 * (right[0] - right[1])
        query = next((query for query in episode.queries if query.gap == "mode"), None)
        if query is not None:
            base = self._texts(episode.classes)
            start = self._start(params, base)
            plain = of(self._inner(base, episode))(start)
            turned = self._regulate(params, episode)(plain)["residual"]
            features, labels = query.features.to(base), query.labels.to(base.device)
            across = of(lambda p: F.cross_entropy(self._logits(base, p, features), labels))(start)["residual"]
            pair = [F.cosine_similarity(g.flatten(), across.flatten(), dim=0) for g in (turned, plain["residual"])]
            metrics["cosine"] = float(pair[0] - pair[1])
        return metrics

    def _asked(self, params: Params, episode: Episode) -> Iterator[Asked]:
        base = self._texts(episode.classes)
        start = self._start(params, base)
        tuned = adapt(
            of(self._inner(base, episode)),
            start,
            regulate=self._regulate(params, episode),
            update=UPDATES[self.config.update],
            lr=self.config.lr,
            steps=self.config.steps,
        )
        parts = [("support", episode.support[:, 0], episode.support_labels, base, tuned)]
        for query in episode.queries:
            texts = self._texts(query.classes)
            mine = tuned if query.gap != "branch" else self._start(params, texts)
            parts.append((query.gap, query.features, query.labels, texts, mine))
        for name, features, labels, texts, mine in parts:
            x = features.to(texts)
            yield name, self._logits(texts, mine, x), self.scale * x @ texts.T, labels.to(texts.device)

    def _outer(self, episode: Episode, asked: Sequence[Asked]) -> tuple[Tensor, Metrics]:
        losses = {name: F.cross_entropy(tuned, labels) for name, tuned, _, labels in asked}
        own, gaps = losses["support"], [loss for name, loss in losses.items() if name != "support"]
        total = torch.stack(gaps).mean() if gaps else own
        if gaps and episode.kind != SUPERVISED:
            total = 0.5 * (own + total)
        return total, {name: float(loss.detach()) for name, loss in losses.items()}

    def _texts(self, classes: Tensor) -> Tensor:
        return self.texts[classes.to(self.texts.device)]

    def _start(self, params: Params, base: Tensor) -> Params:
        return gram.start(params, base)

    def _logits(self, base: Tensor, params: Params, features: Tensor) -> Tensor:
        """(n, K) of features (n, D)."""
        return self.scale * features @ shifted(base, params["residual"])[0].T

    def _regulate(self, params: Params, episode: Episode) -> Regulate:
        weights = {key.removeprefix("regulator."): w for key, w in params.items() if key.startswith("regulator.")}
        return bind(self.regulator, weights, Context(images=float(len(episode.support))))

    def _inner(self, base: Tensor, episode: Episode) -> Loss:
        """The inner loss (1,) of a residual."""
        support = episode.support.to(base)
        b, v, d = support.shape
        seen = support.reshape(b * v, d)
        if episode.kind == SUPERVISED:
            labels = episode.support_labels.to(base.device).repeat_interleave(v)
            return lambda p: F.cross_entropy(self._logits(base, p, seen), labels)[None]
        rho = objectives.rehearsal_weight((self.scale * seen @ base.T).softmax(-1).mean(0, keepdim=True), b)
        root = self.root if self.config.root else None

        def loss(p: Params) -> Tensor:
            texts = shifted(base, p["residual"])
            logits = self.scale * (seen @ texts.mT).reshape(1, b, v, -1)
            return objectives.infomax(logits, None if root is None else self.scale * root @ texts.mT, rho)

        return loss


# ---- the whole ---------------------------------------------------------------------------------------------------


def train(
    learner: Learner[E],
    tasks: Tasks[E],
    held_out: Tasks[E] | None,
    config: MetaConfig,
    folder: Path,
    *,
    made_from: str,
    console: Console,
) -> State:
    """Learn for `config.steps` steps, or go on from the state in `folder`; its end.

    `made_from` names all that the outcome depends on besides `config`: a state of something else is refused.
    The outcome is that of an undisturbed run bit for bit, with any number of processes, on processors of one kind with
    equal numbers of threads each. Raises TrainingDiverged and InvalidData.
    """
    world = World.here()
    shaping = {name: value for name, value in vars(config).items() if name != "keep_every"}
    made_from = hashlib.sha256(json.dumps([FORMAT, made_from, shaping]).encode()).hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STATE
    kept = load_state(path, made_from)
    step, history = (kept.step, kept.history) if kept else (0, [])
    begun = world.gather(step)
    if len(set(begun)) > 1:
        raise InvalidData(f"the processes stand at steps {begun}: {folder} must be one folder that all of them see.")
    params = {name: p.clone() for name, p in sorted(learner.init(torch.Generator().manual_seed(config.seed)).items())}
    if kept:
        params = {name: kept.params[name].to(p) for name, p in params.items()}
    for p in params.values():
        p.requires_grad_(True)
    optimizer = Optimizer(params, learner.groups(), config)
    if kept:
        optimizer.restore(kept.moments, step)

    def draw(seen: Mapping[str, Interval]) -> None:
        for name, (mean, _, _) in seen.items():
            write(f"held out/{name}", mean, step)

    def look() -> None:
        if held_out is None or not config.validate_episodes:
            return
        seen = validate(learner, held_out, params, config.validate_episodes, world)
        history.append({"step": step, **seen})
        draw(seen)
        told = ", ".join(f"{name} {mean:.4g} ± {half:.2g}" for name, (mean, half, _) in seen.items())
        console.print(f"step {step}, held-out themes: {told}", markup=False, highlight=False, soft_wrap=True)

    with _scalars(folder, step, world, console) as write, Meter(console, "meta-training", "steps") as meter:
        if not step and not history:
            look()
        elif history and history[-1]["step"] == step:  # voided with what came after it
            draw({name: value for name, value in history[-1].items() if name != "step"})
        meter.begin(config.steps, step)
        while step < config.steps:
            for name, value in outer_step(learner, tasks, params, optimizer, step, world).items():
                write(f"training/{name}", value, step)
            step += 1
            meter.advance(1)
            if step % config.validate_every == 0 or step == config.steps:
                look()
            if world.rank == 0 and (step % config.keep_every == 0 or step == config.steps):
                save_state(path, State(step, params, optimizer.state(), history), made_from)
    return State(step, {name: p.detach() for name, p in params.items()}, optimizer.state(), history)


@contextmanager
def _scalars(folder: Path, step: int, world: World, console: Console) -> Iterator[Callable[[str, float, int], None]]:
    """Where numbers over steps go: TensorBoard's files in `folder`, if it is there (the extra `train`)."""

    def nowhere(*_: object) -> None:
        pass

    if world.rank:
        yield nowhere
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print("TensorBoard is not installed (pip install 'gram-server[train]'): no curves.", markup=False)
        yield nowhere
        return
    writer = SummaryWriter(log_dir=str(folder / "curves"), purge_step=step)  # what a killed run wrote later is void
    try:
        yield writer.add_scalar
    finally:
        writer.close()
