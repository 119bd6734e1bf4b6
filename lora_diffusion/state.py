"""What a component knows about its adapters: which there are, where, how they were made, which are on.

One `ComponentState` hangs on each module that was given as a target (or as part of a pipeline), as a plain attribute;
it is gone when the last adapter is. Switching and weighing walk its list of layers, never the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .adapter import check_adapter_name
from .components import components_of
from .config import LoraConfig
from .errors import ConfigError
from .layers import AdaptedModule, LoraFactors, LoraLinear, attach, detach, layer_kind
from .layers.group import InputGroup, find_groups
from .layers.host import check_not_hooked
from .layers.learned_copy import CopiedModule, add_copy, remove_copy
from .layers.rows import RowPlan
from .layers.virtual_tokens import TokenVectors
from .methods.piece import Piece
from .tokens import uninstall_tokens

_ATTRIBUTE = "_lora_diffusion"


@dataclass
class Installed:
    """One adapter as it sits in a component: its config, its layers by the model's own paths, free metadata.

    config: None where the adapter only brings words.
    copies: modules that it learns whole copies of, by path. vectors: of words that it brings or learns.
    pieces: {kind: what a method other than low rank has put in}.
    base: fingerprint of the model that it was made for, where its file had one.
    gain: () float32, the adapter's weight where it acts and else 0; all its parts hold this one tensor.
    """

    config: LoraConfig | None
    layers: dict[str, Any]
    copies: dict[str, Any] = field(default_factory=dict)
    vectors: TokenVectors | None = None
    pieces: dict[str, Piece] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] | None = None
    gain: torch.Tensor = field(default_factory=lambda: torch.zeros(()))


@dataclass
class ComponentState:
    """adapters: all that are in the component; weights: the active ones; disabled: depth of `disable_adapters`;
    frozen: names of base parameters that wanted gradients before `add_adapter` froze them; merged: what `merge.py` put
    into the base weights, None where nothing is; per_sample: each row's adapter inside `adapters_per_sample`; beside:
    larger batches have a row's copies side by side (see `layers/rows.py`)."""

    adapters: dict[str, Installed] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    disabled: int = 0
    frozen: list[str] = field(default_factory=list)
    merged: Merged | None = None
    per_sample: list[str | None] | None = None
    beside: bool = False
    _carriers: list[tuple[Any, list[str]]] = field(default_factory=list)

    def apply(self) -> None:
        """Bring the layers in line with `weights`, `disabled` and `merged`."""
        acting = {} if self.disabled else self.weights
        if self.merged is not None:
            self.merged.show(not self.disabled)
            acting = {name: weight for name, weight in acting.items() if name not in self.merged.adapters}
        for name, installed in self.adapters.items():
            installed.gain.fill_(acting.get(name, 0.0))
            for module in installed.copies.values():
                if acting.get(name):
                    module._acting = name
                elif module._acting == name:
                    module._acting = None
            if self.per_sample is None or self.disabled:
                for piece in installed.pieces.values():
                    piece.act(acting.get(name, 0.0))
        for layer, names in self._carriers:
            off = {name: None for name in names if name not in acting}
            layer.set_weights({**off, **{name: weight for name, weight in acting.items() if name in names}})
        self._plan_rows()

    def _plan_rows(self) -> None:
        """Give the layers their plans for a batch of mixed adapters, or take them away."""
        rows = None if self.disabled else self.per_sample
        names = list(dict.fromkeys(name for name in rows or [] if name is not None))
        weights = torch.tensor([self.weights.get(name, 1.0) for name in names])
        choice = torch.tensor([[float(name == row) for name in names] for row in rows or []])
        made: dict[Any, torch.Tensor] = {}
        for layer, carried in self._carriers:
            layer._rows = None
            if rows is None:
                continue
            layer.set_weights(dict.fromkeys(carried))
            here = [k for k, name in enumerate(names) if name in carried]
            if here:
                parts = tuple((layer.part(names[k]), layer.part(names[k]).scale) for k in here)
                layer._rows = RowPlan(parts, choice[:, here] * weights[here], made, self.beside)
        for name, installed in self.adapters.items():
            for piece in installed.pieces.values():
                if rows is None:
                    piece.act_in_rows(None)
                elif name in names:
                    piece.act_in_rows([self.weights.get(name, 1.0) * (row == name) for row in rows])
                else:
                    piece.act(0.0)

    def arrange(self, component: nn.Module) -> None:
        """Bring the lists of layers, and which of them share their input, in line with `adapters`."""
        carriers: dict[int, tuple[Any, list[str]]] = {}
        paths: dict[str, Any] = {}
        for name, installed in self.adapters.items():
            for path, layer in installed.layers.items():
                carriers.setdefault(id(layer), (layer, []))[1].append(name)
                paths[path] = layer
        self._carriers = list(carriers.values())
        linear = {path: layer for path, layer in paths.items() if isinstance(layer, LoraLinear)}
        for layer in linear.values():
            layer._group = None
        for members in find_groups(component, linear):
            group = InputGroup(members)
            for layer in members:
                layer._group = group


@dataclass
class Merged:
    """Adapters that live in the base weights for the time being.

    adapters: {name: weight}. weights: (layer, the base's own parameter, the merged one) of every layer concerned.
    """

    adapters: dict[str, float]
    weights: list[tuple[nn.Module, nn.Parameter, nn.Parameter]]

    def show(self, merged: bool) -> None:
        """Put the merged parameters in place, or the base's own: pointers move, nothing is computed."""
        for layer, own, with_adapters in self.weights:
            layer._parameters["weight"] = with_adapters if merged else own


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
    component: nn.Module,
    name: str,
    config: LoraConfig | None,
    parts: Mapping[str, tuple[nn.Module, LoraFactors]],
    copies: Mapping[str, tuple[nn.Module, nn.Module]] | None = None,
    vectors: TokenVectors | None = None,
    pieces: Mapping[str, Piece] | None = None,
) -> None:
    """Put {path: (layer, part)} and {path: (module, learned copy)} into a component as the adapter `name`, inactive.

    vectors: of its words, which `tokens.install_tokens` has put in place. pieces: which `methods.registry.build` has.

    Check with `check_layers` and `check_copyable` before.
    """
    copies = copies or {}
    layers = {path: layer for path, (layer, _) in parts.items()}
    installed = Installed(config, layers, {path: module for path, (module, _) in copies.items()}, vectors)
    installed.pieces.update(pieces or {})
    for module, learned in copies.values():
        add_copy(module, name, learned)
    for layer, part in parts.values():
        mixin = layer_kind(layer)
        assert mixin is not None, "install() is called with layers that layer_kind() accepted"
        attach(layer, mixin)
        part.gain = installed.gain
        layer.add_part(name, part)
    if state_of(component) is None:
        setattr(component, _ATTRIBUTE, ComponentState())
    state = component.__dict__[_ATTRIBUTE]
    state.adapters[name] = installed
    state.arrange(component)


def take_back(state: ComponentState) -> None:
    """Undo a merge: the base's own parameters are in place again, and the adapters act beside them."""
    if state.merged is not None:
        state.merged.show(False)
        state.merged = None
        state.apply()


def refuse_merged(found: Mapping[str, ComponentState], name: str) -> None:
    """Raises ConfigError if the adapter `name` lives in the base weights of a component."""
    if any(state.merged is not None and name in state.merged.adapters for state in found.values()):
        raise ConfigError(f"adapter {name!r} is merged into the base weights: call unmerge_adapters first")


def check_one_copy(state: ComponentState | None, names: Iterable[str], paths: Iterable[str] = ()) -> None:
    """Raises ConfigError if two of the adapters `names`, and a new one with copies at `paths`, learned one module."""
    owners = dict.fromkeys(paths, "the new one")
    for name in names if state is not None else ():
        assert state is not None, "asked in the line above"
        for path in state.adapters[name].copies if name in state.adapters else ():
            if path in owners:
                raise ConfigError(
                    f"adapter {name!r} and {owners[path]} both bring a module of their own for {path}: "
                    "only one of them can act, choose with set_adapters"
                )
            owners[path] = repr(name)


def refuse_copies(found: Mapping[str, ComponentState], name: str, what: str) -> None:
    """Raises ConfigError if the adapter `name` brings whole modules, for which `what` means nothing."""
    for state in found.values():
        for path in state.adapters[name].copies:
            raise ConfigError(f"adapter {name!r} brings a whole module of its own for {path}, which cannot be {what}")


def refuse_pieces(found: Mapping[str, ComponentState], name: str, what: str) -> None:
    """Raises ConfigError if the adapter `name` has parts of other methods, for which `what` means nothing."""
    for state in found.values():
        for kind in state.adapters[name].pieces:
            raise ConfigError(f"adapter {name!r} has a part of the kind {kind}, which cannot be {what}")


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
    for module in state.adapters[name].copies.values():
        remove_copy(module, name)
    for piece in reversed(state.adapters[name].pieces.values()):
        piece.act(0.0)
        piece.remove()
    if state.adapters[name].vectors is not None:
        uninstall_tokens(component, name)
    for layer in layers.values():
        layer.remove_part(name)
        if not layer.part_names():
            detach(layer)
    del state.adapters[name]
    state.weights.pop(name, None)
    state.arrange(component)
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
    for installed in state.adapters.values():
        ours |= {id(parameter) for piece in installed.pieces.values() for parameter in piece.parameters()}
    for path, parameter in component.named_parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            parameter.requires_grad_(False)
            state.frozen.append(path)


def _adapter_parameters(component: nn.Module) -> Iterator[nn.Parameter]:
    for module in component.modules():
        if isinstance(module, TokenVectors):
            yield from module.parameters()
        elif isinstance(module, AdaptedModule):
            for part in module.all_parts():
                yield from part.parameters()
        elif isinstance(module, CopiedModule):
            for name in module.copy_names():
                yield from module.learned(name).parameters()
