"""LoHa: two low-rank products, multiplied element by element (Hyeon-Woo et al. 2022, "FedPara")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .tucker import contracted, worth_it


@dataclass(frozen=True, eq=False)
class LoHa:
    """ΔW = scale · (w1_a @ w1_b) ∘ (w2_a @ w2_b).

    w1_a, w2_a: (out, r); w1_b, w2_b: (r, fan_in's product).
    With cores t1, t2 (r, r, kh, kw) the other four are (r, out) and (r, in), and each side is
    W[p, q, h, w] = Σ_ij t[i, j, h, w] · w_a[i, p] · w_b[j, q].
    """

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    t1: torch.Tensor | None = None
    t2: torch.Tensor | None = None
    scale: float = 1.0
    magnitude: torch.Tensor | None = None

    kind: ClassVar[str] = "LoHa"

    @property
    def rank(self) -> int:
        return int(self.w1_b.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        if self.t1 is None:
            return int(self.w1_a.shape[0]), int(self.w1_b.shape[1])
        return int(self.w1_a.shape[1]), int(self.w1_b.shape[1]), *self.t1.shape[2:]

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {
            "w1_a": self.w1_a,
            "w1_b": self.w1_b,
            "w2_a": self.w2_a,
            "w2_b": self.w2_b,
            "t1": self.t1,
            "t2": self.t2,
        }
        return {f"hada_{name}": tensor for name, tensor in named.items() if tensor is not None}

    def delta(self) -> torch.Tensor:
        (left1, right1), (left2, right2) = self._products()
        return (self.scale * (left1 @ right1) * (left2 @ right2)).view(self.shape)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """By Khatri and Rao: every column of w1_a times every column of w2_a, every row of w1_b times every of w2_b."""
        if not worth_it(int(self.w1_b.shape[0] * self.w2_b.shape[0]), self.shape):
            return None
        (left1, right1), (left2, right2) = self._products()
        a = (right1.unsqueeze(1) * right2.unsqueeze(0)).flatten(0, 1)
        b = (left1.unsqueeze(2) * left2.unsqueeze(1)).flatten(1)
        return a, b

    def _products(self) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Either side as (out, r) and (r, fan_in's product) in fp32."""
        return _side(self.w1_a, self.w1_b, self.t1), _side(self.w2_a, self.w2_b, self.t2)


def _side(left: torch.Tensor, right: torch.Tensor, core: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if core is None:
        return left.float(), right.float()
    return left.float().T, contracted(core, right)
