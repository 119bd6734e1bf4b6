"""What the judges find in the pictures of an adapter, each figure with its floor and ceiling.

likeness          mean cosine to the photos; floor: the base model's pictures, ceiling: the photos among themselves
prompt_following  how well a picture shows its prompt; floor: the base model's pictures with another of the prompts,
                  ceiling: with their own
diversity         mean distance of two pictures of the same prompt; floor: 0, ceiling: the base model's
class_likeness    mean cosine of pictures of the class to the photos, which should stay at the floor, the base model's;
                  ceiling: the photos among themselves (the class has become the subject)
class_drift       distance of a picture of the class from the base model's of the same seed; floor: 0 (unchanged),
                  ceiling: the base model's distance between seeds (another picture)
unrelated_drift   the same for prompts that have nothing to do with the subject
nearest_photo     mean cosine of a picture to the photo nearest to it; floor: the base model's, ceiling: the two photos
                  nearest to each other. `train.metrics.copy_limit` says from where on a picture is a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from train import metrics
from train.encoders import Encoders
from train.evaluate_plan import Pictures, Plan
from train.metrics import Figure

TITLES = {
    "likeness": "likeness",
    "prompt_following": "prompt following",
    "diversity": "diversity",
    "class_likeness": "class likeness",
    "class_drift": "class drift",
    "unrelated_drift": "unrelated drift",
    "nearest_photo": "nearest photo",
}


@dataclass(frozen=True)
class Found:
    """What the judges said of one set of pictures.

    Attributes:
        embeddings: of each group (prompts, seeds, dim).
        follows: of the subject's pictures (prompts, seeds), or None.
    """

    embeddings: dict[str, torch.Tensor]
    follows: torch.Tensor | None


@dataclass(frozen=True)
class Reference:
    """What an adapter is compared with: the photos and the base model.

    Attributes:
        photos: (photos, dim).
        base: the base model's pictures.
        mismatched: (prompts, seeds) how well they show another of the prompts; None where that cannot be said.
    """

    photos: torch.Tensor
    base: Found
    mismatched: torch.Tensor | None


def look(encoders: Encoders, plan: Plan, pictures: Pictures) -> Found:
    """Ask the judges."""
    seeds = len(plan.seeds)
    embeddings = {
        group: encoders.image.embed(some).unflatten(0, (-1, seeds)) for group, some in pictures.items() if some
    }
    return Found(embeddings, _follows(encoders, plan.plain, pictures["subject"], seeds))


def refer(encoders: Encoders, plan: Plan, photos: Sequence[Image.Image], pictures: Pictures) -> Reference:
    """The photos and the base model's pictures, judged."""
    others = (*plan.plain[1:], plan.plain[0])
    mismatched = None
    if len(others) > 1:
        mismatched = _follows(encoders, others, pictures["subject"], len(plan.seeds))
    return Reference(encoders.image.embed(photos), look(encoders, plan, pictures), mismatched)


def figures(found: Found, reference: Reference) -> dict[str, Figure | None]:
    """All figures of a set of pictures; None for what could not be measured (no class prompt, one seed, …)."""
    photos, base = reference.photos, reference.base.embeddings
    subject = found.embeddings["subject"]
    among, closest = metrics.likeness_among(photos), metrics.nearest_among(photos)
    at_base = metrics.over_seeds(metrics.likeness(base["subject"], photos))
    result: dict[str, Figure | None] = {
        "likeness": _on(metrics.over_seeds(metrics.likeness(subject, photos)), at_base, among),
        "prompt_following": None,
        "diversity": _on(metrics.diversity(subject), 0.0, metrics.diversity(base["subject"])),
        "class_likeness": None,
        "class_drift": None,
        "unrelated_drift": None,
        "nearest_photo": _on(
            metrics.over_seeds(metrics.nearest(subject, photos)),
            metrics.over_seeds(metrics.nearest(base["subject"], photos)),
            closest,
        ),
    }
    if found.follows is not None and reference.base.follows is not None:
        floor = None if reference.mismatched is None else metrics.over_seeds(reference.mismatched)
        result["prompt_following"] = _on(
            metrics.over_seeds(found.follows), floor, metrics.over_seeds(reference.base.follows)
        )
    if "class" in found.embeddings:
        kind, kind_base = found.embeddings["class"], base["class"]
        result["class_likeness"] = _on(
            metrics.over_seeds(metrics.likeness(kind, photos)),
            metrics.over_seeds(metrics.likeness(kind_base, photos)),
            among,
        )
        result["class_drift"] = _drift(kind, kind_base)
    if "unrelated" in found.embeddings:
        result["unrelated_drift"] = _drift(found.embeddings["unrelated"], base["unrelated"])
    return result


def copies(found: Found, photos: torch.Tensor) -> list[dict[str, Any]]:
    """The subject's pictures that are copies of a photo: `{"prompt", "seed", "photo": positions, "similarity"}`."""
    limit = metrics.copy_limit(photos)
    if limit is None:
        return []
    cosines = found.embeddings["subject"] @ photos.T
    best, which = cosines.max(dim=-1)
    return [
        {"prompt": p, "seed": s, "photo": int(which[p, s]), "similarity": round(float(best[p, s]), 4)}
        for p, s in (best > limit).nonzero().tolist()
    ]


def _follows(
    encoders: Encoders, prompts: Sequence[str], pictures: Sequence[Image.Image], seeds: int
) -> torch.Tensor | None:
    if encoders.text is None:
        return None
    scores = encoders.text.follows(pictures, [prompt for prompt in prompts for _ in range(seeds)])
    return None if scores is None else scores.unflatten(0, (-1, seeds))


def _drift(here: torch.Tensor, base: torch.Tensor) -> Figure | None:
    return _on(metrics.over_seeds(metrics.distance(here, base)), 0.0, metrics.diversity(base))


def _on(figure: Figure | None, floor: Figure | float | None, ceiling: Figure | float | None) -> Figure | None:
    """A figure on its scale."""
    if figure is None:
        return None
    low, high = (end.mean if isinstance(end, Figure) else end for end in (floor, ceiling))
    return replace(figure, floor=low, ceiling=high)
