"""Base weights that are stored in fewer bits by another library: bitsandbytes' NF4 and int8, torchao's tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_quantised(weight: Any) -> bool:
    """Whether a weight's numbers are not the layer's own: packed by bitsandbytes, or a subclass that dequantises."""
    return type(weight).__name__ in ("Params4bit", "Int8Params") or (
        isinstance(weight, torch.Tensor) and type(weight) not in (nn.Parameter, torch.Tensor)
        and hasattr(weight, "dequantize") and type(weight).__module__.startswith("torchao")
    )  # fmt: skip


@torch.no_grad()
def full_precision(module: nn.Module) -> torch.Tensor:
    """The weight of a quantised linear layer as floats, (out, in)."""
    weight = module.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).view(module.out_features, module.in_features)
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        return int8_vectorwise_dequant(weight.data, scales)
    return weight.dequantize()
