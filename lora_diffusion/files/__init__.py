"""Adapter files: one dialect, one module.

A dialect module has `NAME`, `recognise(file) -> bool`, `read(file) -> Adapter` and, where it can be written,
`write(adapter) -> (tensors, metadata)`. Adding one is a new module and its entry in `DIALECTS`; order is the order of
asking.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..adapter import Adapter
from ..errors import AdapterFormatError, ConfigError
from . import diffusers
from .safetensors_file import TensorFile, write_tensor_file

DIALECTS: tuple[ModuleType, ...] = (diffusers,)


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter file, whatever dialect it is in; no model is needed.

    Header, names, dtypes, shapes and ranks are checked against the file's real length before a tensor is read.
    Raises AdapterFormatError, one line, for everything that is not a sound adapter of a known dialect.
    """
    file = TensorFile(Path(path))
    for dialect in DIALECTS:
        if dialect.recognise(file):
            adapter = dialect.read(file)
            adapter.dialect = dialect.NAME
            return adapter
    known = ", ".join(dialect.NAME for dialect in DIALECTS)
    shown = ", ".join(list(file.tensors)[:2]) or "no tensor at all"
    raise AdapterFormatError(f"{file.path}: no adapter in a known dialect ({known}); it holds {shown}")


def write_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format: str = "diffusers",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter; the same adapter and metadata give the same bytes, and the file appears whole or not at all.

    format: a dialect's name. metadata: JSON values to keep beside those that the adapter has already.
    Raises ConfigError for an unknown format or a path that does not end in .safetensors, AdapterFormatError for an
    adapter that holds NaN or infinity or nothing at all.
    """
    writers = {dialect.NAME: dialect for dialect in DIALECTS if hasattr(dialect, "write")}
    if format not in writers:
        raise ConfigError(f"format={format!r}: this version writes {', '.join(map(repr, writers))}")
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ConfigError(f"{target}: give a file name that ends in .safetensors")
    if adapter.layer_count() == 0:
        raise AdapterFormatError(f"{target}: not written, the adapter has no layers")
    if metadata:
        adapter = dataclasses.replace(adapter, metadata={**adapter.metadata, **metadata})
    tensors, strings = writers[format].write(adapter)
    write_tensor_file(target, tensors, strings)
