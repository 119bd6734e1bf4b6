"""Frozen weights stored as int8 or fp8 and computed with in the precision of x: W = weight · weight_scale.

W is put together where the layer computes and again in backward, so that no copy of it lives in between. It is there
because bitsandbytes leaves convolutions alone, its int8 rounds the activations to fp16 and keeps x for a weight that
never learns; and because diffusers' layerwise casting cannot be trained through: its hooks take away the weight that
backward still needs ("expected scalar type Float but found Float8_e4m3fn"), and hide adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .host import AdaptedModule, base_class, host_class
from .kernel import compute_dtype

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what the largest weight of an output is stored as


class WeightOnly(nn.Module):
    """Mixin in front of a layer's own class. weight: (out, in) or (out, in/groups, kh, kw), int8 or fp8;
    weight_scale: (out, 1, …) float32. Casting the module leaves both as they are: they follow it to devices only."""

    weight: Tensor
    weight_scale: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {id(self.weight), id(self.weight_scale)}

        def uncast(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        return super()._apply(uncast, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={str(self.weight.dtype).removeprefix('torch.')}"


class WeightOnlyLinear(WeightOnly, nn.Linear):
    """x: (…, in), y: (…, out), in x's dtype or, under autocast, in autocast's."""

    def forward(self, x: Tensor) -> Tensor:
        return _LinearProduct.apply(x.to(compute_dtype(x)), self.weight, self.weight_scale, self.bias)


class WeightOnlyConv2d(WeightOnly, nn.Conv2d):
    """x: (n, in, h, w), in x's dtype or, under autocast, in autocast's."""

    def forward(self, x: Tensor) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), 0
        how = (self.stride, padding, self.dilation, self.groups)
        return _Convolution.apply(x.to(compute_dtype(x)), self.weight, self.weight_scale, self.bias, how)


_CLASSES: dict[type[nn.Module], type[WeightOnly]] = {nn.Linear: WeightOnlyLinear, nn.Conv2d: WeightOnlyConv2d}


class _LinearProduct(torch.autograd.Function):
    """F.linear by a frozen stored weight. What is kept for backward is the stored weight, which is there anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _loaded(weight, scale, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        dx = dy @ _loaded(weight, scale, dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None


class _Convolution(torch.autograd.Function):
    """As `_LinearProduct`, for F.conv2d."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, how: Any) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.shape, ctx.how = x.shape, how
        return F.conv2d(x, _loaded(weight, scale, x.dtype), None if bias is None else bias.to(x.dtype), *how)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.nn.grad.conv2d_input(ctx.shape, _loaded(weight, scale, dy.dtype), dy, *ctx.how)
        return dx, None, None, dy.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None, None


def _loaded(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W in the computing dtype, in which the stored numbers are exact: W is rounded once."""
    return weight.to(dtype).mul_(scale)


@torch.no_grad()
def store_weight(module: nn.Module, name: str, device: torch.device | str | None = None) -> None:
    """Store the frozen weight of a Linear or Conv2d layer, which may carry adapters, where it stands.

    name: a key of FORMATS. Each output's largest weight becomes the largest number of the format (int8: 127; fp8, which
    is e4m3: 448). device: where to compute and to keep it (default: where the weight is).
    """
    dtype = FORMATS[name]
    weight = module.weight.detach().to(device or module.weight.device)
    largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).float()
    scale = torch.where(largest > 0, largest / _LARGEST[dtype], 1.0)
    stored = weight.float().div_(scale) if weight.dtype != torch.float32 else weight / scale
    stored = stored.round_() if dtype is torch.int8 else stored
    exchange_class(module, _CLASSES[base_class(module)])
    module.weight = nn.Parameter(stored.to(dtype), requires_grad=False)
    module.register_buffer("weight_scale", scale)


def exchange_class(module: nn.Module, base: type[nn.Module]) -> None:
    """Give a module another class of its kind, beneath the adapters that it may carry."""
    if not isinstance(module, AdaptedModule):
        module.__class__ = base
        return
    mixin: Any = type(module).__bases__[0]
    module.__class__ = host_class(mixin, base)
    module._plain = mixin.is_plain(base)
    module.set_weights({})


def scheme_for(model: nn.Module, path: str, layer: nn.Module, scheme: str) -> str:
    """How one layer of a model is stored where the model is stored by `scheme`: "nf4", "int8" or "fp8".

    Only linear layers can be NF4. What transformers lists as too wide for fp16 is int8: T5 casts its activations to
    the dtype of such a layer's weight, whatever that is, unless it is int8.
    """
    wide = path.rpartition(".")[2] in set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if wide or (scheme == "nf4" and not isinstance(layer, nn.Linear)):
        return "int8"
    return scheme
