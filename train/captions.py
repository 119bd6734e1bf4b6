"""What is said of each picture: `dog.txt` beside `dog.png`, or lines of a `metadata.jsonl` in the folder.

The latter is the ImageFolder convention of `datasets`: one JSON object a line, with `file_name` and `text`. Whatever
cannot be used is an error that names file and line; a caption is never left out in silence.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.errors import DatasetError

METADATA_FILE = "metadata.jsonl"
MAX_CAPTION_BYTES = 65_536  # a text file beside a picture that is longer is no caption
ADVICE = "or give --ignore_captions to use --instance_prompt for all pictures"


@dataclass(frozen=True)
class Caption:
    """One caption and where it stands: `…/dog.txt` or `…/metadata.jsonl, line 3`."""

    text: str
    source: str


def read_captions(paths: Sequence[Path], *, column: str = "text", fallback: Caption | None = None) -> list[Caption]:
    """The captions of the pictures of one folder, in order; an empty list where no picture has one.

    Args:
        paths: the pictures.
        column: the name of the text in `metadata.jsonl`.
        fallback: stands in for a caption that is missing while other pictures have one; None makes that an error.

    Raises:
        DatasetError: a caption that is missing, empty, said twice, not UTF-8, or belongs to no picture or to two.
    """
    beside = {path: file for path in paths if (file := path.with_suffix(".txt")).is_file()}
    listed = _read_metadata(paths[0].parent / METADATA_FILE, paths, column)
    if not beside and not listed:
        return []
    _check_stems(beside)
    captions = []
    for path in paths:
        if path in beside and path in listed:
            raise DatasetError(f"{path} has two captions, {beside[path]} and {listed[path].source}; remove one")
        if path in beside:
            captions.append(_read_text_file(beside[path]))
        elif path in listed:
            captions.append(listed[path])
        elif fallback is not None:
            captions.append(fallback)
        else:
            other = next(iter(beside.values())) if beside else next(iter(listed.values())).source
            raise DatasetError(
                f"{path} has no caption while other pictures have one ({other}); write {path.with_suffix('.txt').name}"
                f", give --caption_fallback to use --instance_prompt for such pictures, {ADVICE}"
            )
    return captions


def unused_texts(paths: Sequence[Path]) -> list[Path]:
    """Text files in the pictures' folder that belong to no picture."""
    stems = {path.stem for path in paths}
    files = sorted(paths[0].parent.glob("*.txt"))
    return [file for file in files if file.stem not in stems and not file.name.startswith(".")]


def _read_text_file(path: Path) -> Caption:
    if path.stat().st_size > MAX_CAPTION_BYTES:
        raise DatasetError(f"{path} has {path.stat().st_size:,} bytes, which is no caption; shorten it, {ADVICE}")
    return Caption(_usable(_decode(path), str(path)), str(path))


def _read_metadata(path: Path, paths: Sequence[Path], column: str) -> dict[Path, Caption]:
    if not path.is_file():
        return {}
    pictures = {_normal(one.name): one for one in paths}
    found: dict[Path, Caption] = {}
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        entry = _parse(line, where)
        name = entry.get("file_name")
        if not isinstance(name, str):
            raise DatasetError(f"{where} has no 'file_name'; each line names the picture that it is about")
        picture = pictures.get(_normal(name.removeprefix("./")))
        if picture is None:
            raise DatasetError(f"{where} is about {name!a}, which is no picture in {path.parent}; correct it")
        if picture in found:
            raise DatasetError(f"{where} is about {name!a}, as is {found[picture].source}; remove one of the two")
        text = entry.get(column)
        if not isinstance(text, str):
            raise DatasetError(
                f"{where} has no text under {column!r}, only {', '.join(map(ascii, entry))}; name the right one with "
                f"--caption_column, {ADVICE}"
            )
        found[picture] = Caption(_usable(text, where), where)
    if not found:
        raise DatasetError(f"{path} is empty; remove it, or write one line for each picture")
    return found


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise DatasetError(f"{where} is no JSON ({problem}); was the file cut off?") from problem
    if not isinstance(entry, dict):
        raise DatasetError(f"{where} is no JSON object with 'file_name' and a text")
    return entry


def _decode(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content[: problem.start].count(b"\n") + 1
        raise DatasetError(
            f"{path} is not UTF-8 text (byte 0x{content[problem.start]:02x} in line {line}); save it as UTF-8"
        ) from problem
    if "\0" in text:
        raise DatasetError(f"{path} is not UTF-8 text (it holds zero bytes, as UTF-16 does); save it as UTF-8")
    return text


def _usable(text: str, where: str) -> str:
    """On one line, without spaces to spare."""
    text = " ".join(text.split())
    if not text:
        raise DatasetError(f"{where} holds an empty caption; say what the picture shows, {ADVICE}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise DatasetError(f"{where} holds half a character ({problem.object[problem.start]!a})") from problem
    return text


def _check_stems(beside: dict[Path, Path]) -> None:
    owners: dict[Path, Path] = {}
    for picture, file in beside.items():
        other = owners.setdefault(file, picture)
        if other != picture:
            raise DatasetError(
                f"{file} could belong to {other.name} or to {picture.name}; rename one of the pictures and give it a "
                "caption of its own"
            )


def _normal(name: str) -> str:
    """One spelling of a name: macOS writes `é` as two characters."""
    return unicodedata.normalize("NFC", name)
