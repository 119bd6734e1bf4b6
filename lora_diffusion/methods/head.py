"""A head that is learned alone: the copies of `modules_to_save` are all there is, so this piece is empty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from .head_config import HeadConfig
from .piece import Piece


class HeadPiece(Piece):
    """Nothing beside the copies, which switch by themselves."""

    def modules(self) -> Iterator[nn.Module]:
        return iter(())

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def act(self, weight: float) -> None:
        """Nothing to do."""

    def act_in_rows(self, weights: Sequence[float] | None) -> None:
        """Nothing to do: where rows are mixed, whole modules are refused by name."""

    def remove(self) -> None:
        """Nothing to do."""


def build(
    component: nn.Module,
    config: HeadConfig,
    name: str,
    *,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> HeadPiece:
    """component, dtype, generator: not used."""
    return HeadPiece(config, name)
