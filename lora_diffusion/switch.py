"""Which adapters act, and how strongly. Nothing is created or moved here: numbers change, and lists of active parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .components import components_of
from .config import is_number
from .errors import ConfigError
from .state import adapter_names, check_one_copy, holders, refuse_merged, states

Weight = float | Mapping[str, float]


def set_adapters(
    target: Any,
    names: str | Sequence[str],
    weights: Weight | Sequence[Weight] | Mapping[str, float | Sequence[float]] | None = None,
) -> None:
    """Make exactly the named adapters active; an empty list leaves none.

    weights: one number for all; a list, one entry per name, each a number or {component: number}; or
    {component: number or list with one number per name}. A component that is not mentioned gets 1, and so does
    everything when `weights` is None. Negative weights subtract, 0 switches off.
    Raises ConfigError for unknown names, lengths that differ, weights that are no finite numbers.
    """
    names = [names] if isinstance(names, str) else list(names)
    if len(set(names)) != len(names):
        raise ConfigError(f"names={names}: each adapter once")
    for name in names:
        refuse_merged(holders(target, name), name)
    for state in states(target).values():
        check_one_copy(state, names)
    everywhere = {component: _weights_for(component, names, weights, target) for component in states(target)}
    for component, state in states(target).items():
        for name, weight in zip(names, everywhere[component]):
            for piece in state.adapters[name].pieces.values() if name in state.adapters else ():
                piece.check_weight(weight)
    for component, state in states(target).items():
        state.weights = {name: w for name, w in zip(names, everywhere[component]) if name in state.adapters}
        state.apply()


def active_adapters(target: Any) -> dict[str, dict[str, float]]:
    """{adapter: {component: weight}} of what acts now; empty inside `disable_adapters`."""
    active: dict[str, dict[str, float]] = {}
    for component, state in states(target).items():
        if not state.disabled:
            for name, weight in state.weights.items():
                active.setdefault(name, {})[component] = weight
    return active


def list_adapters(target: Any) -> dict[str, list[str]]:
    """{adapter: components that it is in}, active or not, in the order in which they came."""
    return {name: list(holders(target, name)) for name in adapter_names(target)}


@contextmanager
def disable_adapters(target: Any) -> Iterator[None]:
    """Within the context the target computes what its base computes. Contexts nest; weights set inside act after it."""
    concerned = list(states(target).values())
    for state in concerned:
        state.disabled += 1
    try:
        for state in concerned:
            state.apply()
        yield
    finally:
        for state in concerned:
            state.disabled -= 1
            state.apply()


def check_weight(value: object) -> float:
    """A finite number as a float. Raises ConfigError."""
    if not is_number(value):
        raise ConfigError(f"weight {value!r}: give a finite number (1 is full strength, 0 is none)")
    return float(value)


def _weights_for(component: str, names: list[str], weights: Any, target: Any) -> list[float]:
    """The weight of each name in one component."""
    if isinstance(weights, Mapping):
        _check_component_names(weights, target)
        weights = weights.get(component, 1.0)
    if weights is None:
        weights = 1.0
    if isinstance(weights, Sequence) and not isinstance(weights, str):
        if len(weights) != len(names):
            raise ConfigError(f"{len(weights)} weights for {len(names)} adapters ({', '.join(names)}): give one each")
        return [_one_weight(component, weight, target) for weight in weights]
    return [check_weight(weights)] * len(names)


def _one_weight(component: str, weight: Any, target: Any) -> float:
    if isinstance(weight, Mapping):
        _check_component_names(weight, target)
        weight = weight.get(component, 1.0)
    return check_weight(weight)


def _check_component_names(weights: Mapping[str, Any], target: Any) -> None:
    there = components_of(target)
    unknown = [name for name in weights if name not in there]
    if unknown:
        raise ConfigError(
            f"weights for {', '.join(map(repr, unknown))}: the target's components are {', '.join(there)}"
        )
