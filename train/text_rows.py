"""Rows of a data set of texts, from a file or from the `datasets` library, each with the place where it stands.

JSONL and a JSON list hold objects; CSV and TSV begin with the names of the columns; a plain text file has one text a
line, or several columns with a separator between them. Whatever cannot be read is an error with file and line, or
counted.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_diffusion.errors import ConfigError, DatasetError
from lora_diffusion.text import printable
from train.text_bad_rows import BadRows

FILE_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt")
TEXT_COLUMN = "text"  # of a plain text file
MAX_FIELD = 10_000_000  # characters of one CSV field

_NOT_UTF8 = "is not UTF-8 text"
_HALF = "holds half a character"
_SAVE_AS = "save the file as UTF-8"
_CUT_OFF = "was the file cut off? Correct or remove it"


class Row(dict[str, Any]):
    """A row, column -> value. source: where it stands, "train.jsonl, line 3"."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        super().__init__(values)
        self.source = source


def read_rows(
    name: str | Path,
    bad: BadRows,
    *,
    split: str = "train",
    subset: str | None = None,
    separator: str | None = None,
    columns: Sequence[str] | None = None,
) -> list[Row]:
    """The rows of a file, or of a data set that the `datasets` library knows.

    Args:
        name: a .jsonl, .json, .csv, .tsv or .txt file, or else the name of a data set ("nyu-mll/glue").
        bad: what happens to rows that cannot be used, and their count afterwards.
        split, subset: of a named data set ("validation", "rte").
        separator: between the columns of a text file, "||"; then `columns` gives their names.
        columns: names for the columns of a text file.

    Raises:
        ConfigError: `separator` without `columns`, or either for a file that names its columns itself.
        DatasetError: no such file or data set; a file that cannot be read or holds no row; a bad row.
    """
    path = Path(name)
    if path.suffix.lower() != ".txt" and (separator is not None or columns is not None):
        raise ConfigError(f"{path}: separator and columns are for .txt files; this one names its columns itself")
    if path.is_file():
        rows = list(_read_file(path, bad, separator, columns))
    elif path.suffix.lower() in FILE_KINDS or path.is_absolute() or path.exists() or str(name).startswith("."):
        raise DatasetError(_why_no_file(path))
    else:
        rows = _read_named(str(name), subset, split)
    if not rows:
        left_out = "; ".join(bad.summary())
        raise DatasetError(f"{name} holds no row to learn from{f': {left_out}' if left_out else ', it is empty'}")
    return rows


def _read_file(path: Path, bad: BadRows, separator: str | None, columns: Sequence[str] | None) -> Iterator[Row]:
    kind = path.suffix.lower()
    if kind not in FILE_KINDS:
        raise DatasetError(f"{path}: files of this kind cannot be read; give one of {', '.join(FILE_KINDS)}")
    text = _decode(path)
    if not text.strip():
        return iter(())
    if kind == ".jsonl":
        return _jsonl(text, path, bad)
    if kind == ".json":
        return _json_list(text, path, bad)
    if kind == ".txt":
        return _lines(text, path, bad, separator, columns)
    return _csv(text, path, bad, "," if kind == ".csv" else "\t")


def _jsonl(text: str, path: Path, bad: BadRows) -> Iterator[Row]:
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        source = f"{path}, line {number}"
        if not line.strip():
            bad.report(source, "is empty", "remove the line")
        elif _readable(line, source, bad):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as problem:
                bad.report(source, "is no JSON", _CUT_OFF, printable(str(problem)))
                continue
            yield from _object(value, source, bad)


def _json_list(text: str, path: Path, bad: BadRows) -> Iterator[Row]:
    if not _is_text(text):
        raise DatasetError(f"{path}, line {_line_of_byte(text)} {_NOT_UTF8}; {_SAVE_AS}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise DatasetError(f"{path} is no JSON ({printable(str(problem))}); {_CUT_OFF}") from problem
    if not isinstance(values, list):
        raise DatasetError(f"{path} holds no list of objects; write [{{…}}, {{…}}], or one object a line in a .jsonl")
    for number, value in enumerate(values, start=1):
        yield from _object(value, f"{path}, entry {number}", bad)


def _object(value: Any, source: str, bad: BadRows) -> Iterator[Row]:
    if not isinstance(value, dict):
        bad.report(source, "is no JSON object", 'write {"column": "text", …}', f"a {type(value).__name__}")
    elif not value:
        bad.report(source, "is empty", "remove it")
    elif not _is_text(json.dumps(value, ensure_ascii=False)):
        bad.report(source, _HALF, "correct its \\u escape")
    else:
        yield Row(value, source)


def _csv(text: str, path: Path, bad: BadRows, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        source = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as problem:
            if header is None:
                said = printable(str(problem))
                raise DatasetError(f"{source}: the names of the columns cannot be read ({said})") from problem
            bad.report(source, "is no CSV", _CUT_OFF, printable(str(problem)))
            continue
        if fields is None:
            return
        if header is None:
            header = _header(fields, path)
        elif not any(field.strip() for field in fields):
            bad.report(source, "is empty", "remove the line")
        elif len(fields) != len(header):
            bad.report(source, "has another number of fields than the header", "quote fields that hold a "
                       + repr(delimiter), f"{len(fields)}, not {len(header)}")  # fmt: skip
        elif _readable("".join(fields), source, bad):
            yield Row(dict(zip(header, fields)), source)


def _header(fields: Sequence[str], path: Path) -> list[str]:
    names = [field.strip() for field in fields]
    if not all(names) or len(set(names)) != len(names) or not _is_text("".join(names)):
        raise DatasetError(
            f"{path}, line 1: the names of the columns must be there, each once ({printable(', '.join(names))})"
        )
    return names


def _lines(text: str, path: Path, bad: BadRows, separator: str | None, columns: Sequence[str] | None) -> Iterator[Row]:
    """One text a line (lines without one only part paragraphs), or one row of columns."""
    if (separator is None) != (columns is None):
        raise ConfigError(f"{path}: a text file of several columns needs both their separator and their names")
    if separator == "" or (columns is not None and len(set(columns)) < max(2, len(columns))):
        raise ConfigError(f"separator={separator!r}, columns={columns!r}: give a separator and two names or more")
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        source = f"{path}, line {number}"
        line = line.rstrip("\r")
        if not line.strip():
            if separator is not None:
                bad.report(source, "is empty", "remove the line")
        elif _readable(line, source, bad):
            if separator is None or columns is None:
                yield Row({TEXT_COLUMN: line}, source)
                continue
            fields = [field.strip() for field in line.split(separator)]
            if len(fields) != len(columns):
                bad.report(source, f"does not have {len(columns)} fields with {separator!a} between them",
                           "correct it", f"{len(fields)} are there")  # fmt: skip
                continue
            yield Row(dict(zip(columns, fields)), source)


def _read_named(name: str, subset: str | None, split: str) -> list[Row]:
    """From the `datasets` library, which since its version 4 runs no code that comes with a data set."""
    try:
        import datasets
    except ImportError as problem:
        raise DatasetError(
            f"{name} is no file here, and named data sets need the library 'datasets': pip install datasets"
        ) from problem
    if int(datasets.__version__.split(".")[0]) < 4:
        raise DatasetError(f"datasets {datasets.__version__} may run code of a data set: pip install 'datasets>=4'")
    try:
        found = datasets.load_dataset(name, subset, split=split)
    except Exception as problem:
        words = printable(str(problem), 300)
        raise DatasetError(
            f"the data set {name!a} (subset {subset!a}, split {split!a}) cannot be had: {type(problem).__name__}: "
            f"{words}; without a network give a .jsonl or .csv file"
        ) from problem
    where = f"{name} ({subset + ', ' if subset else ''}{split})"
    rows = []
    for number, values in enumerate(found):
        named = {column: _named_labels(found.features[column], value) for column, value in values.items()}
        rows.append(Row(named, f"{where}, row {number}"))
    return rows


def _named_labels(feature: Any, value: Any) -> Any:
    """Class numbers as the names that the data set gives them; -1 stands for a label that is kept back."""
    names = getattr(feature, "names", None)
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    inner = getattr(feature, "feature", None)
    if isinstance(value, list) and getattr(inner, "names", None) is not None:
        return [_named_labels(inner, one) for one in value]
    return value


def _decode(path: Path) -> str:
    """The file's text; bytes that are no UTF-8 stay as lone surrogates, so that the row they are in can be named."""
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:4096]:
        raise DatasetError(f"{path} {_NOT_UTF8} (it holds zero bytes, as UTF-16 does); {_SAVE_AS}")
    return content.decode("utf-8-sig", errors="surrogateescape")


def _readable(text: str, source: str, bad: BadRows) -> bool:
    if "\0" in text:
        bad.report(source, "holds zero bytes", _CUT_OFF)
    elif not _is_text(text):
        place = _bad_place(text)
        bad.report(source, _NOT_UTF8, _SAVE_AS, f"byte 0x{ord(text[place]) & 0xFF:02x}")
    else:
        return True
    return False


def _is_text(text: str) -> bool:
    return _bad_place(text) < 0


def _bad_place(text: str) -> int:
    """Where the first lone surrogate stands; -1 without one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        return problem.start
    return -1


def _line_of_byte(text: str) -> int:
    return text[: _bad_place(text)].count("\n") + 1


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        inside = [file.name for file in sorted(path.iterdir()) if file.suffix.lower() in FILE_KINDS]
        return f"{path} is a folder; name a file in it{': ' + _some(inside) if inside else ''}"
    there = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=3)
    return f"{path} is not there{'; near it are ' + _some(near) if near else '; give an existing file'}"


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(map(printable, names[:most])) + (", …" if len(names) > most else "")
