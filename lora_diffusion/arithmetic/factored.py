"""Low-rank products in float64, without ever forming the (out, in) matrix that they stand for.

With B = Q_B·R_B and Aᵀ = Q_A·R_A (QR of tall matrices), B·A = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ: norms and singular values are those
of a core no larger than (rank, rank), and truncating the core's SVD is the best approximation of the whole (Eckart and
Young 1936).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..adapter import LowRank
from ..errors import AdapterFormatError, AdapterMismatchError, ConfigError
from .derived import Fit

# What rounding in float64 leaves of a difference of equal products, relative to the factors' norms.
_NOTHING = 1e-13


@dataclass(frozen=True)
class Form:
    """How a layer's update is laid out: ΔW is (out, *fan_in), in `groups` blocks of rows that share no factors.

    Linear: fan_in (in,). Conv2d: fan_in (in/groups, kh, kw). A is (rank, *fan_in), B is (out, rank/groups) or
    (out, rank/groups, 1, 1).
    """

    out: int
    fan_in: tuple[int, ...]
    groups: int = 1

    def __str__(self) -> str:
        return f"{(self.out, *self.fan_in)}" + (f" in {self.groups} groups" if self.groups > 1 else "")

    def per_group(self, rank: int, where: str) -> int:
        """Raises ConfigError for a rank that the groups cannot share evenly."""
        if rank % self.groups:
            raise ConfigError(f"r={rank}: {where} is in {self.groups} groups and needs a multiple of {self.groups}")
        return rank // self.groups


@dataclass(frozen=True)
class Product:
    """ΔW = b @ a, block by block. b: (groups, out/groups, rank/groups), a: (groups, rank/groups, fan_in's product)."""

    b: torch.Tensor
    a: torch.Tensor

    @property
    def rank(self) -> int:
        """Of one group."""
        return int(self.a.shape[1])

    def norm(self) -> float:
        """Frobenius norm; 0.0 where the product is zero but for rounding."""
        norm = float(torch.linalg.vector_norm(torch.linalg.qr(self.b).R @ self.a))
        return norm if norm > _NOTHING * float(self.b.norm() * self.a.norm()) else 0.0


def form_of(layer: LowRank, where: str) -> Form:
    """Raises AdapterMismatchError for factors that are no linear update or do not fit each other."""
    if layer.magnitude is not None:
        raise AdapterMismatchError(f"{where} is a DoRA layer, which is no linear update of the weight: merge it first")
    a, b = tuple(layer.a.shape), tuple(layer.b.shape)
    sound = len(a) == len(b) >= 2 and 0 not in (*a, *b) and all(size == 1 for size in b[2:])
    if not sound or a[0] % b[1] or b[0] % (a[0] // b[1]):
        raise AdapterMismatchError(f"{where} has factors that do not fit each other: A {a}, B {b}")
    return Form(b[0], a[1:], a[0] // b[1])


def product_of(layer: LowRank, where: str, weight: float = 1.0, device: Any = None) -> Product:
    """A layer's update times `weight`, its scale multiplied into b.

    Raises AdapterMismatchError as `form_of`, AdapterFormatError for factors that hold NaN or infinity.
    """
    form = form_of(layer, where)
    device = working_device(layer.a.device if device is None else device)
    a, b = (factor.detach().to(device).to(torch.float64) for factor in (layer.a, layer.b))
    a = a.reshape(form.groups, layer.rank // form.groups, -1)
    b = b.reshape(form.groups, form.out // form.groups, -1) * (weight * layer.scale)
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterFormatError(f"{where} holds NaN or infinity: the adapter is damaged")
    return Product(b, a)


def working_device(device: Any) -> torch.device:
    """Where to compute what belongs on `device`: there, unless it has no float64 and no decompositions."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def layer_of(product: Product, form: Form, dtype: torch.dtype, device: Any, where: str, scale: float = 1.0) -> LowRank:
    """The way back; scale: what is already part of neither b nor a. Raises ConfigError if `dtype` cannot hold it."""
    a = product.a.reshape(-1, *form.fan_in)
    b = product.b.reshape(form.out, product.rank, *(1 for _ in form.fan_in[1:]))
    a, b = (factor.to(dtype, copy=True).to(device).contiguous() for factor in (a, b))
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ConfigError(f"{where} is too large for {str(dtype).removeprefix('torch.')}: give dtype=torch.float32")
    return LowRank(a, b, scale)


def added(products: Sequence[Product]) -> Product:
    """The sum, exactly: its rank is the sum of the ranks."""
    return Product(torch.cat([p.b for p in products], dim=2), torch.cat([p.a for p in products], dim=1))


def padded(product: Product, rank: int) -> Product:
    """The same product at a higher rank (of one group), with zeros."""
    more = rank - product.rank
    return Product(torch.nn.functional.pad(product.b, (0, more)), torch.nn.functional.pad(product.a, (0, 0, 0, more)))


def truncated(product: Product, rank: int | None = None, energy: float | None = None) -> Product:
    """The best approximation of at most `rank` (of one group), or of the smallest rank that keeps `energy`."""
    q_b, r_b = torch.linalg.qr(product.b)
    q_a, r_a = torch.linalg.qr(product.a.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    k = rank_kept(s, float(s.square().sum()), rank, energy)
    core = balanced(u, s, vh, k)
    return Product(q_b @ core.b, core.a @ q_a.mT)


def balanced(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int) -> Product:
    """The first `rank` terms of an SVD, √σ on either side, which is kind to half precision."""
    root = s[:, :rank].sqrt()
    return Product(u[:, :, :rank] * root.unsqueeze(1), root.unsqueeze(2) * vh[:, :rank])


def rank_kept(s: torch.Tensor, total: float, rank: int | None, energy: float | None) -> int:
    """The rank (of one group) that fits within `rank` and keeps no more than it takes to keep `energy`.

    s: (groups, k) singular values, descending. total: the sum of all squares, those that are not in `s` included.
    """
    most = s.shape[1] if rank is None else min(rank, s.shape[1])
    if energy is None:
        return most
    kept = s.double().square().sum(dim=0).cumsum(dim=0)
    return min(most, int((kept < energy * total).sum()) + 1)


def measured(layer: LowRank, asked: Product, where: str) -> Fit:
    """How far a layer, as it is stored, is from the product that was asked for."""
    stored = product_of(layer, where, -1.0, asked.a.device)
    return Fit(layer, asked.norm(), added([asked, stored]).norm())
