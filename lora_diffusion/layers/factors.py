"""What one adapter has learned at one layer."""

from __future__ import annotations

import torch
from torch import nn


class LoraFactors(nn.Module):
    """The low-rank term s · B · A of one adapter at one layer, and what some methods add to it.

    lora_A, lora_B: learned; shapes are those of the kind of layer.
    scale: s. dropout: probability of dropping an element on the way to A, in training mode.
    lora_magnitude_vector: (out,), DoRA's learned length of each row of the weight, else None.
    anchor_A, anchor_B: for initial values that are not zero together (PiSSA, OLoRA): the first A and B, fixed, whose
        product is taken off again, so that the layer starts as the base layer without touching its weight. Else None.
    gain: () tensor, the adapter's weight where it acts and else 0, one for all layers of a component: compiled code
        reads it, so that switching changes a value and not the program.
    """

    anchor_A: torch.Tensor | None
    anchor_B: torch.Tensor | None
    lora_magnitude_vector: nn.Parameter | None

    def __init__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        dropout: float = 0.0,
        *,
        magnitude: torch.Tensor | None = None,
        anchored: bool = False,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.register_parameter("lora_magnitude_vector", None if magnitude is None else nn.Parameter(magnitude))
        self.register_buffer("anchor_A", a.detach().clone() if anchored else None)
        self.register_buffer("anchor_B", b.detach().clone() if anchored else None)
        self.scale = scale
        self.dropout = dropout
        self.gain = torch.zeros(())

    @property
    def rank(self) -> int:
        return int(self.lora_A.shape[0])

    def pairs(self) -> tuple[tuple[torch.Tensor, torch.Tensor, float], ...]:
        """(A, B, sign) of the products that make up the term."""
        own = (self.lora_A, self.lora_B, 1.0)
        if self.anchor_A is None or self.anchor_B is None:
            return (own,)
        return own, (self.anchor_A, self.anchor_B, -1.0)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"
