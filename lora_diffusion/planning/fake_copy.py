"""Copies of models without values: the same modules, with fake tensors in place of their parameters and buffers.

A fake tensor has a shape, a dtype and a device and takes no memory. Operations on it yield fake tensors, so a model
runs forward and backward through its own code, autograd and hooks included, without computing anything.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .stored import stand_in_nf4, store


def fake_mode() -> Any:
    """The context in which fake tensors are made and fake copies run. Fakes of one mode do not mix with another's."""
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_copy(
    module: nn.Module,
    mode: Any,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    *,
    channels_last: bool = False,
) -> nn.Module:
    """A copy of `module` with fake tensors on the CPU; the module may be real or on the meta device, and is not
    changed.

    dtype: of all floating-point tensors (default: as they are).
    quantize: store the base weights in fewer bits: see `stored.store`.
    channels_last: lay the kernels of convolutions out so (default: as they are).
    """
    memo: dict[int, Any] = {}
    with mode:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.layout is not torch.strided:
                raise ConfigError(f"a tensor of layout {tensor.layout} cannot be planned for")
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=wanted)
            if channels_last and tensor.ndim == 4:
                fake = torch.empty_like(fake, memory_format=torch.channels_last)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fake
    twin = copy.deepcopy(module, memo)  # outside the mode: tensors beside those above stay what they are
    with mode:
        for path, layer in list(twin.named_modules()):
            if type(module.get_submodule(path)._parameters.get("weight")).__name__ == "Params4bit":
                stand_in_nf4(layer, dtype or getattr(layer, "compute_dtype", None) or torch.float32)
        if quantize is not None:
            store(twin, quantize, dtype or torch.float32)
    return twin
