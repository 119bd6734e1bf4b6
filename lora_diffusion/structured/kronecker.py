"""LoKr: the Kronecker product of a small matrix and a larger one, either of them perhaps a product itself.

The form is that of KronA (Edalati et al. 2022) as LyCORIS has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .tucker import contracted, worth_it


@dataclass(frozen=True, eq=False)
class LoKr:
    """ΔW = scale · w1 ⊗ w2, (a · b, c · d, *kernel) of w1 (a, c) and w2 (b, d, *kernel).

    w1: (a, c), or w1_a (a, r) and w1_b (r, c).
    w2: (b, d) or (b, d, kh, kw), or w2_a (b, r) and w2_b (r, d · kernel), or with a core t2 (r, r, kh, kw) w2_a (r, b)
        and w2_b (r, d).
    """

    w1: torch.Tensor | None = None
    w1_a: torch.Tensor | None = None
    w1_b: torch.Tensor | None = None
    w2: torch.Tensor | None = None
    w2_a: torch.Tensor | None = None
    w2_b: torch.Tensor | None = None
    t2: torch.Tensor | None = None
    scale: float = 1.0
    magnitude: torch.Tensor | None = None

    kind: ClassVar[str] = "LoKr"

    @property
    def rank(self) -> int:
        """Of w2, as LyCORIS counts; of w1 where only that is a product."""
        first, second = self._ranks()
        return first if self.w2 is not None and self.w1 is None else second

    @property
    def shape(self) -> tuple[int, ...]:
        a, c = _size(self.w1, self.w1_a, self.w1_b)
        if self.w2 is not None:
            b, d, *kernel = self.w2.shape
        elif self.t2 is not None:
            b, d, kernel = _width(self.w2_a), _width(self.w2_b), list(self.t2.shape[2:])
        else:
            (b, d), kernel = _size(None, self.w2_a, self.w2_b), []
        return a * b, c * d, *kernel

    def tensors(self) -> dict[str, torch.Tensor]:
        names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        return {f"lokr_{name}": getattr(self, name) for name in names if getattr(self, name) is not None}

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """w1 as (a, c) and w2 as (b, d · kernel), multiplied out, in fp32."""
        (left1, right1), (left2, right2) = self._products()
        return left1 @ right1, left2 @ right2

    def delta(self) -> torch.Tensor:
        return (self.scale * _kron(*self.halves())).view(self.shape)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(P @ Q) ⊗ (R @ S) = (P ⊗ R) @ (Q ⊗ S)."""
        if not worth_it(math.prod(self._ranks()), self.shape):
            return None
        (left1, right1), (left2, right2) = self._products()
        return _kron(right1, right2), _kron(left1, left2)

    def _ranks(self) -> tuple[int, int]:
        """Of w1 and of w2; of a matrix that is stored whole its smaller side."""
        first = min(self.w1.shape) if self.w1 is not None else _height(self.w1_b)
        if self.w2 is None:
            return first, _height(self.w2_b)
        return first, min(self.w2.shape[0], self.w2.shape[1:].numel())

    def _products(self) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """w1 as (a, r1) and (r1, c), w2 as (b, r2) and (r2, d · kernel), in fp32."""
        if self.t2 is None:
            return _product(self.w1, self.w1_a, self.w1_b), _product(self.w2, self.w2_a, self.w2_b)
        assert self.w2_a is not None and self.w2_b is not None, "a core is stored with both its factors"
        return _product(self.w1, self.w1_a, self.w1_b), (
            self.w2_a.float().T,
            contracted(self.t2, self.w2_b),
        )


def _kron(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """As torch.kron, which raises for some transposed matrices (torch 2.13, shape (2, 1) with strides (1, 2))."""
    blocks = left[:, None, :, None] * right[None, :, None, :]
    return blocks.reshape(left.shape[0] * right.shape[0], -1)


def _product(
    whole: torch.Tensor | None, left: torch.Tensor | None, right: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as a product, with an identity on its smaller side where it is stored whole."""
    if whole is None:
        assert left is not None and right is not None, "a matrix is stored whole or as both its factors"
        return left.float(), right.float()
    matrix = whole.float().flatten(1)
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.eye(rows, device=matrix.device), matrix
    return matrix, torch.eye(columns, device=matrix.device)


def _size(whole: torch.Tensor | None, left: torch.Tensor | None, right: torch.Tensor | None) -> tuple[int, int]:
    if whole is not None:
        return int(whole.shape[0]), int(whole.shape[1])
    return _height(left), _width(right)


def _height(factor: torch.Tensor | None) -> int:
    assert factor is not None, "a matrix is stored whole or as both its factors"
    return int(factor.shape[0])


def _width(factor: torch.Tensor | None) -> int:
    assert factor is not None, "a matrix is stored whole or as both its factors"
    return int(factor.shape[1])
