"""What arithmetic gives back: an adapter, and how far it is from what was asked for."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapter import Adapter, LowRank, inferred_config


@dataclass(frozen=True)
class Fit:
    """One layer's result. asked: ‖ΔW asked for‖; lost: ‖ΔW asked for − ΔW of `layer`‖; both Frobenius norms."""

    layer: LowRank
    asked: float
    lost: float

    @property
    def error(self) -> float:
        return _relative(self.lost, self.asked)


@dataclass(frozen=True)
class Derived:
    """The result of `combine`, `resize` and `extract`; `str(result)` is for people.

    adapter: its configs are read off the tensors; its metadata says what was done.
    error: ‖ΔW asked for − ΔW of the adapter‖ / ‖ΔW asked for‖ over all layers together (Frobenius norms). It is
        measured on the factors as they are stored, so it holds truncation and the rounding to their dtype (3e-8 in
        float32, 2e-4 in float16, 2e-3 in bfloat16, unless nothing had to be rounded); 0.0 means that nothing was lost.
    errors: the same for each layer, {component: {path: error}}.
    skipped: {"component.name": why} of what belonged to the question and is not in the adapter.
    """

    adapter: Adapter
    error: float
    errors: dict[str, dict[str, float]]
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.adapter.layer_count()} layers, relative error {self.error:.2g}"]
        for component, errors in self.errors.items():
            ranks = {layer.rank for layer in self.adapter.components[component].values()}
            rank = f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
            worst = max(errors, key=lambda path: errors[path])
            where = f", largest error {errors[worst]:.2g} at {worst}" if errors[worst] else ""
            lines.append(f"  {component}: {len(errors)} layers, {rank}{where}")
        for reason, count in Counter(self.skipped.values()).most_common():
            first = next(name for name, why in self.skipped.items() if why == reason)
            lines.append(f"  left out {count}, such as {first}: {reason}")
        lines += [f"  note: {note}" for note in self.adapter.notes]
        return "\n".join(lines)


def derived(
    fits: Mapping[str, Mapping[str, Fit]],
    metadata: Mapping[str, Any],
    foreign: Mapping[str, str] | None = None,
    notes: list[str] | None = None,
    skipped: Mapping[str, str] | None = None,
    copies: dict[str, dict[str, dict[str, torch.Tensor]]] | None = None,
) -> Derived:
    """Put layers together; fits: {component: {path: Fit}}, components without layers are left out."""
    fits = {component: layers for component, layers in fits.items() if layers}
    components = {component: {path: fit.layer for path, fit in layers.items()} for component, layers in fits.items()}
    copies = copies or {}
    configs = {component: inferred_config(layers) for component, layers in components.items()}
    for component in copies.keys() & configs.keys():
        configs[component] = dataclasses.replace(configs[component], modules_to_save=sorted(copies[component]))
    adapter = Adapter(
        components,
        configs,
        dict(metadata),
        dict(foreign or {}),
        notes=list(notes or []),
        copies=copies,
    )
    everything = [fit for layers in fits.values() for fit in layers.values()]
    return Derived(
        adapter,
        _relative(math.hypot(*(fit.lost for fit in everything)), math.hypot(*(fit.asked for fit in everything))),
        {component: {path: fit.error for path, fit in layers.items()} for component, layers in fits.items()},
        dict(skipped or {}),
    )


def _relative(lost: float, asked: float) -> float:
    if lost == 0.0:
        return 0.0
    return lost / asked if asked else math.inf
