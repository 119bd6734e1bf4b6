"""Base weights stored in fewer bits: bitsandbytes' NF4 and int8, torchao's tensors, and those of `weight_only.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

STORED = (torch.int8, torch.float8_e4m3fn)  # dtypes that no layer multiplies by as they are


def is_quantised(weight: Any) -> bool:
    """Whether a weight's numbers are not the layer's own: packed by bitsandbytes, stored as int8 or fp8, or a subclass
    that dequantises."""
    return type(weight).__name__ in ("Params4bit", "Int8Params") or getattr(weight, "dtype", None) in STORED or (
        isinstance(weight, torch.Tensor) and type(weight) not in (nn.Parameter, torch.Tensor)
        and hasattr(weight, "dequantize") and type(weight).__module__.startswith("torchao")
    )  # fmt: skip


def weight_shape(weight: torch.Tensor) -> list[int]:
    """The shape of a weight as its layer multiplies by it; bitsandbytes packs 4 bits into a column of bytes."""
    state = getattr(weight, "quant_state", None)
    return list(weight.shape if state is None else state.shape)


@torch.no_grad()
def full_precision(module: nn.Module) -> torch.Tensor:
    """The weight of a quantised layer as floats, (out, in) or (out, in/groups, kh, kw)."""
    weight = module.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).view(module.out_features, module.in_features)
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        return int8_vectorwise_dequant(weight.data, scales)
    if weight.dtype in STORED:
        return weight.float() * module.weight_scale
    return weight.dequantize()
