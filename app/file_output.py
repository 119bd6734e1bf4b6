"""What the commands on adapter files have in common: arguments read, results written and said."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_diffusion.errors import ConfigError, LoraDiffusionError
from lora_diffusion.text import printable

OnProgress = Callable[[str, int, int], None]


def read_weighted(texts: tuple[str, ...]) -> list[tuple[str, str, float]]:
    """(name, file, weight) of every `FILE:WEIGHT`, with different names. Raises ConfigError."""
    from train.sample import parse_adapter

    found: list[tuple[str, str, float]] = []
    for text in texts:
        wanted = parse_adapter(text, flag="")
        taken = {name for name, _, _ in found}
        label = printable(wanted.label)
        names = [label, *(f"{label}-{n}" for n in range(2, len(texts) + 1))]
        found.append((next(name for name in names if name not in taken), wanted.file, wanted.weight))
    return found


def torch_dtype(name: str | None) -> Any:
    import torch

    return None if name is None else {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def model_folder(name: str, variant: str | None = None) -> Any:
    """The `ModelFolder` that a name stands for. Raises ModelNotFoundError."""
    from lora_diffusion.pipeline_folder import ModelFolder
    from train.pocket import pocket_dir

    return ModelFolder(pocket_dir() if name == "pocket" else Path(name).expanduser(), variant)


def check_output(output: str, format: str, *inputs: str) -> None:
    """Find a wrong output before the work is done. Raises ConfigError."""
    from lora_diffusion.files.registry import DIALECTS

    folders = {dialect.NAME: hasattr(dialect, "write_folder") for dialect in DIALECTS
               if hasattr(dialect, "write") or hasattr(dialect, "write_folder")}  # fmt: skip
    path = Path(output)
    if format not in folders:
        raise ConfigError(f"--to {format!r} is not one of {', '.join(folders)}")
    if folders[format] and (path.suffix == ".safetensors" or path.is_file()):
        raise ConfigError(f"{output}: the format {format} is a folder, give the name of one")
    if not folders[format] and path.suffix != ".safetensors":
        raise ConfigError(f"{output}: give a file name that ends in .safetensors")
    if path.is_dir() and not folders[format]:
        raise ConfigError(f"{output} is a folder; give the name of a file")
    for file in inputs:
        if (
            path.exists()
            and Path(file).exists()
            and path.resolve() in (Path(file).resolve(), *Path(file).resolve().parents)
        ):
            raise ConfigError(f"{output} is an input, which is not written over: give another name")


def write(adapter: Any, output: str, format: str) -> int:
    """Write an adapter; returns the bytes of what was written."""
    import lora_diffusion as ld

    try:
        ld.write_adapter(adapter, output, format)
    except OSError as problem:
        raise LoraDiffusionError(f"{output} could not be written: {problem.strerror or problem}") from problem
    return size_of(output)


def size_of(path: str) -> int:
    """Bytes of an adapter's file, in a folder of the one that `read_adapter` takes, else of all files in a folder."""
    from lora_diffusion.files import FILES_IN_FOLDERS

    place = Path(path)
    own = [place, *(place / name for name in FILES_IN_FOLDERS)]
    files = [file for file in own if file.is_file()][:1] or [file for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


@contextmanager
def progress(what: str) -> Iterator[OnProgress]:
    """A bar on stderr with the time left, or a line now and then."""
    from app.console import Console

    console = Console(out=sys.stderr)
    try:
        yield lambda where, done, total: console({"event": "prepare", "what": what, "done": done, "total": total})
    finally:
        console.close()


def say(facts: dict[str, Any], as_json: bool, lines: list[str]) -> int:
    """Print the result, as one JSON object or as lines; returns the exit code, 0."""
    if as_json:  # ASCII only: a file's control characters stay escaped
        print(json.dumps(_finite(facts), indent=2, allow_nan=False))
    else:
        print("\n".join(lines))
    return 0


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _finite(value: Any) -> Any:
    """JSON has no infinity: an error relative to nothing becomes null."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
