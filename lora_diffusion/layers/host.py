"""Turning a module into one that carries adapters, where it stands, and back.

The module's `__class__` is exchanged for a subclass of its own class, so its parameters, buffers and hooks stay the
same objects under the same names. Each adapter is a small submodule `adapter_<name>` that holds the learned tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import AdapterMismatchError
from .factors import LoraFactors
from .quantised import full_precision, is_quantised

if TYPE_CHECKING:
    from .group import InputGroup
    from .rows import Gather, RowPlan

_PREFIX = "adapter_"
Factors = tuple[torch.Tensor, torch.Tensor]


class SwappedModule(nn.Module):
    """Mixin in front of a module's own class, of which `host_class` makes one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time: copies and pickles name its two halves instead.
        mixin, base = type(self).__bases__
        return _rebuild, (mixin, base), self.__dict__.copy()


class AdaptedModule(SwappedModule):
    """Mixin in front of a module's own class: bookkeeping of the adapters that it carries.

    A kind of layer (see `linear.py`) derives from this, says what shapes an adapter has at it and what its weight's
    update is, and in `forward` how the active ones (`_active`: pairs of part and factor) change the base's output.
    """

    _weights: dict[str, float]
    _active: tuple[tuple[LoraFactors, float], ...]
    _simple: tuple[tuple[LoraFactors, dict[str, Any], float], ...]  # those that act, if plain: parameters, factor
    _group: InputGroup | None
    _rows: RowPlan | None
    _plain: bool
    transposed = False  # whether the module stores its weight as (in, out)
    channels = -1  # the dimension of an output that counts the layer's outputs

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B at a given rank, for a module of this kind (adapted or not)."""
        raise NotImplementedError

    @classmethod
    def misfit(cls, module: nn.Module, a: torch.Tensor, b: torch.Tensor) -> str | None:
        """Why given factors cannot go to `module`, or None if they can."""
        wanted, given = cls.shapes(module, int(a.shape[0])), (tuple(a.shape), tuple(b.shape))
        if wanted != given:
            return f"shapes are A {given[0]}, B {given[1]}, the module needs {wanted[0]}, {wanted[1]}"
        return None

    @classmethod
    def matrix(cls, module: nn.Module) -> torch.Tensor:
        """The base weight as (out, in) or (out, in, kh, kw): a view where the module stores it otherwise, a copy in
        floats where it is quantised."""
        weight = full_precision(module) if is_quantised(module.weight) else module.weight
        return weight.t() if cls.transposed else weight

    @staticmethod
    def is_plain(base: type[nn.Module]) -> bool:
        """Whether a class of this kind computes just its kind's product, which may then be fused with the adapters'."""
        return False

    @staticmethod
    def delta(module: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """B · A in the shape and dtype of `matrix`; computed in the dtype of the factors."""
        return (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])

    def low(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """A·x, with r channels, in x's dtype."""
        raise NotImplementedError

    def low_rows(self, x: torch.Tensor, a: torch.Tensor, gather: Gather) -> torch.Tensor:
        """A·x with each row's own A out of the stack a, (Σr, …): as `low`, with R channels, times their strength."""
        raise NotImplementedError

    def up_rows(self, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """B·h with each row's own B, b: (batch, R, out)."""
        raise NotImplementedError

    def up(self, h: torch.Tensor, b: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        """B·h, added to `onto` where that is given."""
        raise NotImplementedError

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """W·x without bias, for DoRA."""
        raise NotImplementedError

    def part(self, name: str) -> LoraFactors:
        part = self._modules[_PREFIX + name]
        assert isinstance(part, LoraFactors), "add_part() takes nothing else"
        return part

    def part_names(self) -> list[str]:
        return [key.removeprefix(_PREFIX) for key in self._modules if key.startswith(_PREFIX)]

    def add_part(self, name: str, part: LoraFactors) -> None:
        """Take in an adapter, inactive."""
        self.add_module(_PREFIX + name, part.train(self.training))

    def remove_part(self, name: str) -> None:
        self.set_weights({name: None})
        del self._modules[_PREFIX + name]

    def set_weights(self, weights: Mapping[str, float | None]) -> None:
        """Activate adapters with a weight, or with None deactivate them, in the order in which their terms are added.
        Those not mentioned keep theirs."""
        for name, weight in weights.items():
            self._weights.pop(name, None)
            if weight is not None:
                self._weights[name] = weight
        parts = [(self.part(name), value) for name, value in self._weights.items() if value != 0.0]
        self._active = tuple([(part, part.scale * value) for part, value in parts])
        simple = self._plain and all(p.lora_magnitude_vector is None and p.anchor_A is None for p, _ in parts)
        self._simple = tuple([(p, p._parameters, factor) for p, factor in self._active]) if simple else ()
        if self._group is not None:
            self._group.forget()

    def all_parts(self) -> list[LoraFactors]:
        """Every adapter that this layer carries, acting or not."""
        return [part for part in self._modules.values() if isinstance(part, LoraFactors)]

    def terms(self) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """(A, B, factor) of every product that acts on this layer now; of all that may act in a mixed batch."""
        acting = self._active if self._rows is None else self._rows.parts
        return [(a, b, factor * sign) for part, factor in acting for a, b, sign in part.pairs()]

    def gather(self, x: torch.Tensor) -> Gather:
        """Which of the stacked terms act in each row of a mixed batch, and how strongly."""
        assert self._rows is not None, "only asked for in a mixed batch"
        return self._rows.gather(x.shape[0], x.device)


_host_classes: dict[tuple[Any, Any], Any] = {}


def host_class(mixin: Any, base: Any) -> Any:
    """The subclass of the module class `base` that carries adapters; one per pair, so that equal modules stay of equal
    class. mixin: a SwappedModule."""
    if (mixin, base) not in _host_classes:
        name = f"{mixin.__name__}Of{base.__name__}"
        _host_classes[mixin, base] = type(name, (mixin, base), {"__module__": base.__module__})
    return _host_classes[mixin, base]


def base_class(module: nn.Module) -> type[nn.Module]:
    """A module's own class, adapted or not."""
    return type(module).__bases__[1] if isinstance(module, AdaptedModule) else type(module)


def attach(module: nn.Module, mixin: type[AdaptedModule]) -> None:
    """Make `module` an AdaptedModule in place; nothing happens if it is one."""
    if not isinstance(module, AdaptedModule):
        module.__class__ = host_class(mixin, type(module))
        module._weights = {}
        module._active = ()
        module._simple = ()
        module._group = None
        module._rows = None
        module._plain = mixin.is_plain(base_class(module))


def detach(module: nn.Module) -> None:
    """Give `module` its own class back. All adapters must have been removed."""
    if isinstance(module, AdaptedModule):
        module.__class__ = base_class(module)
        del module._weights, module._active, module._simple, module._group, module._rows, module._plain


def check_not_hooked(path: str, module: nn.Module) -> None:
    """Refuse a module whose `forward` was replaced on the instance: it would never reach the adapter's.

    That is what accelerate's sequential offloading does. Raises AdapterMismatchError.
    """
    if "forward" in module.__dict__:
        raise AdapterMismatchError(
            f"{path} has a forward of its own (offloading hooks?), which hides adapters: "
            "take the hooks off, add or delete the adapter, and put them back"
        )


def _rebuild(mixin: Any, base: Any) -> nn.Module:
    cls = host_class(mixin, base)
    return cls.__new__(cls)
