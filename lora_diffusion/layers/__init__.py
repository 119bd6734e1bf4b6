"""Which kinds of module can carry an adapter, and the class that does it for each.

A new kind is one file here and one line in `layer_kind`.
"""

from __future__ import annotations

from torch import nn

from .conv1d import LoraConv1D, is_conv1d
from .conv2d import LoraConv2d
from .embedding import LoraEmbedding
from .factors import LoraFactors
from .host import AdaptedModule, attach, base_class, detach, host_class
from .linear import LoraLinear

__all__ = [
    "AdaptedModule", "LoraEmbedding", "LoraFactors", "LoraLinear", "attach", "base_class", "detach", "host_class",
    "layer_kind", "why_not",
]  # fmt: skip

KINDS: dict[type[nn.Module], type[AdaptedModule]] = {
    nn.Linear: LoraLinear,
    nn.Conv2d: LoraConv2d,
    nn.Embedding: LoraEmbedding,
}

# Linear by class, but their owner reads `.weight` and never calls them: an adapter there would do nothing, in silence.
_NEVER_CALLED = (nn.modules.linear.NonDynamicallyQuantizableLinear,)


def layer_kind(module: nn.Module) -> type[AdaptedModule] | None:
    """The adapted class for a module, or None if it cannot be adapted."""
    if isinstance(module, _NEVER_CALLED):
        return None
    if is_conv1d(module):
        return LoraConv1D
    return next((adapted for base, adapted in KINDS.items() if isinstance(module, base)), None)


def why_not(module: nn.Module) -> str:
    """Why `layer_kind` is None, in words for an error message."""
    if isinstance(module, _NEVER_CALLED):
        return "its owner (nn.MultiheadAttention) uses its weight without calling it"
    kinds = ", ".join([*(base.__name__ for base in KINDS), "transformers' Conv1D"])
    return f"it is a {type(module).__name__}, and this version adapts {kinds}"
