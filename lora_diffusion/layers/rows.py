"""A batch whose rows use different adapters, as one layer sees it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..errors import ConfigError
from .factors import LoraFactors


class Gather(NamedTuple):
    """Each row's own columns out of the stacked terms. index: (batch, R) int64; strength: (batch, R) float32, what
    multiplies them; 0 where a row has fewer than R columns, or no adapter at all."""

    index: torch.Tensor
    strength: torch.Tensor

    def stacked(self, columns: int) -> torch.Tensor:
        """(batch, columns): the strength of every column of the stack in every row."""
        return self.strength.new_zeros(self.index.shape[0], columns).scatter_add_(1, self.index, self.strength)


class RowPlan:
    """Which terms a layer stacks, and how strongly each acts in each row.

    parts: (part, scale) of every adapter at this layer that some row uses.
    choice: (rows, adapters) of the weights: 0 where a row does not use the adapter, and at most one other in a row.
    beside: a batch of k times the rows has the k copies of a row side by side, as beam search lays them out; else a
        batch of twice the rows holds both halves of classifier-free guidance, one after the other.
    made: what was worked out for other layers, by ranks and scales; most layers of a model need the same.
    """

    def __init__(
        self, parts: tuple[tuple[LoraFactors, float], ...], choice: torch.Tensor, made: dict[Any, Any],
        beside: bool = False,
    ) -> None:  # fmt: skip
        self.parts, self.beside = parts, beside
        self.rows, self.choice = choice.shape[0], choice
        widths = [(k, a.shape[0], scale * sign) for k, (part, scale) in enumerate(parts) for a, _, sign in part.pairs()]
        key = (tuple(widths), tuple(choice.flatten().tolist()))
        if key not in made:
            made[key] = _gathered(widths, choice)
        self._by_batch: dict[tuple[int, torch.device], Gather] = {(self.rows, choice.device): made[key]}

    def gather(self, batch: int, device: torch.device) -> Gather:
        """Each row's own columns. Raises ConfigError for a batch that does not repeat the rows."""
        found = self._by_batch.get((batch, device))
        if found is None:
            times, rest = divmod(batch, self.rows)
            if rest or not times or (times > 2 and not self.beside):
                raise ConfigError(
                    f"adapters_per_sample was told {self.rows} adapters and the batch has {batch} rows: "
                    "name one adapter (or None) for each row, or for each pair of rows of classifier-free guidance"
                )
            own = next(iter(self._by_batch.values()))
            copies = (t.repeat_interleave(times, dim=0) if self.beside else t.repeat(times, 1) for t in own)
            found = Gather(*(t.to(device) for t in copies))
            self._by_batch[batch, device] = found
        return found


def _gathered(widths: list[tuple[int, int, float]], choice: torch.Tensor) -> Gather:
    owners = torch.cat([torch.full((width,), k) for k, width, _ in widths])
    factors = torch.cat([torch.full((width,), factor) for _, width, factor in widths])
    most = int(owners.bincount().max())
    index = torch.zeros(choice.shape[0], most, dtype=torch.int64)
    strength = torch.zeros(choice.shape[0], most)
    for row, weights in enumerate(choice):
        for k in weights.nonzero().flatten().tolist():
            own = (owners == k).nonzero().flatten()
            index[row, : len(own)] = own
            strength[row, : len(own)] = factors[own] * weights[k]
    return Gather(index, strength)
