"""Sums of updates that lose less to each other's noise: TIES and DARE, on the full ΔW of one layer.

TIES (Yadav et al. 2023, "TIES-Merging", section 4): trim each update to its largest entries, elect a sign for each
entry, average those that agree with it. DARE (Yu et al. 2024, "Language Models are Super Mario", section 3): drop
entries at random and rescale the rest, so that the expectation stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

MAJORITIES = ("total", "frequency")
Prune = Callable[[torch.Tensor, float, torch.Generator | None], torch.Tensor]


def keep_largest(delta: torch.Tensor, density: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Zero but for the share `density` of the entries with the largest magnitudes, at least one."""
    count = max(1, int(density * delta.numel()))
    if count == delta.numel():
        return delta
    largest = delta.abs().flatten().topk(count).indices
    kept = torch.zeros_like(delta).flatten()
    kept[largest] = delta.flatten()[largest]
    return kept.view_as(delta)


def drop_random(delta: torch.Tensor, density: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Each entry divided by `density` with that probability, else zero. Drawn on the generator's device."""
    if density == 1.0:
        return delta
    device = delta.device if generator is None else generator.device
    kept = torch.bernoulli(torch.full(delta.shape, density, device=device), generator=generator)
    return delta * kept.to(delta.device) / density


def weighted_sum(deltas: Sequence[torch.Tensor], weights: Sequence[float], majority: str) -> torch.Tensor:
    """Σ w·ΔW; there is no election, so `majority` does not matter."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights):
        total.add_(delta, alpha=weight)
    return total


def elected_mean(deltas: Sequence[torch.Tensor], weights: Sequence[float], majority: str) -> torch.Tensor:
    """For each entry the mean of w·ΔW over those updates whose sign is the elected one.

    majority: "total" elects the sign of the sum, "frequency" the more frequent sign, and that of the sum where there is
    a draw. Where the sum is zero too, so is the result: negating all updates negates it (PEFT elects plus in a draw).
    Sizes of weights do not vote, as in PEFT; a negative weight votes as the negated update that it asks for.
    """
    signs = [1.0 if weight > 0 else -1.0 for weight in weights]
    elected = weighted_sum(deltas, signs, majority).sign_()
    if majority == "frequency":
        lead = weighted_sum([delta.sign() for delta in deltas], signs, majority).sign_()
        elected = torch.where(lead == 0, elected, lead)
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight, sign in zip(deltas, weights, signs):
        agrees = delta.sign() * sign == elected
        total.add_(delta * agrees, alpha=weight)
        count.add_(agrees)
    return total / count.clamp_(min=1.0)


# method -> how each update is thinned out, how the rests are put together
RULES: dict[str, tuple[Prune, Callable[[Sequence[torch.Tensor], Sequence[float], str], torch.Tensor]]] = {
    "ties": (keep_largest, elected_mean),
    "dare_linear": (drop_random, weighted_sum),
    "dare_ties": (drop_random, elected_mean),
    "magnitude_prune": (keep_largest, weighted_sum),
}
