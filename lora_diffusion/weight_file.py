"""A safetensors file of model weights, read and rewritten one tensor at a time.

Unlike `files/safetensors_file.py`, which reads adapters, this takes tensors of any dtype, and holds no more than one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import ModelNotFoundError
from .files.safetensors_file import DTYPES, tensor_bytes

MAX_HEADER_BYTES = 64 * 2**20
_BLOCK = 4 * 2**20


@dataclass(frozen=True)
class Stored:
    """One tensor in the file. dtype: safetensors' word. start, end: bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def is_float(self) -> bool:
        return self.dtype in DTYPES


class WeightFile:
    """tensors: {name: Stored}, in the order of their bytes.

    Raises ModelNotFoundError, naming the file, where it is no sound safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                size = path.stat().st_size
                length = int.from_bytes(stream.read(8), "little")
                if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                    raise self.error(f"is no safetensors file, or is cut off ({size:,} bytes)")
                header = json.loads(stream.read(length).decode("utf-8"))
        except OSError as problem:
            raise self.error(f"cannot be read ({problem.strerror or problem})") from None
        except (ValueError, RecursionError):
            raise self.error("is no safetensors file: its header is not JSON") from None
        self.data_start = 8 + length
        if not isinstance(header, dict):
            raise self.error("is no safetensors file: its header is not a table")
        header.pop("__metadata__", None)
        found = {name: self._checked(name, entry) for name, entry in header.items()}
        self.tensors = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].end)))
        position = self.data_start
        for stored in self.tensors.values():
            if stored.start != position:
                raise self.error("is damaged: its tensors overlap or leave gaps")
            position = stored.end
        if position != size:
            raise self.error(f"is cut off or too long: its tensors end at byte {position:,}, the file at {size:,}")

    def error(self, what: str) -> ModelNotFoundError:
        return ModelNotFoundError(f"{self.path} {what}")

    def read(self, name: str) -> torch.Tensor:
        """One tensor of a floating dtype, on the CPU."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype][0])
        try:
            with self.path.open("rb") as stream:
                stream.seek(stored.start)
                if stream.readinto(tensor.reshape(-1).view(torch.uint8).numpy()) != stored.end - stored.start:
                    raise self.error("has become shorter while it was read")
        except OSError as problem:
            raise self.error(f"cannot be read ({problem.strerror or problem})") from None
        return tensor

    def rewrite(self, target: Path, names: Iterable[str], change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """A copy in which the tensors `names` are replaced by change(name, tensor), of the same shape and dtype."""
        names = set(names)
        with self.path.open("rb") as source, target.open("wb") as out:
            _copy(source, out, self.data_start)
            for name, stored in self.tensors.items():
                if name not in names:
                    source.seek(stored.start)
                    _copy(source, out, stored.end - stored.start)
                    continue
                raw = tensor_bytes(change(name, self.read(name)))
                assert len(raw) == stored.end - stored.start, "the same shape and dtype"
                out.write(raw)

    def _checked(self, name: str, entry: Any) -> Stored:
        entry = entry if isinstance(entry, dict) else {}
        shape, offsets = entry.get("shape", ""), entry.get("data_offsets", "")
        if not name.isprintable() or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
            raise self.error(f"has a broken entry for {name[:80]!a}")
        word, (start, end) = str(entry.get("dtype")), offsets
        if end < start or (word in DTYPES and end - start != math.prod(shape) * DTYPES[word][1]):
            raise self.error(f"is damaged: {name} of shape {shape} does not have the bytes that it needs")
        return Stored(word, tuple(shape), self.data_start + start, self.data_start + end)


def _copy(source: BinaryIO, out: BinaryIO, count: int) -> None:
    while count:
        block = source.read(min(count, _BLOCK))
        if not block:
            raise OSError("the file has become shorter while it was copied")
        out.write(block)
        count -= len(block)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)
