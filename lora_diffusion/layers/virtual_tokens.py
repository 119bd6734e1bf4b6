"""Vectors for tokens that the embedding table does not have (Gal et al. 2022, textual inversion; Liu et al. 2021,
P-tuning): the table stays as it is, and ids of virtual tokens are answered from beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import AdapterMismatchError
from .host import AdaptedModule, SwappedModule, check_not_hooked, host_class

_PREFIX = "vectors_"


class VirtualPart(nn.Module):
    """What one adapter answers some ids with; its forward takes nothing and gives (n, dim), a row for each id.

    ids: which, in the order of the rows.
    costly: whether the rows are computed rather than kept.
    acting: False where its ids are not expected; they are answered all the same.
    """

    costly = False
    acting = True

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[int] = []

    def forward(self) -> torch.Tensor:
        raise NotImplementedError


class TokenVectors(VirtualPart):
    """What one adapter learned of its words. vectors: (n, dim), of all words one after the other; words: {word: how
    many vectors it has}, in that order."""

    def __init__(self, words: dict[str, int], vectors: torch.Tensor) -> None:
        super().__init__()
        self.words = dict(words)
        self.vectors = nn.Parameter(vectors)

    def forward(self) -> torch.Tensor:
        return self.vectors

    def of(self, word: str) -> torch.Tensor:
        """(n, dim)."""
        start = 0
        for other, count in self.words.items():
            if other == word:
                break
            start += count
        return self.vectors[start : start + self.words[word]]


class VirtualTokens(SwappedModule):
    """Mixin in front of an embedding's own class. `_place` (ids known) says which row of all parts', stacked, an id
    has; -1 is the table's own."""

    _place: torch.Tensor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self._place.device != ids.device:
            self._place = self._place.to(ids.device)
        place = self._place[ids]
        virtual = place >= 0
        y = super().forward(ids.masked_fill(virtual, 0))
        parts = self.virtual_parts()
        idle = not any(part.acting for part in parts)
        spares = not torch.is_grad_enabled() and any(part.costly for part in parts)
        if (idle or spares) and _can_look(ids) and not bool(virtual.any()):
            return y  # the table's own, not one that asks for gradients: kernels are chosen by that
        stacked = torch.cat([part().to(y.dtype) for part in parts])
        rows = F.embedding(place.clamp(min=0), stacked)  # its gradient sums in a fixed order
        return torch.where(virtual.unsqueeze(-1), rows, y)

    def virtual_parts(self) -> list[VirtualPart]:
        return [part for part in self._modules.values() if isinstance(part, VirtualPart)]

    def all_vectors(self) -> list[TokenVectors]:
        """The parts that are words'."""
        return [part for part in self.virtual_parts() if isinstance(part, TokenVectors)]

    def vectors_of(self, name: str) -> TokenVectors:
        part = self._modules[_PREFIX + name]
        assert isinstance(part, TokenVectors), "add_vectors() put it there"
        return part

    def set_ids(self, ids: dict[str, list[int]]) -> None:
        """ids: {word: the id of each of its vectors}, of all words that there are."""
        for part in self.all_vectors():
            part.ids = [number for word, count in part.words.items() for number in ids[word][:count]]
        self.arrange()

    def arrange(self) -> None:
        """Bring the places in line with the ids of the parts."""
        ids = [number for part in self.virtual_parts() for number in part.ids]
        known = max([self.num_embeddings - 1, *ids]) + 1
        self._place = torch.full((known,), -1)
        self._place[torch.tensor(ids, dtype=torch.long)] = torch.arange(len(ids))

    def next_id(self) -> int:
        """The lowest id from which on none is in use."""
        return int(self._place.shape[0])


def _can_look(ids: torch.Tensor) -> bool:
    """Whether Python can ask for values: neither compiling nor computing with shapes alone."""
    return type(ids) is torch.Tensor and not ids.is_meta and not torch.compiler.is_compiling()


def check_can_take_words(path: str, embedding: nn.Module) -> None:
    """Raises AdapterMismatchError for an embedding with low-rank adapters or prompts, or whose forward is hidden."""
    check_can_take_part(path, embedding, "words")
    if isinstance(embedding, VirtualTokens) and len(embedding.all_vectors()) != len(embedding.virtual_parts()):
        raise AdapterMismatchError(f"{path} carries a prompt, and cannot learn words as well: their ids could be one")


def check_can_take_part(path: str, embedding: nn.Module, what: str) -> None:
    """Raises AdapterMismatchError for an embedding with low-rank adapters, or whose forward is hidden."""
    if isinstance(embedding, AdaptedModule):
        raise AdapterMismatchError(f"{path} carries a low-rank adapter, and cannot learn {what} as well")
    check_not_hooked(path, embedding)


def add_part(embedding: Any, key: str, part: VirtualPart) -> None:
    """Let an embedding answer for a part, which becomes its child `key`; `arrange` has to follow."""
    if not isinstance(embedding, VirtualTokens):
        embedding.__class__ = host_class(VirtualTokens, type(embedding))
        embedding._place = torch.full((embedding.num_embeddings,), -1)
    embedding.add_module(key, part)


def remove_part(embedding: Any, key: str) -> None:
    """Take one part out; without any the embedding gets its own class back, else `arrange` has to follow."""
    del embedding._modules[key]
    if not embedding.virtual_parts():
        embedding.__class__ = _without(type(embedding))
        del embedding._place


def _without(cls: Any) -> Any:
    """A host class without `VirtualTokens`, which low-rank adapters may have come in front of."""
    mixin, base = cls.__bases__
    return base if mixin is VirtualTokens else host_class(mixin, _without(base))


def add_vectors(embedding: Any, name: str, part: TokenVectors) -> None:
    """Let an embedding carry the words of adapter `name`; `set_ids` has to follow."""
    add_part(embedding, _PREFIX + name, part)


def remove_vectors(embedding: Any, name: str) -> None:
    """Take one adapter's words out; without any the embedding gets its own class back, else `set_ids` has to follow."""
    remove_part(embedding, _PREFIX + name)
