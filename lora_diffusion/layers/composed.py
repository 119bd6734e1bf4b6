"""The adapters' terms written with autograd's own operations.

For layers that `kernel.py` does not know, and for compiled code, whose compiler fuses better than we could. What one
kind of layer does with x, A and B are its methods `low`, `up` and `base`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dora import gain_over_base
from .factors import LoraFactors
from .host import AdaptedModule


def compose(layer: AdaptedModule, x: Tensor, y: Tensor) -> Tensor:
    """The base layer's output y plus the terms of every acting adapter; the result has y's dtype."""
    if layer._rows is not None:
        return _row_by_row(layer, x, y)
    return _with_terms(layer, x, y, layer._active)


def compose_all(layer: AdaptedModule, x: Tensor, y: Tensor) -> Tensor:
    """As `compose`, with every adapter the layer carries and its strength read from a tensor: for compiled code, where
    switching and weighing must not change the program."""
    return _with_terms(layer, x, y, [(part, part.gain * part.scale) for part in layer.all_parts()])


def _with_terms(layer: AdaptedModule, x: Tensor, y: Tensor, acting: Any) -> Tensor:
    """acting: (part, factor) pairs, a factor being a number or () tensor."""
    result = y
    for part, factor in acting:
        dropped = F.dropout(x, part.dropout, layer.training) if part.dropout and layer.training else x
        if part.lora_magnitude_vector is not None:
            result = result + (factor / part.scale) * _dora_change(layer, part, x, dropped, y)
            continue
        for a, b, sign in part.pairs():
            result = layer.up(layer.low(dropped, a), b * (factor * sign), result)
    return result.to(y.dtype)


def _row_by_row(layer: AdaptedModule, x: Tensor, y: Tensor) -> Tensor:
    """Each row's own terms (see `gathered.py`), added to y."""
    assert layer._rows is not None, "only asked for in a mixed batch"
    dropout = layer._rows.parts[0][0].dropout if layer.training else 0.0
    gather, terms = layer.gather(x), layer.terms()
    if getattr(layer, "groups", 1) > 1:
        return _row_by_row_in_groups(layer, F.dropout(x, dropout) if dropout else x, y)
    h = layer.low_rows(F.dropout(x, dropout) if dropout else x, torch.cat([a for a, _, _ in terms]), gather)
    b = torch.cat([b.flatten(1) for _, b, _ in terms], dim=1).t()
    own = b.index_select(0, gather.index.flatten()).view(*gather.index.shape, -1)
    return y + layer.up_rows(h, own).to(y.dtype)


def _row_by_row_in_groups(layer: AdaptedModule, x: Tensor, y: Tensor) -> Tensor:
    """A grouped convolution's factors are in blocks, which no index takes out row by row: adapter after adapter."""
    assert layer._rows is not None, "only asked for in a mixed batch"
    choice = layer._rows.choice.repeat(x.shape[0] // layer._rows.rows, 1).to(y)
    for (part, scale), strength in zip(layer._rows.parts, choice.unbind(1)):
        for a, b, sign in part.pairs():
            term = layer.up(layer.low(x, a), b * (scale * sign), None)
            y = y + term.to(y.dtype) * strength.view(-1, *[1] * (y.ndim - 1))
    return y


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
