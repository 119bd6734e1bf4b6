"""Updates of a weight that are more than one product of two factors, as LyCORIS stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from .dense import Dense
from .hadamard import LoHa
from .kronecker import LoKr
from .tucker import TuckerLoCon

__all__ = ["Dense", "LoHa", "LoKr", "Structured", "TuckerLoCon"]


class Structured(Protocol):
    """One module's update ΔW in a form of its own; `lowering.py` makes a LowRank of it.

    kind: its name in the field ("LoHa"). rank: of its own factors. scale: what multiplies them.
    magnitude: (out,), DoRA's lengths, else None.
    """

    @property
    def kind(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def scale(self) -> float: ...

    @property
    def magnitude(self) -> torch.Tensor | None: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, *fan_in) of ΔW, known without computing anything.

        (out, in) or (out, in, kh, kw); a convolution's whose factors were stored flattened is (out, in · kh · kw), in
        the order of the weight's own elements, and only the model (or the module's name) says where the kernel is.
        """
        ...

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Its own tensors by LyCORIS's names ("hada_w1_a"), scale and magnitude apart."""
        ...

    def delta(self) -> torch.Tensor:
        """ΔW in fp32, of shape `shape`, without DoRA's lengths; allocates the whole of it."""
        ...

    def exact(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (k, fan_in's product) and B (out, k) in fp32 with ΔW = scale · B @ A, exactly; None where that takes a k of
        more than half the smaller side and is not how the layer is stored."""
        ...
