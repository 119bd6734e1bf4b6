"""Whether one layer of an adapter fits one module, and making it fit where only the form differs."""

from __future__ import annotations

from torch import nn

from .adapter import LowRank
from .layers import LoraEmbedding, layer_kind, why_not
from .lowering import lowered_layer
from .structured import Structured

Layer = LowRank | Structured


def misfit(module: nn.Module, layer: Layer) -> str | None:
    """Why a layer cannot go to `module`, or None if it can. Shapes only: nothing is computed."""
    kind = layer_kind(module)
    if kind is None:
        return why_not(module)
    _, b_shape = kind.shapes(module, layer.rank)
    magnitude = layer.magnitude
    if magnitude is not None and tuple(magnitude.shape) != (b_shape[0],):
        return f"DoRA's magnitude has shape {tuple(magnitude.shape)}, the module needs ({b_shape[0]},)"
    if magnitude is not None and issubclass(kind, LoraEmbedding):
        return "it is an embedding, which this version does not adapt with DoRA"
    if isinstance(layer, LowRank):
        shaped = _reshaped(module, layer)
        return kind.misfit(module, shaped.a, shaped.b)
    weight = _weight_shape(module)
    if weight is None:
        return f"it is a {type(module).__name__}, which {layer.kind} is not for"
    if not _same_weight(layer.shape, weight):
        return f"the update has shape {layer.shape}, the module needs {weight}"
    return None


def fitted(module: nn.Module, layer: Layer) -> tuple[LowRank, float]:
    """The layer as `module` takes it, and the relative error of that (0.0 where nothing was lost). Ask `misfit` first.

    LoHa, LoKr and their like become one product of two factors; factors of a 1×1 convolution fit a Linear and the
    reverse.
    """
    if isinstance(layer, LowRank):
        return _reshaped(module, layer), 0.0
    low_rank, error = lowered_layer(layer, shape=_weight_shape(module))
    return _reshaped(module, low_rank), error


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """(out, *fan_in) of a module whose update may have any structure: not of embeddings and grouped convolutions."""
    kind = layer_kind(module)
    if kind is None or issubclass(kind, LoraEmbedding) or getattr(module, "groups", 1) > 1:
        return None
    a_shape, b_shape = kind.shapes(module, 1)
    return (b_shape[0], *a_shape[1:])


def _same_weight(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Files flatten a convolution's (in, kh, kw), and say 1×1 convolution or Linear as they please."""
    return given[0] == wanted[0] and _size(given) == _size(wanted) and (len(given) == 2 or given[1] == wanted[1])


def _reshaped(module: nn.Module, layer: LowRank) -> LowRank:
    kind = layer_kind(module)
    assert kind is not None, "misfit() said so"
    a_shape, b_shape = kind.shapes(module, layer.rank)
    same_a = layer.a.numel() == _size(a_shape) and layer.a.shape[:2] == a_shape[:2]
    same_b = layer.b.numel() == _size(b_shape) and layer.b.shape[:2] == b_shape[:2]
    if not (same_a and same_b and {layer.a.ndim, len(a_shape)} == {2, 4}):
        return layer
    return LowRank(layer.a.reshape(a_shape), layer.b.reshape(b_shape), layer.scale, layer.magnitude)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
