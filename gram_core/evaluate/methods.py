"""The methods of the table: what each sees, what it is given at once, and how it answers. One line each in `METHODS`.

Mathematics lives in `gram_core.baselines` and in the classifier that is served; this file only calls it.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from gram_core import baselines, gram
from gram_core.classifier import Classifier, Seen
from gram_core.errors import InvalidConfig
from gram_core.evaluate.features import PLAIN, Views
from gram_core.memory import Memory
from gram_core.prompts import METHODS as HOSTS
from gram_core.text import ClassSet
from gram_core.types import Adaptation, Params, Tuning
from prototypes.hierarchy import MODE

EPISODE_TEXTS = 512  # class texts tuned in one pass; bounds the memory of per-image tuning


@dataclass(frozen=True, eq=False)
class Scene:
    """What a method may use beside the images: the classifier, and the class texts that every row shares."""

    classifier: Classifier
    classes: ClassSet
    ensemble: ClassSet

    @property
    def scale(self) -> float:
        """The model's logit scale."""
        return self.classifier.backbone.logit_scale

    @property
    def texts(self) -> Tensor:
        """(K, D)."""
        return self.classifier.texts.features(self.classes)


@dataclass(frozen=True, eq=False)
class Outcome:
    """Probabilities (n, K), and how often each status of the server's answers occurred."""

    p: Tensor
    statuses: Mapping[str, int] = field(default_factory=dict)


State = Any
Answer = Callable[[Scene, Seen, State], tuple[Outcome, State]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table.

    Attributes:
        unit: what is answered together: one `image`, a `batch`, or the images of a `stream` in their order.
        sees: the `original`, `strong` crops (TPT's) or `mild` crops (the served joint tuning's).
        host: the prompt method that the towers must carry, if any.
        tuning: the configuration of the classifier that says how a method with mild crops looks and steps.
        settings: what a reader must know to repeat it.
    """

    label: str
    paper: str
    unit: Literal["image", "batch", "stream"]
    sees: Literal["original", "strong", "mild"]
    answer: Answer
    host: str | None = None
    tuning: str = "infomax"
    settings: Mapping[str, float | str] = field(default_factory=dict)


def _alone(answer: Callable[[Scene, Seen], Tensor | Outcome]) -> Answer:
    """A method that keeps nothing between calls."""

    def call(scene: Scene, seen: Seen, state: State) -> tuple[Outcome, State]:
        found = answer(scene, seen)
        return (found if isinstance(found, Outcome) else Outcome(found)), state

    return call


def _served(method: str, scope: str, scene: Scene, seen: Seen, host: str | None = None) -> Outcome:
    """What the server answers: the same call, on features that are there already."""
    classifier = scene.classifier
    tuning = Tuning(method=method, scope=scope, host=host, views=seen.views.shape[1])
    plan = classifier.plan(tuning, len(seen.views), scene.classes)
    results = classifier.answer(seen, scene.classes, plan)
    told = Counter(_told(r.adaptation) for r in results)
    return Outcome(torch.stack([torch.from_numpy(r.scores()) for r in results]), told)


def _ensemble(scene: Scene, seen: Seen) -> Tensor:
    return baselines.zero_shot(seen.originals, scene.classifier.texts.features(scene.ensemble), scene.scale)


def _start(scene: Scene, host: str, episodes: int) -> Params:
    classifier = scene.classifier
    return classifier.hosts[host].start(classifier.kept[host], scene.classes, episodes)


def _tpt(tune: Callable[..., Tensor], scene: Scene, seen: Seen) -> Tensor:
    """Several images as independent episodes of one pass; their answers do not depend on each other."""
    together = max(1, EPISODE_TEXTS // len(scene.classes))
    host = scene.classifier.hosts["coop"]
    parts = seen.views.split(together)
    return torch.cat([tune(host, scene.classes, _start(scene, "coop", len(part)), part) for part in parts])


def _zero(scene: Scene, seen: Seen) -> Tensor:
    return baselines.zero(seen.views, scene.texts, scene.scale)


def _mta(scene: Scene, seen: Seen) -> Tensor:
    return baselines.mta(seen.views, scene.texts, scene.scale)


def _stata(scene: Scene, seen: Seen) -> Tensor:
    return baselines.stata(seen.originals, scene.texts, scene.scale)


def _tda(scene: Scene, seen: Seen, state: State) -> tuple[Outcome, State]:
    texts = scene.texts
    bank = state if state is not None else baselines.Tda.empty(len(texts), texts.shape[1], texts.device)
    rows = []
    for feature in seen.originals:
        bank, p = baselines.tda(bank, feature, texts, scene.scale)
        rows.append(p)
    return Outcome(torch.stack(rows)), bank


def _session(method: str, scene: Scene, seen: Seen, state: State) -> tuple[Outcome, State]:
    """What the server answers within a session: tuned with the images that its memory keeps, which then takes these."""
    classifier, classes = scene.classifier, scene.classes
    _, views, dim = seen.views.shape
    memory = state if state is not None else Memory(len(classes), views=views, dim=dim)
    plan = classifier.plan(Tuning(method=method, views=views), len(seen.views) + len(memory), classes)
    results = classifier.answer(seen, classes, plan, memory.snapshot())
    memory.add(seen.views, seen.sha256, [int(r.baseline_cosines.argmax()) for r in results])
    told = Counter(_told(r.adaptation) for r in results)
    return Outcome(torch.stack([torch.from_numpy(r.scores()) for r in results]), told), memory


def _plain_session(scene: Scene, seen: Seen, state: State) -> tuple[Outcome, State]:
    """What a trial found: plain information maximisation on a balanced memory and the request, every image tuned."""
    _, views, dim = seen.views.shape
    memory = state if state is not None else Memory(len(scene.classes), views=views, dim=dim)
    kept = memory.snapshot().without(seen.sha256, views)
    rows = [n for n, held in enumerate(kept.balanced) if held]
    together = torch.cat([seen.views, kept.views[rows].to(seen.views)])
    p = _infomax("residual", False, scene, Seen(together, (*seen.sha256, *(kept.sha256[n] for n in rows))))
    labels = (seen.originals @ scene.texts.T).argmax(-1).tolist()
    memory.add(seen.views, seen.sha256, labels)
    return Outcome(p[: len(seen.views)]), memory


def _told(report: Adaptation) -> str:
    plain = report.reason in (None, "not_accepted")
    return report.status if plain else f"{report.status}/{report.reason}"


def _controlled(kind: str, scene: Scene, seen: Seen) -> Outcome:
    """gram as served, with other prototypes at test time than those it was learned with."""
    return _served("gram", "auto", replace(scene, classifier=_control(scene.classifier, kind)), seen)


def _control(classifier: Classifier, kind: str) -> Classifier:
    """A control of `classifier`: other prototypes, or weights that learned nothing; made once."""
    assert classifier.learned is not None
    if kind not in classifier.controls:
        learned = classifier.learned
        if kind in ("start", "untrained"):
            generator = torch.Generator().manual_seed(0)
            fresh = gram.init(generator)
            out = torch.randn(fresh["amounts.out"].shape, generator=generator)  # as large as a layer usually starts
            drawn = fresh if kind == "start" else fresh | {"amounts.out": out / out.shape[1] ** 0.5}
            kept = {n: w for n, w in learned.checkpoint.params.items() if not n.startswith("amounts.")}
            params = kept | {n: w for n, w in drawn.items() if n.startswith("amounts.")}
            learned = replace(learned, checkpoint=replace(learned.checkpoint, params=params))
            classifier.controls[kind] = classifier.variant(learned)
        else:
            classifier.controls[kind] = classifier.variant(learned, classifier.structure.control(kind))
    return classifier.controls[kind]


def _neighbours(scene: Scene, seen: Seen) -> Tensor:
    """The prototypes as an ensemble without tuning: half zero-shot, half what the modes near the image say of the
    classes, by the captions they stand for."""
    classifier = scene.classifier
    assert classifier.learned is not None
    bank = classifier.learned.bank
    weights = gram.relate(classifier.structure, seen.originals).weights[MODE]
    named = torch.from_numpy(bank.text[bank.rows(MODE)]).to(weights.device)
    said = weights @ (scene.scale * named @ scene.texts.T).softmax(-1)
    return 0.5 * (baselines.zero_shot(seen.originals, scene.texts, scene.scale) + said)


def _infomax(host: str, rooted: bool, scene: Scene, seen: Seen) -> Tensor:
    """The bare tuning: every image takes the tuned answer, at the model's own temperature."""
    classifier = scene.classifier
    config, start = classifier.configs["infomax"], _start(scene, host, 1)
    root = classifier.root if rooted else None
    joint = baselines.infomax(
        classifier.hosts[host],
        scene.classes,
        start,
        seen.views[None],
        root=root,
        lr=config.lr[host],
        steps=config.steps,
        update=config.update,
    )
    return classifier.hosts[host].logits(joint.params, seen.originals[None], scene.classes)[0].softmax(-1)


def _joint(label: str, answer: Answer, host: str = "residual") -> Method:
    return Method(label=label, paper="docs/method.md, eq. 1 to 4", unit="batch", sees="mild", answer=answer, host=host)


def _gram(label: str, answer: Callable[[Scene, Seen], Tensor | Outcome]) -> Method:
    return replace(_joint(label, _alone(answer)), paper=GRAM_PAPER, tuning="gram")


def _in_session(label: str, answer: Answer, tuning: str = "infomax") -> Method:
    paper = "docs/method.md, sessions"
    return Method(label=label, paper=paper, unit="stream", sees="mild", answer=answer, host="residual", tuning=tuning)


GRAM_PAPER = "docs/method.md, GRAM"
TPT_PAPER = "Shu et al., NeurIPS 2022"
_STEP: dict[str, float | str] = {"keep": 0.1, "lr": 5e-3, "steps": 1}

METHODS: dict[str, Method] = {
    "zero-shot": Method(
        label="zero-shot",
        paper="Radford et al., ICML 2021",
        unit="image",
        sees="original",
        answer=_alone(partial(_served, "none", "auto")),
    ),
    "ensemble": Method(
        label="template ensemble",
        paper="Radford et al., ICML 2021",
        unit="image",
        sees="original",
        answer=_alone(_ensemble),
        settings={"templates": "the 7 simple ones of CLIP's authors"},
    ),
    "tpt": Method(
        label="TPT",
        paper=TPT_PAPER,
        unit="image",
        sees="strong",
        host="coop",
        answer=_alone(partial(_tpt, baselines.tpt)),
        settings={**_STEP, "update": "AdamW's first step", "AugMix": "off"},
    ),
    "tpt-rms": Method(
        label="TPT, RMS step",
        paper=TPT_PAPER,
        unit="image",
        sees="strong",
        host="coop",
        answer=_alone(partial(_tpt, partial(baselines.tpt, update="rms"))),
        settings={**_STEP, "update": "g / rms(g)", "AugMix": "off"},
    ),
    "tpt-served": Method(
        label="TPT as served",
        paper=TPT_PAPER,
        unit="image",
        sees="strong",
        host="coop",
        answer=_alone(partial(_served, "tpt", "image")),
        settings={**_STEP, "fallback": "on", "temperature": "zero-shot's confidence"},
    ),
    "c-tpt": Method(
        label="C-TPT",
        paper="Yoon et al., ICLR 2024",
        unit="image",
        sees="strong",
        host="coop",
        answer=_alone(partial(_tpt, baselines.c_tpt)),
        settings={**_STEP, "dispersion": 50.0, "AugMix": "off"},
    ),
    "zero": Method(
        label="ZERO",
        paper="Farina et al., NeurIPS 2024",
        unit="image",
        sees="strong",
        answer=_alone(_zero),
        settings={"keep": 0.3},
    ),
    "mta": Method(label="MTA", paper="Zanella & Ben Ayed, CVPR 2024", unit="image", sees="strong", answer=_alone(_mta)),
    "tda": Method(
        label="TDA",
        paper="Karmanov et al., CVPR 2024",
        unit="stream",
        sees="original",
        answer=_tda,
        settings={"alpha": 2.0, "beta": 5.0, "state": "emptied for every request; runs through a stream"},
    ),
    "stata": Method(
        label="StatA",
        paper="Zanella et al., CVPR 2025",
        unit="batch",
        sees="original",
        answer=_alone(_stata),
        settings={"alpha": 1.0, "neighbours": 3},
    ),
    "gram": _gram("GRAM as served", partial(_served, "gram", "auto")),
    "gram-image": Method(
        label="GRAM, one image at a time",
        paper=GRAM_PAPER,
        unit="image",
        sees="mild",
        host="residual",
        tuning="gram",
        answer=_alone(partial(_served, "gram", "image")),
    ),
    "gram-session": _in_session("GRAM in a session", partial(_session, "gram"), "gram"),
    "infomax-session": _in_session("infomax in a session", partial(_session, "infomax")),
    "infomax-plain-session": _in_session("infomax, plain, in a session", _plain_session),
    "gram-permuted": _gram("GRAM, prototypes permuted at test time", partial(_controlled, "permuted")),
    "gram-random": _gram("GRAM, random prototypes at test time", partial(_controlled, "random")),
    "gram-start": _gram("GRAM, the amounts that training starts from", partial(_controlled, "start")),
    "gram-untrained": _gram("GRAM, random-weight regulator", partial(_controlled, "untrained")),
    "gram-ensemble": Method(
        label="prototypes as an ensemble, no tuning",
        paper=GRAM_PAPER,
        unit="image",
        sees="original",
        answer=_alone(_neighbours),
    ),
    "infomax": _joint("infomax as served", _alone(partial(_served, "infomax", "auto"))),
    "infomax-root": _joint("infomax, root rule alone", _alone(partial(_infomax, "residual", True))),
    "infomax-plain": _joint("infomax, plain", _alone(partial(_infomax, "residual", False))),
    "infomax-coop": _joint(
        "infomax as served, prompt", _alone(partial(_served, "infomax", "auto", host="coop")), "coop"
    ),
    "infomax-coop-root": _joint("infomax, root rule alone, prompt", _alone(partial(_infomax, "coop", True)), "coop"),
    "infomax-coop-plain": _joint("infomax, plain, prompt", _alone(partial(_infomax, "coop", False)), "coop"),
}


def choose(names: tuple[str, ...], classifier: Classifier) -> tuple[dict[str, Method], list[str]]:
    """The methods asked for that this model can run, zero-shot first; and one sentence for each that it can't.

    Raises InvalidConfig for a name that isn't one.
    """
    chosen, left_out = {"zero-shot": METHODS["zero-shot"]}, []
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InvalidConfig(f"no method {name!r}; {hint}Choose from {', '.join(METHODS)}.")
        reason = _why_not(METHODS[name], name, classifier)
        if reason is None:
            chosen[name] = METHODS[name]
        else:
            left_out.append(f"method {name}: {reason}.")
    return chosen, left_out


def _why_not(method: Method, name: str, classifier: Classifier) -> str | None:
    if name.startswith("gram") and classifier.learned is None:
        return classifier.info.checkpoint_note
    if method.host is not None and method.host not in classifier.hosts:
        return HOSTS[method.host].why_not(classifier.texts)
    if name.startswith("infomax") and not name.endswith("plain") and classifier.root is None:
        return "this model has no root prototype"
    return None


def views_of(method: Method, classifier: Classifier, crops: str, seed: int) -> Views:
    """The views that a method is given; `crops` is `own`, or `strong` or `mild` for all methods alike."""
    if method.sees == "original":
        return PLAIN
    strong, mild = classifier.configs["tpt"], classifier.configs[method.tuning]
    count = (strong if method.sees == "strong" else mild).views
    scale = (strong if (method.sees if crops == "own" else crops) == "strong" else mild).view_scale
    return Views(count, scale, seed)


def settings_of(method: Method, classifier: Classifier) -> dict[str, float | str]:
    """Everything that makes this row what it is, as plain JSON."""
    if method.host is not None and (method.unit == "batch" or method.tuning == "gram"):
        config = classifier.configs[method.tuning]
        return {**method.settings, "host": method.host, "lr": config.lr[method.host], "steps": config.steps,
                "update": config.update}  # fmt: skip
    return dict(method.settings)
