"""Between files and models: load an adapter into a target, save one from it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter import MAX_NAME_LENGTH, Adapter, LowRank, inferred_config
from .checks import layers_without_effect
from .components import BARE, components_of, resolve_path
from .errors import AdapterMismatchError, ConfigError
from .files import read_adapter, write_adapter
from .hotswap import swap_in
from .inject import get_adapter
from .layers import LoraEmbedding, LoraFactors, layer_kind, why_not
from .layers.learned_copy import check_copyable, make_copy
from .report import ComponentReport, LoadReport, SaveReport
from .state import (
    adapter_names,
    check_layers,
    check_new_name,
    check_one_copy,
    holders,
    install,
    refuse_copies,
    state_of,
)
from .switch import check_weight
from .targets import nearest_words, weighted_modules

# File names that say nothing; the folder's name is used instead.
_GENERIC = ("adapter", "adapter_model", "pytorch_lora_weights", "lora", "model", "weights")


def load_adapter(
    target: Any,
    path: str | os.PathLike[str] | Adapter,
    name: str | None = None,
    weight: float | Mapping[str, float] = 1.0,
    strict: bool = True,
    *,
    dtype: torch.dtype | None = None,
    hotswap: bool = False,
) -> LoadReport:
    """Load an adapter file (or an Adapter in memory) and make it active, beside those that are active already.

    name: by default made from the file's name, or from its folder's where the file's says nothing ("adapter",
        "pytorch_lora_weights"); the report has it.
    weight: a number, or {component: number}.
    strict: refuse an adapter of which not every layer fits; with False load what fits, and say the rest in the report.
        An adapter of which nothing fits is always refused.
    dtype: of the factors in memory; fp32 by default.
    hotswap: put it into the room of the adapter `name` (see `reserve_adapter`) instead, in place; weights stay as they
        are. For code that was compiled.

    The factors do not require gradients; `adapter_parameters` gives them to whoever wants to train on.
    All or nothing: after an AdapterFormatError, AdapterMismatchError or ConfigError the target is as it was.
    """
    origin = None if isinstance(path, Adapter) else str(Path(path))
    adapter = path if isinstance(path, Adapter) else read_adapter(path)
    modules = components_of(target)
    if hotswap:
        name = name or "default"
        refuse_copies(holders(target, name), name, "swapped in place")
        if adapter.copies:
            raise AdapterMismatchError("the adapter brings whole modules, which cannot be swapped in place")
    else:
        name = _free_name(target, origin) if name is None else name
        check_new_name(target, name)
    weights = _weights(weight, modules)
    report = LoadReport(name, origin, adapter.dialect, {}, copy.deepcopy(adapter.metadata), list(adapter.notes))
    chosen: dict[str, dict[str, tuple[nn.Module, LowRank]]] = {}
    for source, layers in adapter.components.items():
        component = _component_for(source, adapter, target, modules)
        part, fitting = _match(component, layers, modules)
        report.components[component] = part
        if fitting:
            chosen[component] = fitting
    if report.matched == 0 or (strict and not report.complete):
        raise AdapterMismatchError(_mismatch(origin or "the adapter", report, modules))
    if hotswap:
        given = {c: {where: low_rank for where, (_, low_rank) in fitting.items()} for c, fitting in chosen.items()}
        swap_in(target, name, adapter, given)
        return report
    copies = _copies(adapter, target, modules, dtype)
    for component, fitting in chosen.items():
        check_layers(name, {where: layer for where, (layer, _) in fitting.items()})
        state = state_of(modules[component])
        check_one_copy(state, state.weights if state is not None else (), copies.get(component, {}))
    prepared = {
        component: {
            where: (layer, _part(layer, low_rank, dtype or torch.float32))
            for where, (layer, low_rank) in fitting.items()
        }
        for component, fitting in chosen.items()
    }
    for component, parts in prepared.items():
        layers = {where: low_rank for where, (_, low_rank) in chosen[component].items()}
        source = next(s for s in adapter.components if _component_for(s, adapter, target, modules) == component)
        install(modules[component], name, adapter.configs.get(source) or inferred_config(layers), parts,
                copies.get(component))  # fmt: skip
        state = state_of(modules[component])
        assert state is not None, "the adapter was installed just before"
        state.adapters[name].metadata = copy.deepcopy(adapter.metadata)
        state.weights[name] = weights[component]
        state.apply()
    return report


def save_adapter(
    target: Any,
    path: str | os.PathLike[str],
    name: str = "default",
    format: str = "diffusers",
    metadata: Mapping[str, Any] | None = None,
) -> SaveReport:
    """Write an adapter of the target to a file; see `write_adapter` for format, metadata and errors.

    A diffusers pipeline loads the result with `load_lora_weights`. The report names layers that learned nothing.
    Raises ConfigError if there is no such adapter.
    """
    adapter = get_adapter(target, name)
    write_adapter(adapter, path, format, metadata)
    return SaveReport(str(path), format, adapter.layer_count(), layers_without_effect(adapter))


def _copies(
    adapter: Adapter, target: Any, modules: Mapping[str, nn.Module], dtype: torch.dtype | None
) -> dict[str, dict[str, tuple[nn.Module, nn.Module]]]:
    """{component: {path in the model: (module, the adapter's copy of it)}}.

    Raises AdapterMismatchError for a module that is not there or has other tensors: a whole module fits or does not.
    """
    found: dict[str, dict[str, tuple[nn.Module, nn.Module]]] = {}
    for source, copies in adapter.copies.items():
        component = _component_for(source, adapter, target, modules)
        if component not in modules:
            raise AdapterMismatchError(f"the adapter brings modules for {source}, which the target does not have")
        available = dict(modules[component].named_modules())
        for path, values in copies.items():
            where = resolve_path(path, available)
            if where is None:
                raise AdapterMismatchError(f"{component}.{path}: {nearest_words(path, available)}")
            check_copyable(where, available[where])
            learned = make_copy(available[where]).requires_grad_(False)
            try:
                learned.load_state_dict(values)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                raise AdapterMismatchError(f"{component}.{path}: the adapter's copy does not fit ({reason})") from None
            found.setdefault(component, {})[where] = (available[where], learned)
    return found


def _component_for(source: str, adapter: Adapter, target: Any, modules: Mapping[str, nn.Module]) -> str:
    """A bare module of no particular kind takes an adapter of one component, whatever its name; and the reverse."""
    if isinstance(target, nn.Module) and len(adapter.components) == 1 and source not in modules:
        (only,) = modules
        if BARE in (only, source):
            return only
    return source


def _match(
    component: str, layers: Mapping[str, LowRank], modules: Mapping[str, nn.Module]
) -> tuple[ComponentReport, dict[str, tuple[nn.Module, LowRank]]]:
    report = ComponentReport()
    fitting: dict[str, tuple[nn.Module, LowRank]] = {}
    available = weighted_modules(modules[component]) if component in modules else {}
    for path, low_rank in layers.items():
        where = resolve_path(path, available)
        if component not in modules:
            report.unmatched[path] = f"the target has no {component}"
        elif where is None:
            report.unmatched[path] = "the model has no such module"
        elif (reason := _unfit(available[where], low_rank)) is not None:
            report.unmatched[path] = reason
        else:
            fitting[where] = (available[where], low_rank)
            report.matched.append(where)
            report.ranks[low_rank.rank] += 1
            report.alphas[low_rank.alpha] += 1
    return report, fitting


def _unfit(module: nn.Module, low_rank: LowRank) -> str | None:
    kind = layer_kind(module)
    if kind is None:
        return why_not(module)
    magnitude = low_rank.magnitude
    if magnitude is not None and tuple(magnitude.shape) != (low_rank.b.shape[0],):
        return f"DoRA's magnitude has shape {tuple(magnitude.shape)}, the module needs ({low_rank.b.shape[0]},)"
    if magnitude is not None and issubclass(kind, LoraEmbedding):
        return "it is an embedding, which this version does not adapt with DoRA"
    return kind.misfit(module, low_rank.a, low_rank.b)


def _mismatch(origin: str, report: LoadReport, modules: Mapping[str, nn.Module]) -> str:
    """One line: counts per component, the first layer that does not fit and why, the names nearest to it."""
    counts = ", ".join(f"{len(p.matched)} of {p.total} in {c}" for c, p in report.components.items())
    component, part = next((c, p) for c, p in report.components.items() if p.unmatched)
    path, reason = next(iter(part.unmatched.items()))
    hint = ""
    if component in modules and reason == "the model has no such module":
        hint = f"; {nearest_words(path, weighted_modules(modules[component]))}"
    advice = " (strict=False loads the layers that fit)" if report.matched else ""
    return f"{origin} does not fit the target: {counts} layers fit; {component}.{path}: {reason}{hint}{advice}"


def _part(layer: nn.Module, low_rank: LowRank, dtype: torch.dtype) -> LoraFactors:
    device = layer.weight.device
    a, b = (tensor.detach().to(device, dtype, copy=True) for tensor in (low_rank.a, low_rank.b))
    magnitude = None if low_rank.magnitude is None else low_rank.magnitude.detach().to(device, dtype, copy=True)
    part = LoraFactors(a, b, low_rank.scale, magnitude=magnitude)
    part.requires_grad_(False)
    return part


def _weights(weight: float | Mapping[str, float], modules: Mapping[str, nn.Module]) -> dict[str, float]:
    if not isinstance(weight, Mapping):
        return dict.fromkeys(modules, check_weight(weight))
    unknown = [component for component in weight if component not in modules]
    if unknown:
        raise ConfigError(
            f"weight for {', '.join(map(repr, unknown))}: the target's components are {', '.join(modules)}"
        )
    return {component: check_weight(weight.get(component, 1.0)) for component in modules}


def _free_name(target: Any, origin: str | None) -> str:
    """A name from the file's, made usable and unique ("dog", "dog-2" …)."""
    path = Path(origin).absolute() if origin else Path("default")
    stem = path.parent.name if path.stem in _GENERIC and path.parent.name else path.stem
    stem = re.sub(r"[^\w-]+", "-", stem).strip("-")[: MAX_NAME_LENGTH - 8] or "default"
    taken = set(adapter_names(target))
    candidates = [stem, *(f"{stem}-{n}" for n in range(2, len(taken) + 3))]
    return next(candidate for candidate in candidates if candidate not in taken)
