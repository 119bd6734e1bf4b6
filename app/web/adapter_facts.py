"""What an adapter file says of itself, from its header alone: a page with hundreds of them is there at once.

Every dialect's own reader runs, with zeros of the right shapes (which take no memory) in place of the tensors. Only
single numbers, kohya's alphas, are really read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lora_diffusion as ld
from lora_diffusion.adapter import Adapter, LowRank
from lora_diffusion.components import BARE
from lora_diffusion.describe import base_of, trigger_words
from lora_diffusion.errors import AdapterFormatError, LoraDiffusionError
from lora_diffusion.files.own import OWN_KEY
from lora_diffusion.files.registry import read_source
from lora_diffusion.files.safetensors_file import DTYPES, WHOLE, TensorFile
from lora_diffusion.text import printable

MOST_WORDS = 8
MOST_NOTES = 8
_UNET_PARTS = ("down_blocks.", "up_blocks.", "mid_block.", "transformer_blocks.")  # of a bare module's paths


@dataclass(frozen=True)
class Facts:
    """What a card shows of a file. All texts are plain and of limited length.

    Attributes:
        kind: "pictures" or "text".
        rank: the largest; None where nothing in it has a rank.
        parts: what it changes, ("unet", "text_encoder") or ("model",).
        methods: how: "LoRA", "LoKr", "p_tuning", "word", …
        steps: that it was trained for, as far as it says.
        hashed: whether the file carries a hash of its tensors.
        problem: why it cannot be used; None for a sound file, as far as its header shows.
    """

    kind: str = "pictures"
    base: str | None = None
    trigger_words: tuple[str, ...] = ()
    rank: int | None = None
    parts: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    dialect: str | None = None
    steps: int | None = None
    notes: tuple[str, ...] = ()
    hashed: bool = False
    problem: str | None = None


class _Shapes:
    """A tensor file whose tensors are zeros."""

    def __init__(self, file: TensorFile) -> None:
        self.path, self.tensors, self.metadata, self._file = file.path, file.tensors, file.metadata, file

    def error(self, what: str) -> AdapterFormatError:
        return self._file.error(what)

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        small = [name for name in names if all(size == 1 for size in self.tensors[name].shape)]
        values = self._file.read(small) if small else {}
        for name in names:
            if name not in values:
                info = self.tensors[name]
                dtype = torch.int64 if info.dtype in WHOLE else DTYPES[info.dtype][0]
                values[name] = torch.zeros((), dtype=dtype).expand(info.shape)
        return values


def header_facts(path: Path) -> Facts:
    """The facts of a file; one that cannot be used has a `problem` and nothing else."""
    try:
        file = TensorFile(path)
        return facts_of(read_source(_Shapes(file)), hashed=_has_hash(file))
    except (LoraDiffusionError, OSError) as problem:
        return Facts(problem=without_path(problem, path))
    except Exception as problem:  # a file that leads a reader to where nobody has been
        return Facts(problem=f"it cannot be read ({type(problem).__name__})")


def facts_of(adapter: Adapter, *, hashed: bool = False) -> Facts:
    """The facts of an adapter that was read."""
    base = base_of(adapter)
    ranks = [layer.rank for layers in adapter.layers().values() for layer in layers.values()]
    return Facts(
        kind=_kind(adapter),
        base=None if base is None else printable(base),
        trigger_words=tuple(printable(word, 80) for word in trigger_words(adapter)[:MOST_WORDS]),
        rank=max(ranks, default=None),
        parts=tuple(dict.fromkeys(_parts(adapter))),
        methods=tuple(dict.fromkeys(_methods(adapter))),
        dialect=adapter.dialect,
        steps=_steps(adapter),
        notes=tuple(printable(note, 300) for note in adapter.notes[:MOST_NOTES]),
        hashed=hashed,
    )


def verified(path: Path) -> tuple[bool | None, str | None]:
    """(whether the tensors are those of the hash in the file, why it cannot be used): reads the whole file."""
    try:
        return ld.read_adapter(path).intact, None
    except (LoraDiffusionError, OSError) as problem:
        return None, without_path(problem, path)
    except Exception as problem:
        return None, f"it cannot be read ({type(problem).__name__})"


def without_path(problem: Exception, path: Path, name: str = "it") -> str:
    """An error's line with a name in place of where the server keeps the file."""
    return printable(str(problem).replace(str(path), name).replace(path.name, name), 400)


def _has_hash(file: TensorFile) -> bool:
    return "sshs_model_hash" in file.metadata or '"sha256"' in file.metadata.get(OWN_KEY, "")


def _parts(adapter: Adapter) -> Iterator[str]:
    for table in (adapter.layers(), adapter.copies, adapter.prompts, adapter.methods):
        yield from table
    for vectors in adapter.tokens.values():
        yield from vectors


def _methods(adapter: Adapter) -> Iterator[str]:
    for layers in adapter.layers().values():
        for layer in layers.values():
            name = "LoRA" if isinstance(layer, LowRank) else layer.kind
            yield name if layer.magnitude is None else f"{name} with DoRA"
    for prompt in adapter.prompts.values():
        yield printable(prompt.kind.lower(), 30)
    for learned in adapter.methods.values():
        yield from learned
    if adapter.tokens:
        yield "word"


def _kind(adapter: Adapter) -> str:
    if any(part != BARE for part in _parts(adapter)):
        return "pictures"
    paths = adapter.layers().get(BARE, {})
    return "pictures" if any(part in path for path in paths for part in _UNET_PARTS) else "text"


def _steps(adapter: Adapter) -> int | None:
    steps: Any = adapter.metadata.get("steps", adapter.foreign.get("ss_steps"))
    text = str(steps)
    return int(text) if isinstance(steps, int | str) and text.isascii() and text.isdigit() and len(text) < 10 else None
