"""Checkpoints: complete or absent, never half.

A checkpoint is written into a hidden folder beside its place, every file is flushed to the disk, and one rename puts it
there. A process that is killed while writing leaves a hidden folder, which the next run removes. The files' hashes lie
among them, so that a checkpoint which a disk or a copy has damaged is noticed before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from lora_diffusion.errors import ConfigError

HASHES_FILE = "hashes.json"  # {file: sha256}
_NAME = re.compile(r"(?:step|checkpoint)-(\d+)")


def steps_in(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder`, by step, oldest first."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(r"step-(\d+)", path.name))}
    return dict(sorted(found.items()))


def find(folder: Path, which: str, skipped: list[str] | None = None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names: `latest`, a path, or a name such as `step-20`.

    Args:
        skipped: gets a sentence for each damaged checkpoint that `latest` passed over.

    Returns:
        Its folder; None for `latest` where there is none yet.

    Raises:
        ConfigError: there is no such checkpoint, or it is damaged; for `latest`, all of them are.
    """
    have = steps_in(folder)
    if which == "latest":
        return _latest_sound(have, [] if skipped is None else skipped)
    path = Path(which)
    match = _NAME.fullmatch(path.name)
    if not (path / "state.json").is_file() and match and int(match[1]) in have:
        path = have[int(match[1])]
    if (path / "state.json").is_file():
        if (reason := damage(path)) is not None:
            raise ConfigError(f"the checkpoint {path} is damaged ({reason}); resume from another one")
        return path
    there = ", ".join(one.name for one in have.values()) or "none"
    raise ConfigError(f"there is no checkpoint {which}; in {folder} there are: {there}")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files by their hashes; None if nothing, or if it has no hashes (an old one)."""
    try:
        hashes = json.loads((checkpoint / HASHES_FILE).read_text(encoding="utf-8"))
        wrong = [name for name, digest in hashes.items() if _digest(checkpoint / name) != digest]
    except FileNotFoundError as problem:
        return None if Path(str(problem.filename)).name == HASHES_FILE else f"{Path(problem.filename).name} is missing"
    except (OSError, ValueError, AttributeError, TypeError):
        return f"{HASHES_FILE} cannot be read"
    return f"{wrong[0]} is not what was written" if wrong else None


def _latest_sound(have: dict[int, Path], skipped: list[str]) -> Path | None:
    for path in reversed(have.values()):
        reason = damage(path)
        if reason is None:
            return path
        skipped.append(f"the checkpoint {path} is damaged ({reason}) and was passed over")
    if have:
        raise ConfigError(f"every checkpoint is damaged ({skipped[-1]}); start again with --overwrite")
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write(folder: Path, step: int, fill: Callable[[Path], None], *, keep: int | None = None) -> Path:
    """Write the checkpoint of a step and remove the oldest beyond `keep`.

    Args:
        folder: where checkpoints are; made if it is not there.
        fill: called with an empty folder to write the files into.
        keep: how many checkpoints may stay, this one included (default: all).

    Raises:
        OSError: the disk is full or not writable; what was there before is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    place, unfinished, replaced = folder / f"step-{step}", folder / f".new-{step}", folder / f".old-{step}"
    unfinished.mkdir()
    try:
        fill(unfinished)
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        hashes = {str(path.relative_to(unfinished)): _digest(path) for path in files}
        (unfinished / HASHES_FILE).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
        for path in unfinished.rglob("*"):
            if path.is_file():
                flush_to_disk(path)
        flush_to_disk(unfinished)
        if place.exists():
            place.rename(replaced)
        unfinished.rename(place)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    flush_to_disk(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    if keep is not None:
        for old in list(steps_in(folder).values())[:-keep]:
            _remove(old)
    return place


def clean(folder: Path) -> None:
    """Remove what a killed process left half written; a checkpoint that was about to be replaced comes back."""
    for path in folder.glob(".old-*"):
        place = folder / f"step-{path.name.removeprefix('.old-')}"
        if not place.exists():
            path.rename(place)
    for pattern in (".new-*", ".old-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder (folders cannot be opened on Windows, and need not be)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, fill: Callable[[Path], None]) -> Path:
    """Write one file through `fill(temporary path)` and put it in place with one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".new-{path.name}")
    try:
        fill(unfinished)
        flush_to_disk(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a kill in between does not leave half of one under its name."""
    doomed = checkpoint.with_name(f".new-{checkpoint.name}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
