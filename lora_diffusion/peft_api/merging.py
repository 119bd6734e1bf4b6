"""A model with adapters in its weights for good, learned heads included."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn

from ..errors import LoraDiffusionError
from ..exchange import load_adapter
from ..inject import delete_adapter, get_adapter, unload
from ..merge import merge_adapters
from ..state import adapter_names, states
from ..switch import active_adapters, set_adapters

_MERGING = "-merging"


def merge_for_good(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Put adapters (by default those that act) into the base weights, their learned heads in the place of the base's,
    and take everything else out.

    Raises ConfigError or AdapterMismatchError; the model is then as it was.
    """
    weights = {name: next(iter(by_component.values())) for name, by_component in active_adapters(model).items()}
    chosen = list(weights) if names is None else list(names)
    heads = _heads(model, chosen)
    if any(heads.values()):
        _merge_without_heads(model, chosen, weights)
    else:
        merged = [name for state in states(model).values() for name in (state.merged.adapters if state.merged else ())]
        if names is not None or not merged or weights:
            merge_adapters(model, None if names is None else chosen)
    unload(model, keep_merged=True)
    for path, values in heads.items():
        model.get_submodule(path).load_state_dict(values)


def _heads(model: nn.Module, names: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """{path: tensors} of the whole modules that the adapters learned."""
    found = {}
    for state in states(model).values():
        for name in names:
            for path, module in state.adapters[name].copies.items() if name in state.adapters else ():
                learned = module.learned(name).state_dict()
                found[path] = {key: value.detach().clone() for key, value in learned.items()}
    return found


def _merge_without_heads(model: nn.Module, names: list[str], weights: dict[str, float]) -> None:
    """Merge the low-rank terms alone, as adapters for the time being beside those that have heads too."""
    added: list[str] = []
    try:
        for name in names:
            terms = dataclasses.replace(get_adapter(model, name), copies={})
            if terms.components or terms.methods:
                load_adapter(model, terms, name + _MERGING, weights.get(name, 1.0))
                added.append(name + _MERGING)
        if added:
            merge_adapters(model, added)
    except LoraDiffusionError:
        for name in added:
            if name in adapter_names(model):
                delete_adapter(model, name)
        set_adapters(model, list(weights), list(weights.values()))
        raise
