"""Weights in fewer bits, for planning: int8 and fp8 as they really are, NF4 by a stand-in of the same memory.

The stand-in needs no bitsandbytes: the full weight exists while the layer computes, in forward and again in backward,
and autograd keeps nothing but what is stored, as bitsandbytes' Linear4bit does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError
from ..layers import base_class
from ..layers.weight_only import exchange_class, scheme_for, store_weight

SCHEMES = ("nf4", "int8", "fp8")
_BLOCK, _NESTED = 64, 256  # bitsandbytes: weights to a scale, and scales to a scale of scales
_CODES = 4 * (16 + 256 + 1)


def store(module: nn.Module, scheme: str, dtype: torch.dtype) -> None:
    """Store the weights of a frozen model in fewer bits, in place, under a fake mode.

    It concerns the Linear and Conv2d layers inside numbered blocks, nearly all of a diffusion or language model's
    weights. "int8" and "fp8" take a byte per weight, "nf4" half of one for linear layers and int8 for convolutions.

    Args:
        dtype: the one that NF4's layers compute in.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"quantize={scheme!r} is not one of {', '.join(SCHEMES)}")
    for path, layer in list(module.named_modules()):
        if base_class(layer) not in (nn.Linear, nn.Conv2d) or not any(part.isdigit() for part in path.split(".")):
            continue
        chosen = scheme_for(module, path, layer, scheme)
        if chosen == "nf4":
            stand_in_nf4(layer, dtype)
        else:
            store_weight(layer, chosen)


def stand_in_nf4(layer: Any, dtype: torch.dtype) -> None:
    """Make a Linear layer one that takes the memory of bitsandbytes' with NF4 and nested scales."""
    count = layer.in_features * layer.out_features
    blocks = -(-count // _BLOCK)
    scales = blocks + 4 * -(-blocks // _NESTED) + _CODES
    exchange_class(layer, _Nf4Linear)
    layer.dtype = dtype
    layer.weight = nn.Parameter(torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False)
    layer.register_buffer("scales", torch.empty(scales, dtype=torch.uint8), persistent=False)


class _Nf4Linear(nn.Linear):
    dtype: torch.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return _Product.apply(x.to(self.dtype), self.weight, bias, self.out_features).to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None, out: int) -> torch.Tensor:
        ctx.shape = (out, x.shape[-1])
        ctx.save_for_backward(stored)
        return F.linear(x, x.new_empty(ctx.shape), bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return dy @ dy.new_empty(ctx.shape), None, None, None
