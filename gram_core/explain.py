"""Why an image got its answer: the views, the prototypes near it, and what the tuning did with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from gram_core import gram, objectives, views
from gram_core.gram import Structure
from gram_core.text import ClassSet
from gram_core.tuner import Seen, Tuned, Tuner
from gram_core.types import Explanation, ImageResult, Params, Plan, PrototypeSeen, ViewSeen
from gram_core.views import Prepared
from prototypes.hierarchy import CONCEPT, MODE

TOLD_VIEWS, TOLD_PROTOTYPES = 64, 5  # of an explanation, so that it stays within 8 KiB


def explained(
    results: Sequence[ImageResult],
    tuned: Sequence[tuple[Tuned | None, int]],
    tuner: Tuner,
    seen: Seen,
    classes: ClassSet,
    plan: Plan,
    images: Sequence[Prepared],
) -> list[ImageResult]:
    """`results` with their reasons."""
    scale, texts = tuner.backbone.logit_scale, tuner.texts.features(classes)
    structure = tuner.structure
    near = None if structure is None else gram.relate(structure, seen.originals)
    concepts = None if near is None or structure is None else _concepts(structure, near)
    made = []
    for n, (result, (own, row)) in enumerate(zip(results, tuned, strict=True)):
        entropies = objectives.entropy((scale * seen.views[n] @ texts.T).softmax(-1)).tolist()
        pixels = (int(images[n].pixels.shape[1]), int(images[n].pixels.shape[2]))
        crops: list[views.Box | None] = [None]
        if len(entropies) > 1:
            shown = tuner.configs[plan.method].view_scale
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
            moved = None if own.variables is None else _shift(own.variables, _at_start(tuner, plan, classes))
            share = None if own.share is None else float(own.share[row])
            told = replace(told, trust=own.trust, skew=own.skew, rho=own.rho, structure_share=share, prompt_shift=moved)
        made.append(replace(result, explanation=told))
    return made


def _concepts(structure: Structure, near: gram.Relation) -> list[tuple[PrototypeSeen, ...]]:
    """Per image, the concepts that weigh most; prototypes of one name count together."""
    rows = structure.rows[CONCEPT]
    names, place = np.unique([structure.names[row] for row in rows.tolist()], return_inverse=True)
    weights = near.weights[CONCEPT].double().cpu().numpy()
    shares = np.stack([np.bincount(place, own, len(names)) for own in weights])
    most = np.argsort(-shares, axis=1, kind="stable")[:, :TOLD_PROTOTYPES].tolist()
    return [
        tuple(PrototypeSeen(str(names[i]), float(own[i])) for i in top) for own, top in zip(shares, most, strict=True)
    ]


def _at_start(tuner: Tuner, plan: Plan, classes: ClassSet) -> Params:
    assert plan.host is not None
    return tuner.hosts[plan.host].start(tuner.kept[plan.host], classes, 1)


def _shift(after: Params, before: Params) -> float:
    """Root mean square of the change of all variables."""
    moved = torch.cat([(after[name] - before[name]).flatten() for name in after])
    return float(moved.square().mean().sqrt())
