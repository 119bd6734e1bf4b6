"""Turning a module into one that carries adapters, where it stands, and back.

The module's `__class__` is exchanged for a subclass of its own class, so its parameters, buffers and hooks stay the
same objects under the same names. Each adapter is a small submodule `adapter_<name>` that holds the learned tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import AdapterMismatchError

_PREFIX = "adapter_"


class AdaptedModule(nn.Module):
    """Mixin in front of a module's own class: bookkeeping of the adapters that it carries.

    A kind of layer (see `linear.py`) derives from this, says in `make_part` what one adapter's learned tensors are, and
    in `forward` how the active ones (`_active`: pairs of part and factor) change the base module's output.
    """

    _weights: dict[str, float]
    _active: tuple[tuple[nn.Module, float], ...]

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B at a given rank, for a module of this kind (adapted or not)."""
        raise NotImplementedError

    @staticmethod
    def make_part(a: torch.Tensor, b: torch.Tensor, scale: float, dropout: float) -> nn.Module:
        """The submodule that holds one adapter. Has `lora_A`, `lora_B` and `scale`."""
        raise NotImplementedError

    def part(self, name: str) -> nn.Module:
        return self._modules[_PREFIX + name]

    def part_names(self) -> list[str]:
        return [key.removeprefix(_PREFIX) for key in self._modules if key.startswith(_PREFIX)]

    def add_part(self, name: str, part: nn.Module) -> None:
        """Take in an adapter, inactive."""
        self.add_module(_PREFIX + name, part.train(self.training))

    def remove_part(self, name: str) -> None:
        self.set_weight(name, None)
        del self._modules[_PREFIX + name]

    def set_weight(self, name: str, weight: float | None) -> None:
        """Activate an adapter with a weight, or with None deactivate it. Other adapters keep theirs."""
        if weight is None:
            self._weights.pop(name, None)
        else:
            self._weights[name] = weight
        parts = [(self.part(other), value) for other, value in self._weights.items() if value != 0.0]
        self._active = tuple((part, part.scale * value) for part, value in parts)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time: copies and pickles name its two halves instead.
        mixin, base = type(self).__bases__
        return _rebuild, (mixin, base), self.__dict__.copy()


_host_classes: dict[tuple[Any, Any], Any] = {}


def host_class(mixin: Any, base: Any) -> Any:
    """The subclass of the module class `base` that carries adapters; one per pair, so that equal modules stay of equal
    class. mixin: an AdaptedModule."""
    if (mixin, base) not in _host_classes:
        name = f"{mixin.__name__}Of{base.__name__}"
        _host_classes[mixin, base] = type(name, (mixin, base), {"__module__": base.__module__})
    return _host_classes[mixin, base]


def attach(module: nn.Module, mixin: type[AdaptedModule]) -> None:
    """Make `module` an AdaptedModule in place; nothing happens if it is one."""
    if not isinstance(module, AdaptedModule):
        module.__class__ = host_class(mixin, type(module))
        module._weights = {}
        module._active = ()


def detach(module: nn.Module) -> None:
    """Give `module` its own class back. All adapters must have been removed."""
    if isinstance(module, AdaptedModule):
        module.__class__ = type(module).__bases__[1]
        del module._weights, module._active


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
