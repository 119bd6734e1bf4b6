"""What a component knows about its adapters: which there are, where, how they were made, which are on.

One `ComponentState` hangs on each module that was given as a target (or as part of a pipeline), as a plain attribute;
it is gone when the last adapter is. Switching and weighing walk its list of layers, never the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .adapter import check_adapter_name
from .components import components_of
from .config import LoraConfig
from .errors import ConfigError
from .layers import AdaptedModule, attach, detach, layer_kind
from .layers.host import check_not_hooked

_ATTRIBUTE = "_lora_diffusion"


@dataclass
class Installed:
    """One adapter as it sits in a component: its config, its layers by the model's own paths, free metadata."""

    config: LoraConfig
    layers: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class ComponentState:
    """adapters: all that are in the component; weights: the active ones; disabled: depth of `disable_adapters`;
    frozen: names of base parameters that wanted gradients before `add_adapter` froze them."""

    adapters: dict[str, Installed] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    disabled: int = 0
    frozen: list[str] = field(default_factory=list)

    def apply(self) -> None:
        """Bring the layers in line with `weights` and `disabled`."""
        for name, installed in self.adapters.items():
            weight = None if self.disabled else self.weights.get(name)
            for layer in installed.layers.values():
                layer.set_weight(name, weight)


def state_of(component: nn.Module) -> ComponentState | None:
    return component.__dict__.get(_ATTRIBUTE)


def states(target: Any) -> dict[str, ComponentState]:
    """{component name: state} of the components that carry adapters."""
    found = {name: state_of(module) for name, module in components_of(target).items()}
    return {name: state for name, state in found.items() if state is not None}


def adapter_names(target: Any) -> list[str]:
    """All adapters of a target, in the order in which they came."""
    return list(dict.fromkeys(name for state in states(target).values() for name in state.adapters))


def holders(target: Any, name: str) -> dict[str, ComponentState]:
    """The components that carry the adapter `name`. Raises ConfigError, listing what there is, if none does."""
    found = {component: state for component, state in states(target).items() if name in state.adapters}
    if not found:
        names = adapter_names(target)
        there = f"there are {', '.join(map(repr, names))}" if names else "there is none: add or load one first"
        raise ConfigError(f"no adapter {name!r}; {there}")
    return found


def check_new_name(target: Any, name: str) -> None:
    """Raises ConfigError for a name that cannot be used or is taken."""
    check_adapter_name(name)
    if name in adapter_names(target):
        raise ConfigError(f"an adapter {name!r} is there already: delete it first or give another name")


def check_layers(name: str, layers: Mapping[str, nn.Module]) -> None:
    """Whether an adapter could be put into these modules. Raises ConfigError or AdapterMismatchError."""
    for path, layer in layers.items():
        if isinstance(layer, AdaptedModule):
            if name in layer.part_names():
                raise ConfigError(f"{path} has an adapter {name!r} already, given to it through another target")
        else:
            check_not_hooked(path, layer)


def install(
    component: nn.Module, name: str, config: LoraConfig, parts: Mapping[str, tuple[nn.Module, nn.Module]]
) -> None:
    """Put {path: (layer, part)} into a component as the adapter `name`, inactive. Check with `check_layers` before."""
    for layer, part in parts.values():
        mixin = layer_kind(layer)
        assert mixin is not None, "install() is called with layers that layer_kind() accepted"
        attach(layer, mixin)
        layer.add_part(name, part)
    if state_of(component) is None:
        setattr(component, _ATTRIBUTE, ComponentState())
    state = component.__dict__[_ATTRIBUTE]
    state.adapters[name] = Installed(config, {path: layer for path, (layer, _) in parts.items()})


def check_removable(component: nn.Module, name: str) -> None:
    """Raises AdapterMismatchError if hooks hide the forward of a layer that would get its own class back."""
    for path, layer in component.__dict__[_ATTRIBUTE].adapters[name].layers.items():
        if layer.part_names() == [name]:
            check_not_hooked(path, layer)


def remove(component: nn.Module, name: str) -> None:
    """Take an adapter out. A layer without adapters, and a component without any, is what it was before the first.

    Check with `check_removable` before.
    """
    state = component.__dict__[_ATTRIBUTE]
    layers = state.adapters[name].layers
    for layer in layers.values():
        layer.remove_part(name)
        if not layer.part_names():
            detach(layer)
    del state.adapters[name]
    state.weights.pop(name, None)
    if not state.adapters:
        parameters = dict(component.named_parameters())
        for path in state.frozen:
            if path in parameters:
                parameters[path].requires_grad_(True)
        delattr(component, _ATTRIBUTE)


def freeze_base(component: nn.Module) -> None:
    """Stop gradients to everything in the component but adapters; `remove` undoes it with the last adapter."""
    state = component.__dict__[_ATTRIBUTE]
    ours = {id(parameter) for parameter in _adapter_parameters(component)}
    for path, parameter in component.named_parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            parameter.requires_grad_(False)
            state.frozen.append(path)


def _adapter_parameters(component: nn.Module) -> Iterator[nn.Parameter]:
    for module in component.modules():
        if isinstance(module, AdaptedModule):
            for name in module.part_names():
                yield from module.part(name).parameters()
