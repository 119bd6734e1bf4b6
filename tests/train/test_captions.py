"""Captions from text files and metadata.jsonl, and the texts that templates and shuffled tags make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_diffusion import ConfigError, DatasetError
from train.captions import MAX_CAPTION_BYTES, Caption, read_captions, unused_texts
from train.randomness import Draws
from train.templates import BUILT_IN, ORDERS, check_templates, templates_of, variants


def pictures(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).write_bytes(b"")
    return [folder / name for name in names]


def write_lines(folder: Path, *entries: Any) -> Path:
    path = folder / "metadata.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_no_captions_at_all(tmp_path: Path) -> None:
    assert read_captions(pictures(tmp_path, "a.png", "b.png")) == []


def test_text_files_beside_the_pictures(tmp_path: Path) -> None:
    paths = pictures(tmp_path, "a.png", "b.v2.jpg")
    (tmp_path / "a.txt").write_bytes("\ufeffa dög on grass\r\nwith a ball \n".encode())
    (tmp_path / "b.v2.txt").write_text("a dog", encoding="utf-8")
    found = read_captions(paths)
    assert found == [
        Caption("a dög on grass with a ball", str(tmp_path / "a.txt")),
        Caption("a dog", str(tmp_path / "b.v2.txt")),
    ]
    (tmp_path / "c.txt").write_text("left over", encoding="utf-8")
    assert unused_texts(paths) == [tmp_path / "c.txt"]


def test_lines_of_a_metadata_file(tmp_path: Path) -> None:
    paths = pictures(tmp_path, "a.png", "cafe\u0301.png")
    path = write_lines(
        tmp_path,
        {"file_name": "caf\u00e9.png", "text": "a cup\u2028of coffee", "score": 3},
        {"file_name": "./a.png", "text": "a dog", "long": "a dog that runs"},
    )
    path.write_text(path.read_text().replace("\\u2028", "\u2028") + "\n\n", encoding="utf-8")
    assert [one.text for one in read_captions(paths)] == ["a dog", "a cup of coffee"]
    assert read_captions(paths)[0].source == f"{path}, line 2"
    with pytest.raises(DatasetError, match=r"line 1 has no text under 'long', only 'file_name', 'text', 'score'"):
        read_captions(paths, column="long")


def test_a_picture_without_a_caption(tmp_path: Path) -> None:
    paths = pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.raises(DatasetError, match=r"b\.png has no caption .*a\.txt\); write b\.txt, give --caption_fallback"):
        read_captions(paths)
    instead = Caption("sks dog", "--instance_prompt")
    assert read_captions(paths, fallback=instead)[1] is instead


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("caf\u00e9 dog".encode("latin-1"), r"a\.txt is not UTF-8 text \(byte 0xe9 in line 1\); save it as UTF-8"),
        ("a dog".encode("utf-16"), r"a\.txt is not UTF-8 text"),
        ("a dog".encode("utf-16-le"), r"a\.txt is not UTF-8 text \(it holds zero bytes"),
        (b" \n\n", r"a\.txt holds an empty caption"),
        (b"", r"a\.txt holds an empty caption"),
        (b"x" * (MAX_CAPTION_BYTES + 1), r"a\.txt has 65,537 bytes, which is no caption"),
    ],
)
def test_text_files_that_cannot_be_used(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=said):
        read_captions(pictures(tmp_path, "a.png"))


GOOD = '{"file_name": "a.png", "text": "a dog"}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GOOD + '{"file_name": "b.png", "te', r"jsonl, line 2 is no JSON .*was the file cut off"),
        (GOOD + '["b.png", "a dog"]', r"jsonl, line 2 is no JSON object"),
        (GOOD + "[" * 100_000, r"jsonl, line 2 is no JSON"),
        (GOOD + '{"text": "a dog"}', r"jsonl, line 2 has no 'file_name'"),
        (GOOD + '{"file_name": 3, "text": "a dog"}', r"jsonl, line 2 has no 'file_name'"),
        (GOOD + '{"file_name": "c.png", "text": "a dog"}', r"jsonl, line 2 is about 'c\.png', which is no picture in"),
        (GOOD + '{"file_name": "../b.png", "text": "x"}', r"jsonl, line 2 is about '\.\./b\.png', which is no picture"),
        (GOOD + GOOD, r"jsonl, line 2 is about 'a\.png', as is .*jsonl, line 1"),
        (GOOD + '{"file_name": "b.png", "text": " "}', r"jsonl, line 2 holds an empty caption"),
        (GOOD + '{"file_name": "b.png", "text": null}', r"jsonl, line 2 has no text under 'text'"),
        (GOOD + '{"file_name": "b.png", "text": "\\ud83d"}', r"jsonl, line 2 holds half a character"),
        (GOOD + '{"file_name": "\\u001b[31m", "text": "x"}', r"jsonl, line 2 is about '\\x1b\[31m'"),
        (GOOD, r"b\.png has no caption .*jsonl, line 1\)"),
        ("\n", r"jsonl is empty"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match=said):
        read_captions(pictures(tmp_path, "a.png", "b.png"))


def test_metadata_in_the_wrong_encoding(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_bytes((GOOD * 2 + GOOD.replace("dog", "d\u00f6g")).encode("latin-1"))
    with pytest.raises(DatasetError, match=r"jsonl is not UTF-8 text \(byte 0xf6 in line 3\)"):
        read_captions(pictures(tmp_path, "a.png"))


def test_two_captions_for_one_picture_and_two_pictures_for_one_caption(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog")
    write_lines(tmp_path, {"file_name": "a.png", "text": "a cat"})
    with pytest.raises(DatasetError, match=r"a\.png has two captions, .*a\.txt and .*jsonl, line 1; remove one"):
        read_captions(pictures(tmp_path, "a.png"))
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"a\.txt could belong to a\.jpg or to a\.png; rename"):
        read_captions(pictures(tmp_path, "a.jpg", "a.png"))


def texts(caption: str, *templates: str, **options: Any) -> tuple[str, ...]:
    return variants(caption, templates or ("{caption}",), draws=Draws(0), stream="tags", **options)


def test_templates_are_filled_in_and_captions_are_left_alone() -> None:
    assert texts("a dog") == ("a dog",)
    assert texts("a {subject}", "{caption}, photo of {subject}", "{subject}", subject="sks dog") == (
        "a {subject}, photo of sks dog",
        "sks dog",
    )


def test_tags_in_other_orders() -> None:
    found = texts("sks, dog,  grass , ball, sun", shuffle=True, keep=1)
    assert found[0] == "sks, dog, grass, ball, sun" and 2 < len(found) <= ORDERS
    assert all(text.startswith("sks, ") for text in found)
    assert {tuple(sorted(text.split(", "))) for text in found} == {("ball", "dog", "grass", "sks", "sun")}
    assert found == texts("sks, dog,  grass , ball, sun", shuffle=True, keep=1)
    assert found != variants(
        "sks, dog, grass, ball, sun", ["{caption}"], shuffle=True, keep=1, draws=Draws(1), stream="tags"
    )
    assert texts("sks, dog", shuffle=True, keep=1) == ("sks, dog",)
    assert texts("a dog", shuffle=True) == ("a dog",)
    assert (
        len(texts("a, b, c, d", "{caption}", "{subject}", "x {caption}", subject="s", shuffle=True)) <= 2 * ORDERS + 1
    )


def test_templates_from_lists_and_files(tmp_path: Path) -> None:
    assert templates_of(None, None) == ("{caption}",)
    assert templates_of("style", None) == BUILT_IN["style"]
    assert templates_of("{caption}, oil", None) == ("{caption}, oil",)
    (tmp_path / "lists").write_text("\ufeffa {subject}\n\n {caption} \r\na {subject}\n", encoding="utf-8")
    assert templates_of(None, str(tmp_path / "lists")) == ("a {subject}", "{caption}")
    for content, said in [(b"\n", "is empty"), (b"\xff", "cannot be read as UTF-8")]:
        (tmp_path / "lists").write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            templates_of(None, str(tmp_path / "lists"))
    with pytest.raises(ConfigError, match=r"cannot be read as UTF-8 text: .*No such file"):
        templates_of(None, str(tmp_path / "nothing"))


def test_templates_that_cannot_be_used() -> None:
    for template in (*BUILT_IN["object"], *BUILT_IN["style"], "{caption}"):
        check_templates([template], "sks")
    for template, said in [
        ("photo of {name}", r"'photo of \{name\}' holds \{name\}; it may hold \{caption\} and \{subject\}"),
        ("photo of {}", r"holds \{\}"),
        ("photo of sks", r"holds neither \{caption\} nor \{subject\}; .* 'object' or 'style'"),
        ("a {subject}", "say with --subject_token"),
    ]:
        with pytest.raises(ConfigError, match=said):
            check_templates([template], None)
