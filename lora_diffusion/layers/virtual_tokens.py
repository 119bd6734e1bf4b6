"""Vectors for tokens that the embedding table does not have (Gal et al. 2022, textual inversion; Liu et al. 2021,
P-tuning): the table stays as it is, and ids of virtual tokens are answered from beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import AdapterMismatchError
from .host import AdaptedModule, SwappedModule, check_not_hooked, host_class

_PREFIX = "vectors_"


class TokenVectors(nn.Module):
    """What one adapter learned of its words. vectors: (n, dim), of all words one after the other; words: {word: how
    many vectors it has}, in that order."""

    def __init__(self, words: dict[str, int], vectors: torch.Tensor) -> None:
        super().__init__()
        self.words = dict(words)
        self.vectors = nn.Parameter(vectors)

    def of(self, word: str) -> torch.Tensor:
        """(n, dim)."""
        start = 0
        for other, count in self.words.items():
            if other == word:
                break
            start += count
        return self.vectors[start : start + self.words[word]]


class VirtualTokens(SwappedModule):
    """Mixin in front of an embedding's own class. `_place` (ids known) says which row of all vectors, stacked, an id
    has; -1 is the table's own."""

    _place: torch.Tensor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        place = self._place.to(ids.device)[ids]
        y = super().forward(ids.masked_fill(place >= 0, 0))
        stacked = torch.cat([part.vectors for part in self.all_vectors()]).to(y.dtype)
        return torch.where((place >= 0).unsqueeze(-1), stacked[place.clamp(min=0)], y)

    def all_vectors(self) -> list[TokenVectors]:
        return [part for part in self._modules.values() if isinstance(part, TokenVectors)]

    def vectors_of(self, name: str) -> TokenVectors:
        part = self._modules[_PREFIX + name]
        assert isinstance(part, TokenVectors), "add_vectors() put it there"
        return part

    def set_ids(self, ids: dict[str, list[int]]) -> None:
        """ids: {word: the id of each of its vectors}, of all words that there are."""
        rows, row = {}, 0
        for part in self.all_vectors():
            for word, count in part.words.items():
                rows.update({ids[word][k]: row + k for k in range(count)})
                row += count
        known = max([self.num_embeddings - 1, *rows]) + 1
        self._place = torch.full((known,), -1)
        for number, place in rows.items():
            self._place[number] = place


def check_can_take_words(path: str, embedding: nn.Module) -> None:
    """Raises AdapterMismatchError for an embedding with low-rank adapters, or whose forward is hidden."""
    if isinstance(embedding, AdaptedModule):
        raise AdapterMismatchError(f"{path} carries a low-rank adapter, and cannot learn words as well")
    check_not_hooked(path, embedding)


def add_vectors(embedding: Any, name: str, part: TokenVectors) -> None:
    """Let an embedding carry the words of adapter `name`; `set_ids` has to follow."""
    if not isinstance(embedding, VirtualTokens):
        embedding.__class__ = host_class(VirtualTokens, type(embedding))
        embedding._place = torch.full((embedding.num_embeddings,), -1)
    embedding.add_module(_PREFIX + name, part)


def remove_vectors(embedding: Any, name: str) -> None:
    """Take one adapter's words out; without any the embedding gets its own class back, else `set_ids` has to follow."""
    del embedding._modules[_PREFIX + name]
    if not embedding.all_vectors():
        embedding.__class__ = type(embedding).__bases__[1]
        del embedding._place
