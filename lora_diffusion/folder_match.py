"""Whether an adapter fits a model folder, without loading the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from .adapter import Adapter
from .components import components_of
from .describe import base_of, trigger_words
from .errors import AdapterMismatchError
from .fingerprint import compare
from .fit import Layer
from .matching import component_for, match_component, mismatch
from .pipeline_folder import ComponentFolder, ModelFolder
from .report import LoadReport

Matched = dict[str, dict[str, tuple[nn.Module, Layer]]]


def match_folder(adapter: Adapter, folder: ModelFolder) -> tuple[LoadReport, Matched]:
    """What `load_adapter` would report, and {component: {path in the model: (module on the meta device, layer)}}."""
    modules = components_of(folder.skeleton)
    report = LoadReport("", None, adapter.dialect, metadata=copy.deepcopy(adapter.metadata), notes=list(adapter.notes))
    report.intact, report.made_for, report.trigger_words = adapter.intact, base_of(adapter), trigger_words(adapter)
    matched: Matched = {}
    for source, layers in adapter.layers().items():
        component = component_for(source, adapter, folder.skeleton, modules)
        report.components[component], matched[component] = match_component(component, layers, modules)
        if matched[component]:
            report.base[component] = _is_base(adapter.bases.get(source), folder.components[component])
    return report, matched


def check_complete(origin: str, report: LoadReport, folder: ModelFolder) -> None:
    """Raises AdapterMismatchError, in the words of `load_adapter`, if not every layer fits."""
    if not report.components:
        raise AdapterMismatchError(f"{origin} has no layers: there is nothing to put into {folder.path}")
    if report.matched == 0 or not report.complete:
        raise AdapterMismatchError(mismatch(origin, report, components_of(folder.skeleton)))


def _is_base(made_for: Any, folder: ComponentFolder) -> str:
    """`fingerprint.compare` with the few weights that it looks at read from the folder."""
    values = made_for.get("values") if isinstance(made_for, Mapping) else None
    if not isinstance(values, Mapping):
        return compare(made_for, folder.component, folder.module)
    tensors, filled = folder.tensors(), []
    try:
        for name in values:
            spelled = next((n for n in (name, str(name).removeprefix("text_model.")) if n in tensors), None)
            path, _, leaf = (spelled or "").rpartition(".")
            if spelled is not None and leaf == "weight":
                module = folder.module.get_submodule(path)
                filled.append((module, module._parameters["weight"]))
                module._parameters["weight"] = nn.Parameter(tensors[spelled], requires_grad=False)
        return compare(made_for, folder.component, folder.module)
    finally:
        for module, empty in filled:
            module._parameters["weight"] = empty
