"""DoRA: the direction of a weight learned by low rank, its length apart (Liu et al. 2024, "DoRA", equation 5).

y = m / ‖W + s·B·A‖ · (W + s·B·A)·x + b,   the norm of each output's row, taken as a constant (section 4.3)
"""

from __future__ import annotations

import torch

from .factors import LoraFactors


@torch.no_grad()
def row_norms(weight: torch.Tensor, part: LoraFactors) -> torch.Tensor:
    """‖W + s·B·A‖ of every row, (out,) float32; weight: (out, in) or (out, in, kh, kw).

    B·A is never formed: ‖W + s·B·A‖² = ‖W‖² + 2 s Σ_r (W·Aᵀ)∘B + s² Σ_r (B·(A·Aᵀ))∘B, all of it rank wide.
    """
    flat = weight.flatten(1)
    a, b = part.lora_A.flatten(1).float(), part.lora_B.flatten(1).float()
    cross = ((flat @ a.to(flat.dtype).t()).float() * b).sum(dim=1)
    square = ((b @ (a @ a.t())) * b).sum(dim=1)
    own = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32).square()
    return (own + 2 * part.scale * cross + part.scale**2 * square).clamp_min(1e-24).sqrt()


def gain_over_base(weight: torch.Tensor, part: LoraFactors) -> torch.Tensor:
    """m / ‖W + s·B·A‖, (out,) float32; learns through m alone."""
    assert part.lora_magnitude_vector is not None, "only asked for where DoRA is used"
    return part.lora_magnitude_vector.float() / row_norms(weight, part)
