"""Figures out of embeddings: likeness, diversity, drift, copies, each with an interval over the seeds.

Embeddings are unit vectors, so that a product is a cosine; a distance is one minus it. Pictures come as
(prompts, seeds, dim): the same seeds for every prompt. What varies at random is the seed, so seeds are what the
bootstrap draws anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DRAWS = 4000  # of the bootstrap
FEWEST = 3  # seeds that give an interval; that of two would be wider than any difference
LEVEL = 1.959964  # quantile of the normal distribution that a 95 % interval reaches to

# The same quantile of Student's distribution with 1, 2, 3, … degrees of freedom.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A mean over seeds with its 95 % interval, and the scale that says what it is worth.

    Attributes:
        low, high: ends of the interval; None where there are fewer than `FEWEST` seeds.
        floor, ceiling: see `train.evaluate_figures`; None where there is none.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    ceiling: float | None = None

    def rounded(self) -> dict[str, float | None]:
        values = {"mean": self.mean, "low": self.low, "high": self.high, "floor": self.floor, "ceiling": self.ceiling}
        return {name: None if value is None else round(value, 4) for name, value in values.items()}


def likeness(pictures: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(…, dim), (photos, dim) -> (…): the mean cosine of each picture to the photos, as DreamBench computes DINO."""
    return (pictures @ real.T).mean(dim=-1)


def likeness_among(real: torch.Tensor) -> float | None:
    """Mean cosine of each photo to the others: what a perfect picture would reach. None for a single photo."""
    return None if len(real) < 2 else float(_others(real).nanmean())


def nearest(pictures: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(…, dim), (photos, dim) -> (…): the cosine of each picture to the photo that is nearest to it."""
    return (pictures @ real.T).amax(dim=-1)


def nearest_among(real: torch.Tensor) -> float | None:
    """The cosine of the two photos that are nearest to each other. None for a single photo."""
    return None if len(real) < 2 else float(_others(real).nan_to_num(-math.inf).max())


def copy_limit(real: torch.Tensor) -> float | None:
    """Above this cosine to a photo a picture counts as its copy: half the distance of the two nearest photos.

    Their cosine itself would be too strict: photos are few, and among a hundred new pictures of a subject some are
    nearer to a photo than any two of five photos are. Measured on the shipped subjects with pocket's judge: of 80 other
    pictures of the subjects none lies above this limit and 38 lie above the cosine of the nearest photos; of the 20
    photos, decoded from their latents, 17 lie above it.
    """
    closest = nearest_among(real)
    return None if closest is None else 1 - (1 - closest) / 2


def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(…, dim) twice -> (…): how far apart pictures of the same prompt and seed are; 0 where they are the same."""
    return (1 - (one * other).sum(dim=-1)).clamp_min(0)


def over_seeds(values: torch.Tensor) -> Figure | None:
    """(prompts, seeds) -> the mean with its interval. A prompt with a NaN does not count; None without any left."""
    values = values.double()
    values = values[~values.isnan().any(dim=-1)]
    if values.numel() == 0:
        return None
    by_seed = values.mean(dim=0)
    return interval(lambda counts: counts @ by_seed / counts.sum(dim=-1), len(by_seed))


def diversity(pictures: torch.Tensor) -> Figure | None:
    """(prompts, seeds, dim) -> mean distance of two pictures of the same prompt. None with a single seed."""
    seeds = pictures.shape[1]
    if seeds < 2:
        return None
    pictures = pictures.double()
    apart = (1 - pictures @ pictures.transpose(1, 2)).mean(dim=0).fill_diagonal_(0)
    pairs = 1 - torch.eye(seeds, dtype=torch.double)

    def mean(counts: torch.Tensor) -> torch.Tensor:
        """Over pairs of different seeds; a picture is no pair with itself, also where it was drawn twice."""
        return ((counts @ apart) * counts).sum(-1) / ((counts @ pairs) * counts).sum(-1)

    return interval(mean, seeds)


def interval(statistic: Callable[[torch.Tensor], torch.Tensor], seeds: int) -> Figure:
    """A statistic with its 95 % bootstrap interval over seeds; the same every time.

    The percentiles of few resampled values lie too close together: 4 of them give 80 % rather than 95 %. So their
    distance to the mean is widened by what Student's quantile has more than the normal one, and by √(n/(n-1)).

    Args:
        statistic: (rows, seeds) how often each seed counts -> (rows,); NaN where it is not defined.
    """
    mean = float(statistic(torch.ones(1, seeds, dtype=torch.double))[0])
    if seeds < FEWEST:
        return Figure(mean)
    chosen = torch.randint(seeds, (DRAWS, seeds), generator=torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(chosen, seeds).sum(dim=1).double()
    found = statistic(counts)
    low, high = (float(end) for end in found[~found.isnan()].quantile(torch.tensor([0.025, 0.975]).double()))
    widen = _student(seeds - 1) / LEVEL * math.sqrt(seeds / (seeds - 1))
    return Figure(mean, mean + widen * (low - mean), mean + widen * (high - mean))


def gap_closed(figure: Figure) -> float | None:
    """How much of the way from floor to ceiling the mean has gone."""
    if figure.floor is None or figure.ceiling is None or figure.ceiling <= figure.floor:
        return None
    return (figure.mean - figure.floor) / (figure.ceiling - figure.floor)


def score(like: Figure, follow: Figure | None, copied: float) -> float:
    """One number in 0..1 to choose by: share of the likeness gap × of the base's prompt following × of no copies.

    Each share ends at 1, so that nothing is gained by pictures that are more like the photos than the photos are.
    """
    return _share(like) * (1.0 if follow is None else _share(follow)) * (1 - copied)


def as_unit(embeddings: Any) -> torch.Tensor:
    """Rows of length 1, fp32, on the CPU."""
    return torch.nn.functional.normalize(embeddings.detach().float().cpu(), dim=-1)


def _share(figure: Figure) -> float:
    floor, ceiling = figure.floor or 0.0, 1.0 if figure.ceiling is None else figure.ceiling
    if ceiling <= floor:
        return 1.0 if figure.mean >= floor else 0.0
    return min(1.0, max(0.0, (figure.mean - floor) / (ceiling - floor)))


def _others(real: torch.Tensor) -> torch.Tensor:
    """(photos, photos) cosines, NaN on the diagonal."""
    return (real @ real.T).fill_diagonal_(math.nan)


def _student(freedom: int) -> float:
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else LEVEL + 2.4 / freedom
