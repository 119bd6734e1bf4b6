"""The low-rank term beside an embedding table: row i of the table is moved by B · A[:, i]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .composed import compose, compose_all
from .host import AdaptedModule
from .rows import Gather


class LoraEmbedding(AdaptedModule):
    """ids: (…), y: (…, dim), A: (r, entries), B: (dim, r). A starts at zero and B at random, as in loralib and PEFT.

    Only the table is adapted: an output head tied to it keeps the base's weight.
    """

    transposed = True  # a row of the table is an output for one entry

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, module.num_embeddings), (module.embedding_dim, rank)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() and self._rows is None:
            return compose_all(self, ids, super().forward(ids))
        if not self._active and self._rows is None:
            return super().forward(ids)
        return compose(self, ids, super().forward(ids))

    def low(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        inside = x < a.shape[1]  # ids beyond are virtual tokens', which have no row here
        rows = F.embedding(
            x.masked_fill(~inside, 0), a.t(), self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        )
        return rows * inside.unsqueeze(-1).to(rows.dtype)

    def low_rows(self, x: torch.Tensor, a: torch.Tensor, gather: Gather) -> torch.Tensor:
        h = self.low(x, a)  # a row of the table is short: all adapters' are read, and each row's own taken
        index, strength = (t.view(t.shape[0], *[1] * (h.ndim - 2), -1) for t in gather)
        return h.gather(-1, index.expand(*h.shape[:-1], -1)) * strength.to(h.dtype)

    def up_rows(self, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        term = h.reshape(h.shape[0], -1, h.shape[-1]) @ b.to(h.dtype)
        return term.view(*h.shape[:-1], -1) * getattr(self, "embed_scale", 1.0)

    def up(self, h: torch.Tensor, b: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        term = F.linear(h, b.to(h.dtype)) * getattr(self, "embed_scale", 1.0)  # Gemma multiplies what it reads
        return term if onto is None else onto + term.to(onto.dtype)
