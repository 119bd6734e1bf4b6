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
from .components import components_of, resolve_path
from .describe import base_of, trigger_words
from .errors import AdapterMismatchError, ConfigError
from .files import read_adapter, write_adapter
from .fingerprint import compare, fingerprint
from .fit import Layer, fitted
from .hotswap import swap_in
from .inject import build_all, get_adapter
from .layers import LoraFactors
from .layers.learned_copy import check_copyable, make_copy
from .matching import component_for, match_component, mismatch
from .methods.peft_prompts import with_methods, with_prompts
from .methods.piece import Piece
from .methods.prompt_given import config_of_given
from .report import LoadReport, SaveReport
from .state import (
    adapter_names,
    check_layers,
    check_new_name,
    check_one_copy,
    holders,
    install,
    refuse_copies,
    refuse_pieces,
    state_of,
)
from .switch import check_weight
from .targets import nearest_words
from .tokens import check_tokens, install_tokens, refuse_tokens

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
    adapter = with_methods(path if isinstance(path, Adapter) else read_adapter(path))
    modules = components_of(target)
    if hotswap:
        name = name or "default"
        refuse_copies(holders(target, name), name, "swapped in place")
        refuse_pieces(holders(target, name), name, "swapped in place")
    else:
        name = _free_name(target, origin) if name is None else name
        check_new_name(target, name)
    _refuse_what_has_no_place(adapter, origin or "the adapter", hotswap)
    weights = _weights(weight, modules)
    report = LoadReport(name, origin, adapter.dialect, metadata=copy.deepcopy(adapter.metadata))
    report.notes, report.intact, report.made_for = list(adapter.notes), adapter.intact, base_of(adapter)
    report.trigger_words = trigger_words(adapter)
    matched: dict[str, dict[str, tuple[nn.Module, Layer]]] = {}
    sources: dict[str, str] = {}
    for source, layers in adapter.layers().items():
        component = component_for(source, adapter, target, modules)
        part, fitting = match_component(component, layers, modules)
        report.components[component] = part
        if fitting:
            matched[component], sources[component] = fitting, source
    report.refused_tokens = check_tokens(target, adapter.tokens)
    if (report.matched == 0 and adapter.layer_count()) or (strict and report.unmatched):
        raise AdapterMismatchError(mismatch(origin or "the adapter", report, modules))
    if strict or (report.matched == 0 and len(report.refused_tokens) == len(adapter.tokens)):
        refuse_tokens(report.refused_tokens, origin or "the adapter")
    report.base = {c: compare(adapter.bases.get(sources[c]), c, modules[c]) for c in matched}
    chosen = {component: _fitted(fitting, report) for component, fitting in matched.items()}
    if hotswap:
        given = {c: {where: low_rank for where, (_, low_rank) in low.items()} for c, low in chosen.items()}
        swap_in(target, name, adapter, given)
        return report
    copies = _copies(adapter, target, modules, dtype)
    for component, low in chosen.items():
        check_layers(name, {where: layer for where, (layer, _) in low.items()})
        state = state_of(modules[component])
        check_one_copy(state, state.weights if state is not None else (), copies.get(component, {}))
    prepared = {
        component: {
            where: (layer, _part(layer, low_rank, dtype or torch.float32)) for where, (layer, low_rank) in low.items()
        }
        for component, low in chosen.items()
    }
    pieces = _pieces(adapter, target, modules, name, weights, dtype or torch.float32)
    report.methods = {component: list(parts) for component, parts in pieces.items()}
    report.tokens = [word for word in adapter.tokens if word not in report.refused_tokens]
    words = {word: adapter.tokens[word] for word in report.tokens}
    vectors = install_tokens(target, name, words, dtype or torch.float32)
    for component in dict.fromkeys([*prepared, *copies, *vectors, *pieces]):
        low_ranks = {where: low_rank for where, (_, low_rank) in chosen.get(component, {}).items()}
        source = sources.get(component, component)
        config = adapter.configs.get(source) or inferred_config(low_ranks) if low_ranks else None
        if component in vectors:
            vectors[component].requires_grad_(False)
        install(modules[component], name, config, prepared.get(component, {}), copies.get(component),
                vectors.get(component), pieces.get(component))  # fmt: skip
        state = state_of(modules[component])
        assert state is not None, "the adapter was installed just before"
        state.adapters[name].metadata = copy.deepcopy(adapter.metadata)
        state.adapters[name].base = adapter.bases.get(source)
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

    A diffusers pipeline loads the result with `load_lora_weights`. The report names layers that learned nothing. A
    fingerprint of the base goes along, by which `load_adapter` tells whether it meets the same one again.
    Raises ConfigError if there is no such adapter.
    """
    adapter = get_adapter(target, name)
    modules = components_of(target)
    words = [component for vectors in adapter.tokens.values() for component in vectors]
    for component in dict.fromkeys([*adapter.components, *adapter.methods, *words]):
        if component not in adapter.bases:  # a base in shards can no longer be read, and has been before
            adapter.bases[component] = fingerprint(component, modules[component])
    if format == "peft":
        adapter = with_prompts(adapter, modules)
    write_adapter(adapter, path, format, metadata)
    return SaveReport(str(path), format, adapter.layer_count(), layers_without_effect(adapter))


def _refuse_what_has_no_place(adapter: Adapter, origin: str, hotswap: bool) -> None:
    """Raises AdapterMismatchError for what this version cannot put into a model, or not in place."""
    if adapter.layer_count() == 0 and not adapter.tokens and not adapter.methods:
        raise AdapterMismatchError(f"{origin} holds no layers: there is nothing to load")
    if hotswap and (adapter.copies or adapter.tokens or adapter.methods):
        what = "whole modules" if adapter.copies else "words" if adapter.tokens else "parts of other methods"
        raise AdapterMismatchError(f"the adapter brings {what}, which cannot be swapped in place")


def _fitted(matched: Mapping[str, tuple[nn.Module, Layer]], report: LoadReport) -> dict[str, tuple[nn.Module, LowRank]]:
    """Every layer as its module takes it; what that cost goes into the report's notes."""
    found: dict[str, tuple[nn.Module, LowRank]] = {}
    errors: dict[str, list[float]] = {}
    for where, (module, layer) in matched.items():
        low_rank, error = fitted(module, layer)
        found[where] = module, low_rank
        if not isinstance(layer, LowRank):
            errors.setdefault(layer.kind, []).append(error)
    for kind, values in errors.items():
        worst = f", largest relative error {max(values):.2g}" if max(values) else ", exactly"
        report.notes.append(f"{len(values)} layers of {kind} became products of two factors{worst}")
    return found


def _copies(
    adapter: Adapter, target: Any, modules: Mapping[str, nn.Module], dtype: torch.dtype | None
) -> dict[str, dict[str, tuple[nn.Module, nn.Module]]]:
    """{component: {path in the model: (module, the adapter's copy of it)}}.

    Raises AdapterMismatchError for a module that is not there or has other tensors: a whole module fits or does not.
    """
    found: dict[str, dict[str, tuple[nn.Module, nn.Module]]] = {}
    for source, copies in adapter.copies.items():
        component = component_for(source, adapter, target, modules)
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


def _pieces(
    adapter: Adapter,
    target: Any,
    modules: Mapping[str, nn.Module],
    name: str,
    weights: Mapping[str, float],
    dtype: torch.dtype,
) -> dict[str, dict[str, Piece]]:
    """{component: {kind: piece}}, attached, filled and not acting; their parameters do not want gradients.

    Raises AdapterMismatchError or ConfigError where one does not fit: a method fits whole or not at all.
    """
    sources = {component_for(source, adapter, target, modules): source for source in adapter.methods}
    for component, source in sources.items():
        if component not in modules:
            raise AdapterMismatchError(f"the adapter is for {source}, which the target does not have")
    configs = {
        component: [config_of_given(learned, modules[component]) for learned in adapter.methods[source].values()]
        for component, source in sources.items()
    }
    pieces = build_all(modules, configs, name, dtype)
    try:
        for component, source in sources.items():
            for kind, piece in pieces[component].items():
                piece.put(adapter.methods[source][kind].tensors)
                piece.check_weight(weights[component])
                for parameter in piece.parameters():
                    parameter.requires_grad_(False)
    except Exception:
        for parts in pieces.values():
            for piece in reversed(parts.values()):
                piece.remove()
        raise
    return pieces


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
