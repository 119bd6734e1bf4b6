"""A full difference of weights, which LyCORIS's algorithm "full" saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, eq=False)
class Dense:
    """ΔW = scale · diff; diff: (out, in) or (out, in, kh, kw)."""

    diff: torch.Tensor
    scale: float = 1.0
    magnitude: torch.Tensor | None = None

    kind: ClassVar[str] = "full difference"

    @property
    def rank(self) -> int:
        return int(min(self.diff.shape[0], self.diff.shape[1:].numel()))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.diff.shape)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"diff": self.diff}

    def delta(self) -> torch.Tensor:
        return self.scale * self.diff.float()

    def exact(self) -> None:
        return None
