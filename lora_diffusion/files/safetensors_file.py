"""The safetensors container, read with suspicion and written with the same bytes every time.

Layout: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import AdapterFormatError
from .source import TensorInfo

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 50_000
MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 5
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# Only floats belong into an adapter. safetensors' word -> torch dtype, bytes.
DTYPES = {
    "F64": (torch.float64, 8),
    "F32": (torch.float32, 4),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
}

# One whole number alone is taken as well: diffusers' export writes kohya's alphas so. Word -> bytes.
WHOLE = {"I64": 8, "I32": 4}


class TensorFile:
    """A checked safetensors file: `tensors` (name -> TensorInfo) and `metadata` at once, values through `read`.

    Raises AdapterFormatError, naming the file and what is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _refuse_other_kinds(path)
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                head = stream.read(8)
                length = int.from_bytes(head, "little")
                if len(head) < 8 or not 2 <= length <= size - 8:
                    raise self.error(f"is no safetensors file, or is cut off ({size:,} bytes)")
                if length > MAX_HEADER_BYTES:
                    raise self.error(f"has a header of {length:,} bytes; the limit is {MAX_HEADER_BYTES:,}")
                header = self._parse(stream.read(length))
        except OSError as error:
            raise self.error(f"cannot be read ({error.strerror or error})") from None
        self.metadata = self._checked_metadata(header.pop("__metadata__", {}))
        if len(header) > MAX_TENSORS:
            raise self.error(f"declares {len(header):,} tensors; the limit is {MAX_TENSORS:,}")
        self.tensors = {self._checked_name(name): self._checked_info(name, info) for name, info in header.items()}
        self._check_extent(size - 8 - length)
        self._data_start = 8 + length

    def error(self, what: str) -> AdapterFormatError:
        return AdapterFormatError(f"{self.path} {what}")

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on the CPU. Raises AdapterFormatError if one holds NaN or infinity."""
        try:
            with safe_open(str(self.path), framework="pt") as stream:
                values = {name: stream.get_tensor(name) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise self.error(f"cannot be read ({error})") from None
        for name, value in values.items():
            if not torch.isfinite(value).all():
                raise self.error(f"is damaged: {name} holds NaN or infinity")
        return values

    def sha256(self, with_names: bool = False) -> str:
        """Of the data section, which is what other tools call the model's hash; or of names, dtypes and shapes too."""
        digest = hashlib.sha256()
        if with_names:
            for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[0])):
                digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
        with self.path.open("rb") as stream:
            stream.seek(self._data_start)
            while block := stream.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError):
            raise self.error("is no safetensors file: its header is not JSON") from None
        if not isinstance(header, dict):
            raise self.error("is no safetensors file: its header is not a JSON object")
        return header

    def _checked_metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self.error("has metadata that is not a table of strings")
        return metadata

    def _checked_name(self, name: str) -> str:
        if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise self.error(f"has a tensor with an unusable name: {name[:80]!a}")
        return name

    def _checked_info(self, name: str, info: Any) -> TensorInfo:
        if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
            raise self.error(f"has a broken entry for {name}")
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        sizes = {word: size for word, (_, size) in DTYPES.items()} | (WHOLE if shape in ([], [1]) else {})
        if not isinstance(dtype, str) or dtype not in sizes:
            raise self.error(f"stores {name} as {str(dtype)[:40]!r}; an adapter's tensors are {', '.join(DTYPES)}")
        if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
            raise self.error(f"gives {name} an impossible shape, {str(shape)[:80]}")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise self.error(f"gives {name} impossible offsets, {str(offsets)[:80]}")
        if offsets[1] - offsets[0] != math.prod(shape) * sizes[dtype]:
            raise self.error(f"is damaged: {name} of shape {shape} does not have the bytes that it needs")
        return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])

    def _check_extent(self, data_bytes: int) -> None:
        """Tensors have to follow each other without gap or overlap and fill the file exactly."""
        position = 0
        for info in sorted(self.tensors.values(), key=lambda info: (info.start, info.end)):
            if info.start != position:
                raise self.error("is damaged: its tensors overlap or leave gaps")
            position = info.end
        if position != data_bytes:
            kind = "cut off" if position > data_bytes else "longer than its header says"
            raise self.error(f"is {kind}: tensors take {position:,} bytes, the file has {data_bytes:,} for them")


def write_tensor_file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write atomically: a reader sees the old file or the new one. Keys are sorted, so bytes depend on content only
    (the safetensors package writes metadata in an order that changes from process to process).

    Raises AdapterFormatError, before anything is written, if a tensor is no float or holds NaN or infinity.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        if word_of(tensor) is None or not torch.isfinite(tensor).all():
            raise AdapterFormatError(f"{path}: not written, {name} holds NaN, infinity or values that are no floats")
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": word_of(tensor), "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in sorted(tensors):
                stream.write(tensor_bytes(tensors[name]))
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def word_of(tensor: torch.Tensor) -> str | None:
    """safetensors' word for a tensor's dtype, None for what has no place in an adapter."""
    return next((word for word, (dtype, _) in DTYPES.items() if dtype == tensor.dtype), None)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _refuse_other_kinds(path: Path) -> None:
    if not path.exists():
        raise AdapterFormatError(f"{path} does not exist")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise AdapterFormatError(
            f"{path} is a pickle by its name, and opening one can run its author's code: ask for a .safetensors file, "
            "or make one with `lora-diffusion convert`, which opens it without running anything"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("duplicate key")
    return table


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)
