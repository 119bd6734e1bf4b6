"""The adapters' terms written with autograd's own operations.

For layers that `kernel.py` does not know, and for compiled code, whose compiler fuses better than we could. `Shape` is
what one kind of layer does with x, A and B.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .dora import gain_over_base
from .factors import LoraFactors
from .host import AdaptedModule

Product = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Base = Callable[[Tensor], Tensor]


def compose(
    layer: AdaptedModule,
    x: Tensor,
    y: Tensor,
    product: Product,
    base: Base | None = None,
    channels: int = -1,
) -> Tensor:
    """y plus the terms of every acting adapter; the result has y's dtype.

    product: (x, A, B, column factors (batch, r) or None) -> B·A·x shaped as y.
    base: x -> W·x without bias, for DoRA; None where the kind does not offer it.
    channels: which dimension of y counts the outputs.
    """
    column = 0
    rows = None if layer._rows is None else layer.row_factors(x.shape[0]).to(y.device)
    acting = layer._active if layer._rows is None else layer._rows.parts
    result = y
    for part, factor in acting:
        dropped = F.dropout(x, part.dropout, layer.training) if part.dropout and layer.training else x
        for a, b, sign in part.pairs():
            width = a.shape[0]
            mine = None if rows is None else rows[:, column : column + width]
            column += width
            if part.lora_magnitude_vector is None:
                scaled = b if rows is not None else b * (factor * sign)
                result = result + product(dropped, a, scaled, mine).to(y.dtype)
        if part.lora_magnitude_vector is not None:
            change = _dora_change(layer, part, x, dropped, y, product, base, channels)
            result = result + (factor / part.scale) * change
    return result


def compose_all(
    layer: AdaptedModule,
    x: Tensor,
    y: Tensor,
    product: Product,
    base: Base | None = None,
    channels: int = -1,
) -> Tensor:
    """As `compose`, with every adapter the layer carries and its strength read from a tensor: for compiled code, where
    switching and weighing must not change the program."""
    result = y
    for part in layer.all_parts():
        dropped = F.dropout(x, part.dropout, layer.training) if part.dropout and layer.training else x
        for a, b, sign in part.pairs():
            if part.lora_magnitude_vector is None:
                result = result + product(dropped, a, b * (part.gain * (part.scale * sign)), None).to(y.dtype)
        if part.lora_magnitude_vector is not None:
            change = _dora_change(layer, part, x, dropped, y, product, base, channels)
            result = result + (part.gain * change).to(y.dtype)
    return result


def _dora_change(
    layer: AdaptedModule, part: LoraFactors, x: Tensor, dropped: Tensor, y: Tensor, product: Product, base: Base | None,
    channels: int,
) -> Tensor:  # fmt: skip
    """What DoRA adds to the base layer's output at weight 1."""
    assert base is not None, "DoRA is refused for kinds of layers that offer no base"
    shape = [1] * y.ndim
    shape[channels] = -1
    gain = gain_over_base(layer.matrix(layer), part).view(shape).to(y.dtype)
    if dropped is not x:
        plain = base(dropped)
    else:
        plain = y if layer.bias is None else y - layer.bias.to(y.dtype).view(shape)
    term = product(dropped, part.lora_A, part.lora_B * part.scale, None).to(y.dtype)
    return (gain - 1) * plain + gain * term
