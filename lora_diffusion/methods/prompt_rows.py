"""Rows of a batch that get something in front, each a number of columns of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

IGNORED = -100  # the label that losses skip


class Heads:
    """What comes in front of each row.

    ids: (rows, width), the longest row's number of columns; shorter ones are filled up and left out again by `joined`.
    left: whether the rows that become shorter than others are padded in front, and not at the end.
    """

    def __init__(self, heads: Sequence[Sequence[int]], rows: torch.Tensor, left: bool) -> None:
        """rows: (rows, columns), which the heads come in front of."""
        self.left, self.columns = left, rows.shape[1]
        self.counts = torch.tensor([len(head) for head in heads], device=rows.device)
        self.width = max(len(head) for head in heads)
        self.uneven = any(len(head) != self.width for head in heads)
        filled = [[*head, *[0] * (self.width - len(head))] for head in heads]
        self.ids = torch.tensor(filled, dtype=rows.dtype, device=rows.device)

    def joined(self, rows: torch.Tensor, head: torch.Tensor | int, padding: int) -> torch.Tensor:
        """(rows, width + columns). rows: (rows, columns). head: (rows, width), or one value."""
        if isinstance(head, int):
            head = rows.new_full((rows.shape[0], self.width), head)
        if not self.uneven:
            return torch.cat([head.to(rows.dtype), rows], dim=1)
        whole = torch.cat([head.to(rows.dtype), rows, rows.new_full((rows.shape[0], 1), padding)], dim=1)
        return whole.gather(1, self._order())

    def positions(self, rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Positions that count the heads: those begin where the row's own did, which go on after them."""
        rows = rows.expand(self.counts.shape[0], -1)
        attended = rows if mask is None else rows.masked_fill(mask == 0, torch.iinfo(rows.dtype).max)
        first = attended.min(dim=1, keepdim=True).values
        head = first + torch.arange(self.width, device=rows.device)
        return self.joined(rows + self.counts.unsqueeze(1), head, 0)

    def moved(self, places: torch.Tensor) -> torch.Tensor:
        """Columns of the rows, (rows,), as columns of the joined ones; those beyond the rows stay beyond."""
        moved = places + self.counts + (self.width - self.counts if self.left else 0)
        moved = torch.where(places >= self.columns, self.width + self.columns, moved)
        return torch.where(places < 0, places, moved)

    def _order(self) -> torch.Tensor:
        """(rows, width + columns): which column of [head, row, padding] comes where."""
        columns = torch.arange(self.width + self.columns, device=self.counts.device).unsqueeze(0)
        counts = self.counts.unsqueeze(1)
        place = columns - (self.width - counts if self.left else 0)
        order = torch.where(place < counts, place, place + self.width - counts)
        outside = (place < 0) | (place >= counts + self.columns)
        return order.masked_fill(outside, self.width + self.columns)
