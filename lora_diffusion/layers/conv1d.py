"""The low-rank term beside transformers' Conv1D, GPT-2's linear layer with a transposed weight."""

from __future__ import annotations

import torch
from torch import nn

from .linear import LoraLinear


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D or a subclass of it; asked by name, so that transformers need not be imported."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


class LoraConv1D(LoraLinear):
    """As LoraLinear, for a weight of (in, out). A: (r, in), B: (out, r)."""

    transposed = True

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        wide, out = module.weight.shape
        return (rank, wide), (out, rank)

    @staticmethod
    def is_plain(base: type[nn.Module]) -> bool:
        return base.forward.__module__ == "transformers.pytorch_utils"

    def oriented_weight(self) -> torch.Tensor:
        weight = self._parameters["weight"]
        assert weight is not None, "a Conv1D has a weight"
        return weight.t()
