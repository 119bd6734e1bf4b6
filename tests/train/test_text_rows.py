"""Rows from files of every kind, and what is said of those that cannot be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_diffusion as ld
from train.text_bad_rows import BadRows
from train.text_rows import Row, read_rows

GOOD = '{"question": "Who?", "answer": "Anna"}\n'


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", GOOD + '{"question": "Zwölf\u2028?", "answer": "Tom"}'),
        ("a.jsonl", "\ufeff" + GOOD.replace("\n", "\r\n") + '{"question": "Zwölf\u2028?", "answer": "Tom"}\r\n\r\n'),
        ("a.json", '[{"question": "Who?", "answer": "Anna"},\n {"question": "Zwölf\u2028?", "answer": "Tom"}]'),
        ("a.csv", 'question,answer\nWho?,Anna\n"Zwölf\u2028?",Tom\n'),
        ("a.tsv", "question\tanswer\nWho?\tAnna\nZwölf\u2028?\tTom\n"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    bad = BadRows()
    rows = read_rows(written(tmp_path, name, content), bad)
    assert rows == [{"question": "Who?", "answer": "Anna"}, {"question": "Zwölf\u2028?", "answer": "Tom"}]
    assert bad.summary() == []
    assert rows[1].source.endswith(
        {"a.csv": ", line 3", "a.tsv": ", line 3", "a.json": ", entry 2"}.get(name, ", line 2")
    )


def test_plain_text_and_columns_in_it(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "One  line.\n\nAnother.\n")
    assert read_rows(path, BadRows()) == [{"text": "One  line."}, {"text": "Another."}]
    path = written(tmp_path, "b.txt", "name : Aromi||Aromi is a pub . \nx||y\n")
    assert read_rows(path, BadRows(), separator="||", columns=["data", "text"]) == [
        {"data": "name : Aromi", "text": "Aromi is a pub ."},
        {"data": "x", "text": "y"},
    ]


def test_a_csv_field_of_several_lines_keeps_the_count(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'a,b\n"one\ntwo",1\nx\n')
    with pytest.raises(ld.DatasetError, match=r"a\.csv, line 4: the row has another number of fields.*1, not 2"):
        read_rows(path, BadRows())


BAD = [
    ("a.jsonl", GOOD + '{"question": "Who', 2, "is no JSON"),
    ("a.jsonl", GOOD + "\n" + GOOD, 2, "is empty"),
    ("a.jsonl", GOOD + "{}\n", 2, "is empty"),
    ("a.jsonl", GOOD + '["Who?"]\n', 2, "is no JSON object"),
    ("a.jsonl", GOOD + '{"question": "\\ud83d"}\n', 2, "holds half a character"),
    ("a.jsonl", GOOD.encode() + '{"question": "Zwölf"}\n'.encode("latin-1"), 2, "is not UTF-8 text (byte 0xf6)"),
    ("a.jsonl", GOOD + "[" * 100_000 + "\n", 2, "is no JSON"),
    ("a.csv", "a,b\n1,2\n\n", 3, "is empty"),
    ("a.csv", "a,b\n1,2\n1,2,3\n", 3, "has another number of fields"),
    ("a.csv", 'a,b\n1,2\n"1,2\n3,4\n', 3, "is no CSV"),
    ("a.csv", b"a,b\n1,2\n\xff,2\n", 3, "is not UTF-8 text (byte 0xff)"),
    ("b.txt", "1||2\n3\n", 2, "does not have 2 fields"),
]


@pytest.mark.parametrize(("name", "content", "line", "words"), BAD)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, name: str, content: str | bytes, line: int, words: str) -> None:
    path = written(tmp_path, name, content)
    options: dict[str, Any] = {"separator": "||", "columns": ["a", "b"]} if name == "b.txt" else {}
    with pytest.raises(ld.DatasetError) as caught:
        read_rows(path, BadRows(), **options)
    said = str(caught.value)
    assert f"{path}, line {line}: the row " in said and words in said and "skip bad rows" in said and "\n" not in said
    bad = BadRows("skip")
    rows = read_rows(path, bad, **options)
    assert len(rows) == (2 if words == "is empty" and content == GOOD + "\n" + GOOD else 1)
    assert bad.total == 1 and len(bad.summary()) == 1
    assert bad.summary()[0].startswith("1 row skipped: ") and f"line {line})" in bad.summary()[0]


def test_reasons_are_counted_apart(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", GOOD + "x\n\ny\n")
    bad = BadRows("skip")
    assert len(read_rows(path, bad)) == 1
    assert bad.summary() == [
        f"2 rows skipped: is no JSON (the first is {path}, line 2)",
        f"1 row skipped: is empty ({path}, line 3)",
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "holds no row"),
        ("a.jsonl", "x\n", "holds no row to learn from: 1 row skipped: is no JSON"),
        ("a.csv", "a,b\n", "holds no row"),
        ("a.csv", "a,a\n1,2\n", "line 1: the names of the columns"),
        ("a.json", '{"a": 1}', "holds no list"),
        ("a.json", '[{"a": 1}', "is no JSON"),
        ("a.json", b'[{"a": "\xff"}]', "line 1 is not UTF-8"),
        ("a.jsonl", GOOD.encode("utf-16"), "as UTF-16 does"),
        ("a.parquet", "PAR1", "files of this kind cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(ld.DatasetError) as caught:
        read_rows(written(tmp_path, name, content), BadRows("skip"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    written(tmp_path, "train.jsonl", GOOD)
    with pytest.raises(ld.DatasetError, match=r"trian\.jsonl is not there; near it are train\.jsonl"):
        read_rows(tmp_path / "trian.jsonl", BadRows())
    with pytest.raises(ld.DatasetError, match=r"is a folder; name a file in it: train\.jsonl"):
        read_rows(tmp_path, BadRows())


def test_separator_and_columns_belong_together(tmp_path: Path) -> None:
    text, lines = written(tmp_path, "a.txt", "a||b"), written(tmp_path, "a.jsonl", GOOD)
    with pytest.raises(ld.ConfigError, match="both their separator and their names"):
        read_rows(text, BadRows(), separator="||")
    with pytest.raises(ld.ConfigError, match="two names or more"):
        read_rows(text, BadRows(), separator="||", columns=["a"])
    with pytest.raises(ld.ConfigError, match=r"are for \.txt files"):
        read_rows(lines, BadRows(), separator="||", columns=["a", "b"])
    with pytest.raises(ld.ConfigError, match="on_bad='ignore'"):
        BadRows("ignore")


PIECES = st.sampled_from(
    [GOOD, '{"a":', '"', "\\", ",", "a,b\n", "\n", "\r", "||", "[", "]", "\ud7ff", "1" * 5000, "\ufeff", "é"]
)
CONTENT = st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=12).map(lambda parts: "".join(parts).encode()))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENT)
def test_whatever_a_file_holds_the_answer_is_rows_or_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = written(tmp_path, name, content)
    for on_bad in ("error", "skip"):
        try:
            rows = read_rows(path, BadRows(on_bad))
        except ld.DatasetError as problem:
            assert str(path) in str(problem) and str(problem).isprintable()
        else:
            assert rows and all(json.dumps(row, ensure_ascii=False).encode() for row in rows)


class TestNamedDataSets:
    def test_class_numbers_become_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        names = datasets.ClassLabel(names=["entailment", "not_entailment"])
        features = datasets.Features(
            {"premise": datasets.Value("string"), "label": names, "tags": datasets.Sequence(names)}
        )
        columns = {"premise": ["a", "b"], "label": [1, -1], "tags": [[0, 1], []]}
        asked: list[Any] = []

        def load(*args: Any, **kwargs: Any) -> Any:
            asked.append((args, kwargs))
            return datasets.Dataset.from_dict(columns, features=features)

        monkeypatch.setattr(datasets, "load_dataset", load)
        rows = read_rows("nyu-mll/glue", BadRows(), subset="rte", split="validation")
        assert asked == [(("nyu-mll/glue", "rte"), {"split": "validation"})]
        assert rows[0] == {"premise": "a", "label": "not_entailment", "tags": ["entailment", "not_entailment"]}
        assert rows[1]["label"] is None and rows[1].source == "nyu-mll/glue (rte, validation), row 1"

    def test_offline_it_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")

        def load(*args: Any, **kwargs: Any) -> Any:
            raise ConnectionError("Couldn't reach\nthe Hub")

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(ld.DatasetError) as caught:
            read_rows("nyu-mll/glue", BadRows(), subset="rte")
        assert "'nyu-mll/glue'" in str(caught.value) and "without a network" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ld.DatasetError, match="pip install datasets"):
            read_rows("nyu-mll/glue", BadRows())


def test_a_row_is_a_mapping_that_knows_its_place() -> None:
    row = Row({"a": 1}, "x.jsonl, line 3")
    assert json.dumps(row) == '{"a": 1}' and row.source == "x.jsonl, line 3"
