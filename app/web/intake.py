"""An adapter file from outside: copied into the workspace under a limit, and checked there before anything uses it."""

from __future__ import annotations

import math
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lora_diffusion as ld
from app.web.adapter_facts import without_path
from app.web.limits import MIB, Limits
from lora_diffusion.adapter import Adapter, LowRank
from lora_diffusion.errors import AdapterFormatError, LoraDiffusionError
from lora_diffusion.files.safetensors_file import PICKLE_SUFFIXES
from lora_diffusion.text import printable

# A few kilobytes of LoHa or LoKr can claim a weight of any size, which is made when the adapter is used. The largest
# layers of known models have 2**26 numbers, the largest models 2**34.
MOST_OF_A_LAYER = 2**26
MOST_OF_ALL = 2**34
_BLOCK = 2**20


@contextmanager
def taken_in(path: Path, folder: Path, limits: Limits) -> Iterator[tuple[Path, Adapter]]:
    """(a copy of the file in `folder`, the adapter in it). The copy is gone afterwards unless it was moved away.

    Raises:
        AdapterFormatError: it is no sound adapter file, or too large; the message has the file's name, not its path.
    """
    name = printable(path.name, 80) or "the file"
    _check_name(path, name)
    copy = folder / f".new-{secrets.token_hex(8)}.safetensors"
    try:
        _copy(path, copy, name, limits)
        try:
            adapter = ld.read_adapter(copy)
        except LoraDiffusionError as problem:
            said = without_path(problem, copy, name)
            if "adapter_config.json" in said:  # half of a folder of PEFT's
                said += "; make one file of the whole folder with `lora-diffusion convert FOLDER dog.safetensors --to "
                said += "diffusers`"
            raise AdapterFormatError(said) from None
        except Exception as problem:  # a file that leads a reader to where nobody has been
            raise AdapterFormatError(f"{name} cannot be read as an adapter ({type(problem).__name__})") from problem
        _check_sizes(adapter, name)
        yield copy, adapter
    finally:
        copy.unlink(missing_ok=True)


def _check_name(path: Path, name: str) -> None:
    suffix = path.suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise AdapterFormatError(_pickle(name, f"files that end in {suffix} are pickles"))
    if suffix != ".safetensors":
        raise AdapterFormatError(f"{name} does not end in .safetensors, the only kind of adapter file that is taken")


def _copy(path: Path, copy: Path, name: str, limits: Limits) -> None:
    """At most `limits.adapter_bytes`, of a plain file; what is a pickle or an archive is told by its first bytes."""
    try:
        facts = path.lstat()
        if not stat.S_ISREG(facts.st_mode):
            raise AdapterFormatError(f"{name} is a link or a folder, not a file; give the file itself")
        if facts.st_size > limits.adapter_bytes:
            raise AdapterFormatError(
                f"{name} has {facts.st_size / MIB:,.0f} MB, the limit is {limits.adapter_bytes / MIB:,.0f} MB: resize "
                "it to a lower rank on your own machine with `lora-diffusion resize`"
            )
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as source, copy.open("xb") as target:
            block = source.read(_BLOCK)
            _check_start(block[:8], name)
            left = limits.adapter_bytes
            while block and left >= 0:
                left -= target.write(block)
                block = source.read(_BLOCK)
        if left < 0:
            raise AdapterFormatError(f"{name} is larger than {limits.adapter_bytes / MIB:,.0f} MB")
    except (OSError, ValueError) as problem:
        said = getattr(problem, "strerror", None) or "its name is no file name"
        raise AdapterFormatError(f"{name} cannot be opened ({said}); add it again") from None


def _check_start(start: bytes, name: str) -> None:
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise AdapterFormatError(_pickle(name, "it is a pickle, whatever its name says"))
    if start[:4] == b"PK\x03\x04":
        raise AdapterFormatError(_pickle(name, "it is a zip archive or a pickle of PyTorch, whatever its name says"))


def _pickle(name: str, why: str) -> str:
    return (
        f"{name} is not taken: {why}, and opening one can run its author's code. Ask for a .safetensors file, or make "
        "one on your own machine with `lora-diffusion convert`, which opens it without running anything"
    )


def _check_sizes(adapter: Adapter, name: str) -> None:
    """Refuse layers that would fill the memory when they are used."""
    total = 0
    for component, layers in adapter.layers().items():
        for path, layer in layers.items():
            size = layer.a[0].numel() * layer.b.shape[0] if isinstance(layer, LowRank) else math.prod(layer.shape)
            total += size
            if size > MOST_OF_A_LAYER and not isinstance(layer, LowRank):
                where = printable(f"{component}.{path}", 100)
                raise AdapterFormatError(
                    f"{name} is for a weight of {size:,} numbers at {where}; no known model has more than "
                    f"{MOST_OF_A_LAYER:,}"
                )
    if total > MOST_OF_ALL:
        raise AdapterFormatError(f"{name} is for a model of {total:,} weights; the limit is {MOST_OF_ALL:,}")
