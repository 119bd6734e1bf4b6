"""An adapter against a model: which component it goes to, which layers fit, and what to say of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .adapter import Adapter
from .components import BARE, resolve_path
from .fit import Layer, misfit
from .report import ComponentReport, LoadReport
from .targets import nearest_words, weighted_modules


def component_for(source: str, adapter: Adapter, target: Any, modules: Mapping[str, nn.Module]) -> str:
    """A bare module of no particular kind takes an adapter of one component, whatever its name; and the reverse. One
    text encoder takes what was made for another: whether the widths fit is seen later."""
    if isinstance(target, nn.Module) and len({*adapter.layers(), *adapter.methods}) == 1 and source not in modules:
        (only,) = modules
        if BARE in (only, source) or all(name.startswith("text_encoder") for name in (only, source)):
            return only
    return source


def match_component(
    component: str, layers: Mapping[str, Layer], modules: Mapping[str, nn.Module]
) -> tuple[ComponentReport, dict[str, tuple[nn.Module, Layer]]]:
    """Which of a component's layers fit the model and why the others do not; {path in the model: (module, layer)}."""
    report = ComponentReport()
    fitting: dict[str, tuple[nn.Module, Layer]] = {}
    available = weighted_modules(modules[component]) if component in modules else {}
    for path, layer in layers.items():
        where = resolve_path(path, available)
        if component not in modules:
            report.unmatched[path] = f"the target has no {component}"
        elif where is None:
            report.unmatched[path] = "the model has no such module"
        elif (reason := misfit(available[where], layer)) is not None:
            report.unmatched[path] = reason
        else:
            fitting[where] = (available[where], layer)
            report.matched.append(where)
            report.ranks[layer.rank] += 1
            report.alphas[layer.scale * layer.rank] += 1
            report.scales[layer.scale] += 1
    return report, fitting


def mismatch(origin: str, report: LoadReport, modules: Mapping[str, nn.Module]) -> str:
    """One line: counts per component, the first layer that does not fit and why, the names nearest to it."""
    counts = ", ".join(f"{len(p.matched)} of {p.total} in {c}" for c, p in report.components.items())
    component, part = next((c, p) for c, p in report.components.items() if p.unmatched)
    path, reason = next(iter(part.unmatched.items()))
    hint = ""
    if component in modules and reason == "the model has no such module":
        hint = f"; {nearest_words(path, weighted_modules(modules[component]))}"
    advice = " (strict=False loads the layers that fit)" if report.matched else ""
    return f"{origin} does not fit the target: {counts} layers fit; {component}.{path}: {reason}{hint}{advice}"
