"""Adapters into the base weights and out again, with an account of what the rounding cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .components import components_of
from .errors import AdapterMismatchError, ConfigError
from .layers import layer_kind
from .layers.dora import gain_over_base
from .layers.quantised import is_quantised
from .state import ComponentState, Merged, holders, refuse_copies, state_of, states, take_back

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


@torch.no_grad()
def merge_adapters(
    target: Any, names: str | Iterable[str] | None = None, *, keep_high_precision: bool = False
) -> MergeReport:
    """Add adapters to the base weights: W + ΔW in float32, rounded to the base's dtype once. Sampling then costs what
    the base costs.

    names: of adapters to merge, each with its weight (1 where it is not active); by default all active ones. Adapters
        that are merged already stay so; everything is computed anew from the base weights.
    keep_high_precision: also return the merged weights in float32, on the CPU, in the report.

    The base's own parameters are kept beside the merged ones (as much memory again for the layers concerned), so that
    `unmerge_adapters` gives back every bit, `disable_adapters` still shows the base, and a weight that is tied to
    another module stays as it is there.
    Raises ConfigError (unknown adapter, none active) or AdapterMismatchError (a quantised base, a convolution with
    groups under an adapter that mixes them, a weight beyond its dtype's range); the target is then as it was.
    """
    chosen = _chosen(target, names)
    report = MergeReport()
    planned: dict[str, Merged] = {}
    modules = components_of(target)
    for component, weights in chosen.items():
        state = state_of(modules[component])
        assert state is not None, "_chosen() looks at components with adapters only"
        planned[component] = _merge_component(component, state, weights, report, keep_high_precision)
    for component, merged in planned.items():
        state = state_of(modules[component])
        assert state is not None, "as above"
        take_back(state)
        state.merged = merged
        state.weights = {name: weight for name, weight in state.weights.items() if name not in merged.adapters}
        state.apply()
    return report


def unmerge_adapters(target: Any) -> None:
    """Put the base's own parameters back, bit for bit; the adapters that were merged act beside them again, with the
    weights that they were merged with. Raises ConfigError if nothing is merged."""
    found = [state for state in states(target).values() if state.merged is not None]
    if not found:
        raise ConfigError("no adapter is merged: nothing to undo")
    for state in found:
        assert state.merged is not None, "chosen so just before"
        weights = {**state.merged.adapters, **state.weights}
        take_back(state)
        state.weights = weights
        state.apply()


def _chosen(target: Any, names: str | Iterable[str] | None) -> dict[str, dict[str, float]]:
    """{component: {adapter: weight}} of all that should be in the weights afterwards."""
    wanted = [names] if isinstance(names, str) else None if names is None else list(names)
    for name in wanted or []:
        holders(target, name)
    chosen = {}
    for component, state in states(target).items():
        before = state.merged.adapters if state.merged is not None else {}
        mine = list(state.weights) if wanted is None else [name for name in wanted if name in state.adapters]
        added = {name: state.weights.get(name, 1.0) for name in mine if name not in before}
        for name in added:
            refuse_copies({component: state}, name, "merged")
        if added:
            chosen[component] = {**before, **added}
    if not chosen:
        raise ConfigError("no adapter to merge: none is active that is not merged already")
    return chosen


def _merge_component(
    component: str, state: ComponentState, weights: dict[str, float], report: MergeReport, keep: bool
) -> Merged:
    own = {id(layer): parameter for layer, parameter, _ in state.merged.weights} if state.merged is not None else {}
    layers: dict[int, tuple[str, Any]] = {}
    for name in weights:
        for path, layer in state.adapters[name].layers.items():
            layers[id(layer)] = (path, layer)
    out: list[tuple[nn.Module, nn.Parameter, nn.Parameter]] = []
    wrong = total = moved = still = 0.0
    worst = ("", -1.0)
    for path, layer in layers.values():
        base = own.get(id(layer), layer._parameters["weight"])
        if is_quantised(base):
            raise AdapterMismatchError(f"{component}.{path} has quantised weights, which nothing can be added to: "
                                       "load the base in a floating dtype to merge")  # fmt: skip
        delta = _delta(
            f"{component}.{path}", layer, base, {n: w for n, w in weights.items() if n in layer.part_names()}
        )
        exact = (base.t() if layer.transposed else base).float() + delta
        merged = exact.to(base.dtype)
        if not torch.isfinite(merged).all():
            raise AdapterMismatchError(f"{component}.{path} would leave the range of {base.dtype}: nothing was merged")
        matrix = base.t() if layer.transposed else base
        error, size = float((merged.float() - matrix.float() - delta).square().sum()), float(delta.square().sum())
        wrong, total = wrong + error, total + size
        moved += float((delta != 0).sum())
        still += float(((delta != 0) & (merged == matrix)).sum())
        if size and (error / size) ** 0.5 > worst[1]:
            worst = (path, (error / size) ** 0.5)
        stored = merged.t() if layer.transposed else merged
        parameter = nn.Parameter(stored.contiguous(memory_format=_format(base)), requires_grad=False)
        out.append((layer, base, parameter))
        if keep:
            report.weights[f"{component}.{path}"] = (exact.t() if layer.transposed else exact).cpu()
    report.adapters[component] = weights
    report.layers[component] = len(out)
    report.error[component] = (wrong / total) ** 0.5 if total else 0.0
    report.unchanged[component] = still / moved if moved else 0.0
    report.worst[component] = worst
    return Merged(weights, out)


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


def _format(weight: torch.Tensor) -> torch.memory_format:
    channels_last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last and not weight.is_contiguous() else torch.contiguous_format
