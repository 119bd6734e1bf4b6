"""A convolution's product with a core of the kernel's size between two 1×1 factors (LyCORIS's "tucker", or "cp")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, eq=False)
class TuckerLoCon:
    """ΔW[o, i, h, w] = scale · Σ_pq up[o, p] · mid[p, q, h, w] · down[q, i].

    up: (out, r, 1, 1) or (out, r); mid: (r, r, kh, kw); down: (r, in, 1, 1) or (r, in).
    """

    up: torch.Tensor
    mid: torch.Tensor
    down: torch.Tensor
    scale: float = 1.0
    magnitude: torch.Tensor | None = None

    kind: ClassVar[str] = "Tucker LoCon"

    @property
    def rank(self) -> int:
        return int(self.mid.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        return int(self.up.shape[0]), int(self.down.shape[1]), *self.mid.shape[2:]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"lora_up.weight": self.up, "lora_mid.weight": self.mid, "lora_down.weight": self.down}

    def delta(self) -> torch.Tensor:
        a, b = self.exact()
        return (self.scale * (b @ a)).view(self.shape)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A is the core with `down` multiplied into it, B is `up`."""
        return contracted(self.mid, self.down.flatten(1)), self.up.float().flatten(1)


def contracted(core: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Σ_j core[i, j, …] · right[j, q] in fp32 as (i, q · …); core: (r, r, kh, kw), right: (r, in)."""
    return torch.einsum("ij...,jq->iq...", core.float(), right.float()).flatten(1)


def worth_it(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether a product of `rank` is small beside the update itself: at most half the smaller side."""
    return rank <= min(shape[0], math.prod(shape[1:])) // 2
