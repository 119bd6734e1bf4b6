"""Parameters of the base: where they stand, and where they wait while others have their place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layers.host import AdaptedModule
from ..layers.learned_copy import CopiedModule

_OURS = __name__.partition(".")[0]


@dataclass
class Place:
    """Where one parameter stands; more than once where it is tied.

    path: its first name in the component. owners: (module, name in it). module: the first owner.
    """

    path: str
    owners: list[tuple[nn.Module, str]]

    @property
    def module(self) -> nn.Module:
        return self.owners[0][0]

    def get(self) -> nn.Parameter:
        module, name = self.owners[0]
        parameter = module._parameters[name]
        assert parameter is not None, "places are made of parameters that are there"
        return parameter

    def set(self, parameter: nn.Parameter) -> None:
        """Let all owners have this object. By assignment: recurrent layers keep a second list of theirs."""
        for module, name in self.owners:
            setattr(module, name, parameter)


def base_places(component: nn.Module) -> list[Place]:
    """The base's own parameters in the order of `named_parameters()`; nothing of what adapters brought."""
    found: dict[int, Place] = {}
    for path, module in _base_modules("", component):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                where = f"{path}.{name}" if path else name
                found.setdefault(id(parameter), Place(where, [])).owners.append((module, name))
    return list(found.values())


def _base_modules(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in module._modules.items():
        brought = isinstance(module, CopiedModule) and name.startswith("copy_")
        if child is not None and not brought and not _is_ours(child):
            yield from _base_modules(f"{path}.{name}" if path else name, child)


def _is_ours(module: nn.Module) -> bool:
    """Whether a module holds what an adapter learned; an adapted layer is still the base's."""
    cls: Any = type(module)
    return cls.__module__.partition(".")[0] == _OURS and not isinstance(module, AdaptedModule) and not _weight_only(cls)


def _weight_only(cls: type) -> bool:
    return cls.__module__.endswith(".layers.weight_only")


def mixture(base: torch.Tensor, terms: list[tuple[torch.Tensor, float]]) -> nn.Parameter:
    """base + Σ weight · (learned − base), computed in fp32 on the device of what was learned, in the base's dtype."""
    device = terms[0][0].device
    own = base.detach().to(device, torch.float32)
    total = own.clone()
    for learned, weight in terms:
        total.add_(learned.detach().float() - own, alpha=weight)
    return nn.Parameter(total.to(base.dtype), requires_grad=False)


class Waiting(nn.Module):
    """Parameters that are not in the model at present, by their path in it."""

    def put(self, path: str, parameter: nn.Parameter) -> None:
        self._parameters[_key(path)] = parameter

    def take(self, path: str) -> nn.Parameter:
        parameter = self._parameters.pop(_key(path))
        assert parameter is not None, "put() put it there"
        return parameter

    def look(self, path: str) -> nn.Parameter | None:
        return self._parameters.get(_key(path))


class Bank(Waiting):
    """The base's parameters whose place is taken, and by whom.

    taken: {path: child name of the piece's `Waiting`, or _MIXED}. weights: {child name: strength, if it acts}.
    users: {child name: the paths that it has learned}; without any the bank goes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[str, str] = {}
        self.weights: dict[str, float] = {}
        self.users: dict[str, list[str]] = {}


def _key(path: str) -> str:
    """A parameter's name may not have dots."""
    return path.replace(".", "/")
