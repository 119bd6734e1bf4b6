"""The low-rank term beside a Linear layer.

    y = W·x + b + Σ_i  w_i · s_i · B_i · A_i · dropout(x)        (Hu et al. 2021, equation 3)

x: (…, in), y: (…, out), A: (r, in), B: (out, r). `x` keeps its dtype: the small factors are cast to it, not it to
theirs, and their gradients come back in the factors' own dtype (fp32 as a rule). What autograd keeps is a reference to
x (with dropout: the dropped copy), the rank-wide product and the cast factors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .host import AdaptedModule


class LoraFactors(nn.Module):
    """A (r, in) and B (out, r) of one adapter at one layer."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.scale = scale
        self.dropout = dropout

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"


class LoraLinear(AdaptedModule):
    """A Linear layer with any number of low-rank terms; without an active one it is the Linear layer's own forward."""

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, module.in_features), (module.out_features, rank)

    @staticmethod
    def make_part(a: torch.Tensor, b: torch.Tensor, scale: float, dropout: float) -> nn.Module:
        return LoraFactors(a, b, scale, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        for factors, factor in self._active:
            dropped = F.dropout(x, factors.dropout, training=self.training) if factors.dropout else x
            y = add_low_rank(y, dropped, factors.lora_A, factors.lora_B, factor)
        return y


def add_low_rank(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """y + scale · x·Aᵀ·Bᵀ in one accumulating product; y: (…, out), x: (…, in). The result has y's dtype.

    Under autocast the three products run in autocast's dtype, as the base layer's did.
    """
    h = F.linear(x, a.to(x.dtype))
    b = b.to(h.dtype)
    if y.dtype != h.dtype:  # a base layer that answers in a dtype of its own (some quantised ones)
        return y + (scale * F.linear(h, b)).to(y.dtype)
    rows = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), b.t(), alpha=scale)
    return rows.view(y.shape)
