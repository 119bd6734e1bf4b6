"""Adapters into the base weights and out again, with an account of what the rounding cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .components import components_of
from .errors import AdapterMismatchError, ConfigError
from .layers.quantised import is_quantised
from .merge_layer import MergeAccount, MergeReport, merged_weight
from .state import ComponentState, Merged, holders, refuse_copies, refuse_pieces, state_of, states, take_back


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
            refuse_pieces({component: state}, name, "merged")
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
    account = MergeAccount()
    for path, layer in layers.values():
        for name, installed in state.adapters.items():
            if any(piece.replaces(layer) for piece in installed.pieces.values()):
                raise ConfigError(f"adapter {name!r} learns {component}.{path} itself, which cannot be merged into as "
                                  "well: delete it first")  # fmt: skip
        base = own.get(id(layer), layer._parameters["weight"])
        if is_quantised(base):
            raise AdapterMismatchError(f"{component}.{path} has quantised weights, which nothing can be added to: "
                                       "load the base in a floating dtype to merge")  # fmt: skip
        acting = {name: weight for name, weight in weights.items() if name in layer.part_names()}
        stored, exact = merged_weight(component, path, layer, base, acting, account)
        parameter = nn.Parameter(stored.contiguous(memory_format=_format(base)), requires_grad=False)
        out.append((layer, base, parameter))
        if keep:
            report.weights[f"{component}.{path}"] = exact.cpu()
    report.adapters[component] = weights
    account.write(report, component)
    return Merged(weights, out)


def _format(weight: torch.Tensor) -> torch.memory_format:
    channels_last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last and not weight.is_contiguous() else torch.contiguous_format
