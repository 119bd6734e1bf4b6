"""The adapters' terms written with autograd's own operations.

For layers that `kernel.py` does not know, and for compiled code, whose compiler fuses better than we could. What one
kind of layer does with x, A and B are its methods `low`, `up` and `base`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .dora import gain_over_base
from .factors import LoraFactors
from .host import AdaptedModule


def compose(layer: AdaptedModule, x: Tensor, y: Tensor) -> Tensor:
    """The base layer's output y plus the terms of every acting adapter; the result has y's dtype."""
    if layer._rows is None:
        return _with_terms(layer, x, y, layer._active, None)
    return _with_terms(layer, x, y, layer._rows.parts, layer.row_factors(x.shape[0]).to(y.device))


def compose_all(layer: AdaptedModule, x: Tensor, y: Tensor) -> Tensor:
    """As `compose`, with every adapter the layer carries and its strength read from a tensor: for compiled code, where
    switching and weighing must not change the program."""
    return _with_terms(layer, x, y, [(part, part.gain * part.scale) for part in layer.all_parts()], None)


def _with_terms(layer: AdaptedModule, x: Tensor, y: Tensor, acting: Any, rows: Tensor | None) -> Tensor:
    """acting: (part, factor) pairs, a factor being a number or () tensor; rows: (batch, Σr) instead of the factors."""
    result, column = y, 0
    for part, factor in acting:
        dropped = F.dropout(x, part.dropout, layer.training) if part.dropout and layer.training else x
        if part.lora_magnitude_vector is not None:
            result = result + (factor / part.scale) * _dora_change(layer, part, x, dropped, y)
            continue
        for a, b, sign in part.pairs():
            h = layer.low(dropped, a)
            if rows is None:
                b = b * (factor * sign)
            else:
                h = h * _along(layer, rows[:, column : column + a.shape[0]], h).to(h.dtype)
                column += a.shape[0]
            result = layer.up(h, b, result)
    return result.to(y.dtype)


def _along(layer: AdaptedModule, rows: Tensor, h: Tensor) -> Tensor:
    """rows (batch, r) shaped to multiply h, whose channels may be its second or its last dimension."""
    shape = [rows.shape[0], *[1] * (h.ndim - 1)]
    shape[layer.channels] = rows.shape[1]
    return rows.reshape(shape)


def _dora_change(layer: AdaptedModule, part: LoraFactors, x: Tensor, dropped: Tensor, y: Tensor) -> Tensor:
    """What DoRA adds to the base layer's output at weight 1."""
    shape = [1] * y.ndim
    shape[layer.channels] = -1
    gain = gain_over_base(layer.matrix(layer), part).view(shape).to(y.dtype)
    if dropped is not x:
        plain = layer.base(dropped)
    else:
        plain = y if layer.bias is None else y - layer.bias.to(y.dtype).view(shape)
    term = layer.up(layer.low(dropped, part.lora_A), part.lora_B * part.scale, None).to(y.dtype)
    return (gain - 1) * plain + gain * term
