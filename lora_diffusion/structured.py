"""Updates of a weight that are more than one product of two factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from .adapter import LowRank


class Structured(Protocol):
    """One module's update ΔW in a form of its own; `lowering.py` makes a LowRank of it.

    kind: its name in the field ("LoHa"). rank: of its own factors. scale: what multiplies them.
    magnitude: (out,), DoRA's lengths, else None.
    """

    kind: str
    scale: float
    magnitude: torch.Tensor | None

    @property
    def rank(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, *fan_in) of ΔW; known without computing anything."""
        ...

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Its own tensors by the names that its dialect gives them."""
        ...

    def delta(self) -> torch.Tensor:
        """ΔW in fp32, without DoRA's lengths; allocates the whole of it."""
        ...

    def exact(self) -> LowRank | None:
        """The same update as one product, exactly, if that takes a rank of at most half the smaller side, else None."""
        ...
