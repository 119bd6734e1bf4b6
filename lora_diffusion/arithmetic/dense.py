"""Low rank out of a full matrix: truncated SVD of one layer's ΔW, in fp32."""

from __future__ import annotations

from typing import Any

import torch

from .derived import Fit
from .factored import Form, Product, balanced, layer_of, product_of, rank_kept

# Up to this many rows or columns the SVD is exact. Beyond, it is a randomised subspace iteration (Halko, Martinsson and
# Tropp 2011, algorithm 4.4): on pure noise, its worst case, the error is within 0.05 % of the best possible.
EXACT_SIZE = 512
_OVERSAMPLING = 16
_ROUNDS = 8


def fit_dense(
    delta: torch.Tensor,
    form: Form,
    rank: int,
    where: str,
    *,
    energy: float | None = None,
    dtype: torch.dtype,
    device: Any,
) -> Fit:
    """The layer of at most `rank` (of one group) nearest to ΔW, delta: (groups, out/groups, fan_in's product) in fp32.

    energy: keep no more than the smallest rank that has this share of the squared singular values.
    """
    asked = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    u, s, vh = truncated_svd(delta, rank)
    layer = layer_of(balanced(u, s, vh, rank_kept(s, asked**2, rank, energy)), form, dtype, device, where)
    stored = product_of(layer, where, device=delta.device)
    rest = torch.baddbmm(delta, stored.b.to(delta), stored.a.to(delta), alpha=-1.0)
    return Fit(layer, asked, float(torch.linalg.vector_norm(rest, dtype=torch.float64)))


def dense(product: Product) -> torch.Tensor:
    """ΔW in fp32, (groups, out/groups, fan_in's product)."""
    return product.b.float() @ product.a.float()


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, σ, Vᴴ of at least `rank` leading terms where there are as many; matrix: (…, m, n). Always the same result."""
    smaller, width = min(matrix.shape[-2:]), 2 * rank + _OVERSAMPLING
    if smaller <= EXACT_SIZE or 2 * width >= smaller:
        return torch.linalg.svd(matrix, full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(*matrix.shape[:-2], matrix.shape[-1], width, generator=generator).to(matrix)
    for _ in range(_ROUNDS):
        q = torch.linalg.qr(matrix @ q).Q
        q = torch.linalg.qr(matrix.mT @ q).Q
    u, s, vh = torch.linalg.svd(matrix @ q, full_matrices=False)
    return u, s, vh @ q.mT
