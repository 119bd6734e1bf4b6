"""The container of `torch.save`, opened with more suspicion than any other: a pickle is a program.

Layout: a zip without compression, in which `<root>/data.pkl` is the pickle and `<root>/data/<n>` the bytes of storage
n. The checks, in this order: the zip is stored as it is and no larger than its file; the pickle, read as a list of
instructions and not run, names nothing but what rebuilds plain tensors; then torch's `weights_only` unpickler goes over
a mapping of the file, where a tensor costs nothing until it is read; the tensors are floats, and no more than the file.
"""

from __future__ import annotations

import pickletools
import re
import stat
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterFormatError
from .safetensors_file import DTYPES, MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_NAME_LENGTH, MAX_TENSORS, word_of
from .source import TensorInfo

MAX_FILE_BYTES = 2**32 - 1
_MAX_ENTRIES = MAX_TENSORS + 16
_END = struct.Struct(
    "<4s4H2LH"
)  # the zip's last record: signature, disks, counts, directory's size and offset, comment

# All that a pickle of tensors needs. torch's own list is longer, and has things that allocate what they are told to.
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Float", "Half", "Double", "BFloat16")),
    *(f"torch {kind}Storage" for kind in ("Long", "Int", "Short", "Char", "Byte", "Bool")),  # refused by name, below
}
_NESTED = ("state_dict", "model_state_dict", "model")
_WORD = re.compile(r"<.+>")


class PickleFile:
    """A checked file of `torch.save`: `tensors` and `metadata` at once, values through `read`; see `source.Source`.

    Accepted are {name: tensor}, the same under "state_dict" with plain values beside it (they become metadata), a list
    of tensors [up, down, up, …] (they get cloneofsimo's names, `<component>:0:up` …), and {word: vector} (the metadata
    says "<embed>" of each).

    component: whose layers a bare list holds; by default the text encoder's in a file that ends in `.text_encoder.pt`,
        else the UNet's.
    Raises AdapterFormatError, naming the file and what is wrong with it. Nothing that the file says is ever run.
    """

    def __init__(self, path: Path, component: str | None = None) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        try:
            self._size = self._checked_size()
            program = self._checked_program()
        except OSError as error:
            raise self.error(f"cannot be read ({error.strerror or error})") from None
        self._check_program(program)
        default = "text_encoder" if path.name.endswith(".text_encoder.pt") else "unet"
        self._values = self._named(self._load(), component or default)
        self.tensors = self._checked_tensors()

    def error(self, what: str) -> AdapterFormatError:
        return AdapterFormatError(f"{self.path} {what}")

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on the CPU. Raises AdapterFormatError if one holds NaN or infinity."""
        values = {}
        for name in names:
            values[name] = self._values[name].detach().clone(memory_format=torch.contiguous_format)
            if not torch.isfinite(values[name]).all():
                raise self.error(f"is damaged: {name} holds NaN or infinity")
        return values

    def _checked_size(self) -> int:
        if not self.path.exists():
            raise self.error("does not exist")
        info = self.path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise self.error("is no regular file")
        if info.st_size > MAX_FILE_BYTES:
            raise self.error(f"has {info.st_size:,} bytes; the limit for a pickle is {MAX_FILE_BYTES:,}")
        return info.st_size

    def _checked_program(self) -> bytes:
        """The bytes of data.pkl, after the zip around it was checked."""
        with self.path.open("rb") as stream:
            head = stream.read(4)
            stream.seek(max(0, self._size - _END.size))
            end = stream.read()
        if head[:1] == b"\x80":
            raise self.error(
                "is a pickle as torch wrote it before 1.6, which cannot be checked before it is opened: "
                "have its author save it again with a newer torch"
            )
        if head != b"PK\x03\x04":
            raise self.error("was not written by torch.save: it is no zip")
        if len(end) < _END.size or end[:4] != b"PK\x05\x06" or end[-2:] != b"\0\0":
            raise self.error("is cut off, or carries something behind its end")
        *_, entries, directory, _, _ = _END.unpack(end)
        if entries > _MAX_ENTRIES or directory > MAX_HEADER_BYTES:
            raise self.error(f"has a directory of {entries:,} entries and {directory:,} bytes, more than an adapter's")
        try:
            with zipfile.ZipFile(self.path) as archive:
                return self._data_pkl(archive, entries)
        except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
            raise self.error(f"is damaged ({_shown(error)})") from None

    def _data_pkl(self, archive: zipfile.ZipFile, entries: int) -> bytes:
        infos = archive.infolist()
        names = {info.filename for info in infos}
        if len(infos) != entries or len(names) != entries:
            raise self.error("is damaged: its directory has an entry twice, or others than it counts")
        if any(info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size for info in infos):
            raise self.error("holds compressed entries, which torch.save never writes: it is not opened")
        if sum(info.file_size for info in infos) > self._size:
            raise self.error("is damaged: its entries claim to be larger than the file")
        programs = [info for info in infos if re.fullmatch(r"[^/]+/data\.pkl", info.filename)]
        if len(programs) != 1:
            raise self.error("was not written by torch.save: it is a zip of something else")
        if programs[0].file_size > MAX_HEADER_BYTES:
            raise self.error(f"has a pickle of {programs[0].file_size:,} bytes; the limit is {MAX_HEADER_BYTES:,}")
        return archive.read(programs[0])

    def _check_program(self, program: bytes) -> None:
        """Raises AdapterFormatError for a pickle that names anything but what tensors are made of."""
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "GLOBAL" and argument not in _ALLOWED:
                    wanted = ascii(str(argument).replace(" ", "."))[1:-1][:80]
                    raise self.error(f"wants to use {wanted}, which a file of tensors has no need of; nothing was run")
                if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
                    raise self.error(f"holds more than tensors (instruction {opcode.name}); nothing was run")
        except (ValueError, IndexError, struct.error) as error:
            raise self.error(f"is damaged: its pickle cannot be parsed ({_shown(error)})") from None

    def _load(self) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(str(self.path), map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # what a broken pickle raises is the pickle's choice
            raise self.error(f"is damaged: torch cannot load it ({_shown(error)})") from None

    def _named(self, value: Any, component: str) -> dict[str, torch.Tensor]:
        if isinstance(value, list):
            if not value or len(value) % 2 or not all(isinstance(item, torch.Tensor) for item in value):
                raise self.error("is a list that is not up, down, up, down … of low-rank layers")
            return {f"{component}:{n // 2}:{('up', 'down')[n % 2]}": item for n, item in enumerate(value)}
        if isinstance(value, dict):
            value = self._unnested(value)
        if not isinstance(value, dict) or not value:
            raise self.error(f"holds {_kind(value)}, where named tensors belong")
        for name, item in value.items():
            if not isinstance(name, str) or not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
                raise self.error(f"has a tensor with an unusable name: {str(name)[:80]!a}")
            if not isinstance(item, torch.Tensor):
                raise self.error(
                    f"has {_kind(item)} under {name}, where a tensor belongs; is it a training checkpoint?"
                )
        if all(_is_word(name, item) for name, item in value.items()):
            self.metadata.update(dict.fromkeys(value, "<embed>"))
        return value

    def _unnested(self, value: dict[Any, Any]) -> dict[Any, Any]:
        """The table under "state_dict", if that is all there is besides plain values."""
        inner = next((name for name in _NESTED if isinstance(value.get(name), dict)), None)
        if inner is None:
            return value
        for name, item in value.items():
            if name == inner:
                continue
            if not isinstance(name, str) or not (item is None or isinstance(item, str | int | float)):
                raise self.error(
                    f"has {_kind(item)} beside its {inner}, as a training checkpoint: save the tensors alone"
                )
            self.metadata[name] = str(item)
        return value[inner]

    def _checked_tensors(self) -> dict[str, TensorInfo]:
        if len(self._values) > MAX_TENSORS:
            raise self.error(f"declares {len(self._values):,} tensors; the limit is {MAX_TENSORS:,}")
        tensors, position = {}, 0
        for name, value in self._values.items():
            if value.layout is not torch.strided or value.device.type != "cpu" or value.dim() > MAX_DIMENSIONS:
                raise self.error(f"gives {name} an unusual form ({value.dim()} dimensions, {value.layout})")
            word = word_of(value)
            if word is None:
                raise self.error(f"stores {name} as {value.dtype}; an adapter's tensors are {', '.join(DTYPES)}")
            end = position + value.numel() * value.element_size()
            if end > self._size:
                raise self.error(f"is damaged: with {name}, {list(value.shape)}, its tensors are larger than the file")
            tensors[name] = TensorInfo(word, tuple(value.shape), position, end)
            position = end
        return tensors


def _is_word(name: str, value: torch.Tensor) -> bool:
    """Whether an entry is a learned word: its name in angle brackets, or a lone vector whose name is no path."""
    if _WORD.fullmatch(name):
        return value.dim() in (1, 2)
    return value.dim() == 1 and "." not in name and name not in ("weight", "bias")


def _kind(value: Any) -> str:
    return "an empty table" if isinstance(value, dict) and not value else f"a {type(value).__name__}"


def _shown(error: Exception) -> str:
    return ascii(" ".join(str(error).split())[:160])[1:-1] or type(error).__name__
