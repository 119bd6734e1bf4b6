"""Adapter files: one dialect, one module; `registry.py` lists them and says what a dialect has."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..errors import AdapterFormatError, ConfigError
from ..lowering import lowered
from .own import OWN_KEY, described
from .registry import DIALECTS, read_source
from .safetensors_file import TensorFile, write_tensor_file

# Names under which tools save an adapter into a folder, the first that is there is read.
FILES_IN_FOLDERS = ("adapter.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter file or folder, whatever dialect it is in; no model is needed.

    Header, names, dtypes, shapes and ranks are checked against the file's real length before a tensor is read.
    Raises AdapterFormatError, one line, for everything that is not a sound adapter of a known dialect.
    """
    path = Path(path)
    if not path.is_dir():
        return read_source(TensorFile(path))
    for dialect in DIALECTS:
        if hasattr(dialect, "recognise_folder") and dialect.recognise_folder(path):
            adapter: Adapter = dialect.read_folder(path)
            adapter.dialect = adapter.dialect or dialect.NAME
            return adapter
    return read_source(TensorFile(_file_in(path)))


def write_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format: str = "diffusers",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter; the same adapter and metadata give the same bytes, and each file appears whole or not at all.

    format: a dialect's name: "diffusers" and "kohya" are files that end in .safetensors, "peft" is a folder.
    metadata: JSON values to keep beside those that the adapter has already.
    Raises ConfigError for an unknown format or an unusable path, AdapterFormatError for an adapter that holds NaN or
    infinity, or nothing at all, or something that the format has no place for.
    """
    writers = {d.NAME: d for d in DIALECTS if hasattr(d, "write") or hasattr(d, "write_folder")}
    if format not in writers:
        raise ConfigError(f"format={format!r}: this version writes {', '.join(map(repr, writers))}")
    target, dialect = Path(path), writers[format]
    if adapter.is_empty():
        raise AdapterFormatError(f"{target}: not written, the adapter has no layers")
    adapter = lowered(adapter)
    if metadata:
        adapter = dataclasses.replace(adapter, metadata={**adapter.metadata, **metadata})
    if hasattr(dialect, "write_folder"):
        if target.suffix == ".safetensors" or target.is_file():
            raise ConfigError(f"{target}: the format {format!r} is a folder, give the name of one")
        dialect.write_folder(adapter, target)
        return
    if target.suffix != ".safetensors":
        raise ConfigError(f"{target}: give a file name that ends in .safetensors")
    tensors, strings = dialect.write(adapter)
    write_tensor_file(target, tensors, {**adapter.foreign, **strings, OWN_KEY: described(adapter, tensors)})


def _file_in(folder: Path) -> Path:
    """The adapter file in a folder. Raises AdapterFormatError where there is none, or no telling which."""
    for name in FILES_IN_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    what = f"has {len(found)} .safetensors files, such as {found[0].name}" if found else "has no .safetensors file"
    raise AdapterFormatError(f"{folder} {what}: name the file to read")
