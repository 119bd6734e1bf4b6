"""Whole modules that an adapter learns a copy of (`modules_to_save`): a new head, a norm, an input convolution."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..errors import AdapterMismatchError
from .host import AdaptedModule, SwappedModule, check_not_hooked, host_class
from .quantised import is_quantised

_PREFIX = "copy_"


class CopiedModule(SwappedModule):
    """Mixin in front of a module's own class: its call goes to the copy that acts, or to the module itself."""

    _acting: str | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._acting is None:
            return super().forward(*args, **kwargs)
        return self._modules[_PREFIX + self._acting](*args, **kwargs)

    def learned(self, name: str) -> nn.Module:
        module = self._modules[_PREFIX + name]
        assert module is not None, "add_copy() put it there"
        return module

    def copy_names(self) -> list[str]:
        return [key.removeprefix(_PREFIX) for key in self._modules if key.startswith(_PREFIX)]


def make_copy(module: nn.Module) -> nn.Module:
    """A copy of a module as it is without adapters, with parameters that learn."""
    twin = copy.deepcopy(module)
    if isinstance(twin, CopiedModule):
        for name in twin.copy_names():
            remove_copy(twin, name)
    return twin.requires_grad_(True)


def check_copyable(path: str, module: nn.Module) -> None:
    """Raises AdapterMismatchError for a module with low-rank adapters or quantised weights in it, or whose forward is
    hidden."""
    if any(isinstance(m, AdaptedModule) for m in module.modules()):
        raise AdapterMismatchError(f"{path} carries low-rank adapters: it cannot be in modules_to_save as well")
    if any(is_quantised(weight) for weight in module.parameters()):
        raise AdapterMismatchError(f"{path} has quantised weights, of which no copy can learn: take it out of "
                                   "modules_to_save, or load the base in a floating dtype")  # fmt: skip
    check_not_hooked(path, module)


def add_copy(module: nn.Module, name: str, learned: nn.Module) -> None:
    """Let `module` carry `learned` as adapter `name`'s, not acting yet."""
    if not isinstance(module, CopiedModule):
        module.__class__ = host_class(CopiedModule, type(module))
        module._acting = None
    module.add_module(_PREFIX + name, learned.train(module.training))


def remove_copy(module: nn.Module, name: str) -> None:
    """Take one copy out; without any the module gets its own class back."""
    assert isinstance(module, CopiedModule), "only called for modules that carry copies"
    if module._acting == name:
        module._acting = None
    del module._modules[_PREFIX + name]
    if not module.copy_names():
        module.__class__ = type(module).__bases__[1]
        del module._acting
