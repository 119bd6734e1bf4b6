"""What a dialect reads from: named tensors with a header that was checked, whatever container they lie in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..errors import AdapterFormatError


@dataclass(frozen=True)
class TensorInfo:
    """dtype: safetensors' word ("F16"). start, end: bytes within the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Source(Protocol):
    """tensors: {name: TensorInfo}, known before any tensor is read. metadata: strings that came along."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def error(self, what: str) -> AdapterFormatError:
        """An error that names the file; `what` goes on from there ("is cut off")."""
        ...

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on the CPU. Raises AdapterFormatError if one holds NaN or infinity."""
        ...


class Subset:
    """Some of a source's tensors, as a source."""

    def __init__(self, source: Source, names: Iterable[str]) -> None:
        kept = set(names)
        self.path, self.metadata = source.path, source.metadata
        self.tensors = {name: info for name, info in source.tensors.items() if name in kept}
        self._source = source

    def error(self, what: str) -> AdapterFormatError:
        return self._source.error(what)

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        return self._source.read(names)
