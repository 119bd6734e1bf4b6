"""One layer's weight with adapters in it, and what rounding it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import AdapterMismatchError
from .layers import layer_kind
from .layers.dora import gain_over_base

LOSS_WORTH_SAYING = 0.01  # relative error of the update from which the report gives advice


@dataclass
class MergeReport:
    """What `merge_adapters` did.

    adapters: {component: {name: weight}} that are in the weights now. layers: {component: number of merged layers}.
    error: ‖(merged − base) − ΔW‖ / ‖ΔW‖ over all layers of a component, Frobenius, after rounding to the base's dtype.
    unchanged: share of the weights that ΔW should have moved and that rounding left as they were.
    worst: {component: (path, its error)}.
    weights: {component.path: the merged weight in float32, on the CPU}, where a copy was asked for.
    """

    adapters: dict[str, dict[str, float]] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    unchanged: dict[str, float] = field(default_factory=dict)
    worst: dict[str, tuple[str, float]] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for component, names in self.adapters.items():
            said = ", ".join(f"{name} ({weight:g})" for name, weight in names.items())
            lines.append(
                f"{component}: {said} merged into {self.layers[component]} layers; the update is off by "
                f"{self.error[component]:.2g} of its size, {self.unchanged[component]:.0%} of the weights did not move"
            )
        if any(error > LOSS_WORTH_SAYING for error in self.error.values()):
            lines.append(
                "  the base's dtype is too coarse for this update: run the adapter unmerged, or keep the exact weights "
                "with keep_high_precision=True"
            )
        return "\n".join(lines)


@dataclass
class MergeAccount:
    """Sums over the layers of one component.

    wrong, total: squares of what rounding took from the update, and of the update. moved, still: weights that the
    update should have moved, and those of them that rounding left where they were. worst: (path, its error).
    """

    layers: int = 0
    wrong: float = 0.0
    total: float = 0.0
    moved: int = 0
    still: int = 0
    worst: tuple[str, float] = ("", -1.0)

    def write(self, report: MergeReport, component: str) -> None:
        report.layers[component] = self.layers
        report.error[component] = (self.wrong / self.total) ** 0.5 if self.total else 0.0
        report.unchanged[component] = self.still / self.moved if self.moved else 0.0
        report.worst[component] = self.worst


def merged_weight(
    component: str, path: str, layer: Any, base: torch.Tensor, weights: dict[str, float], account: MergeAccount
) -> tuple[torch.Tensor, torch.Tensor]:
    """W + Σ weight · ΔW as the layer stores its weight, rounded once to the dtype of `base`; and the same in fp32.

    layer: an adapted module that carries the adapters named in `weights`; base: its weight without them.
    Raises AdapterMismatchError for an update that has no weight of its own or leaves the dtype's range.
    """
    where = f"{component}.{path}"
    delta = _delta(where, layer, base, weights)
    matrix = base.t() if layer.transposed else base
    exact = matrix.float() + delta
    merged = exact.to(base.dtype)
    if not torch.isfinite(merged).all():
        raise AdapterMismatchError(f"{where} would leave the range of {base.dtype}: nothing was merged")
    wrong, total = float((merged.float() - matrix.float() - delta).square().sum()), float(delta.square().sum())
    account.layers, account.wrong, account.total = account.layers + 1, account.wrong + wrong, account.total + total
    account.moved += int((delta != 0).sum())
    account.still += int(((delta != 0) & (merged == matrix)).sum())
    if total and (wrong / total) ** 0.5 > account.worst[1]:
        account.worst = (path, (wrong / total) ** 0.5)
    return (merged.t(), exact.t()) if layer.transposed else (merged, exact)


def _delta(where: str, layer: Any, base: torch.Tensor, weights: dict[str, float]) -> torch.Tensor:
    """ΔW of all named adapters at one layer, float32, as (out, in, …)."""
    kind = layer_kind(layer)
    assert kind is not None, "adapters are installed in adaptable layers only"
    matrix = base.t() if layer.transposed else base
    delta = torch.zeros(matrix.shape, dtype=torch.float32, device=base.device)
    for name, weight in weights.items():
        part = layer.part(name)
        low = torch.zeros_like(delta)
        for a, b, sign in part.pairs():
            try:
                low += part.scale * sign * kind.delta(layer, a.float(), b.float())
            except ValueError as error:
                raise AdapterMismatchError(f"{where}: {error}, and cannot be merged") from None
        if part.lora_magnitude_vector is not None:
            gain = gain_over_base(matrix, part).view(-1, *[1] * (matrix.ndim - 1))
            low = (gain - 1) * matrix.float() + gain * low
        delta += weight * low
    return delta
