"""Names become paths in one way, and none of them leads out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from app.web.places import Workspace, free_name, inside, is_inside, safe_name, suggested_name
from lora_diffusion.errors import ConfigError

HOSTILE = [
    "", ".", "..", "../x", "a/../b", "/etc/passwd", "a/b", "a\\b", "C:x", ".hidden", "-rf", "a..b", "a\0b", "a\n",
    "a\r", "x" * 65, "x" * 10_000, "con", "NUL.txt", "name.", " a", "a ", "ä", "a%2fb", "<script>", "$(id)", "a;b",
    "~root", "\u202ea", "a\u2215b",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused_in_one_printable_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        safe_name(name)
    assert str(caught.value).isascii() and str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [None, 3, b"a", ["a"]])
def test_what_is_no_text_is_no_name(value: object) -> None:
    with pytest.raises(ConfigError, match="cannot be a name"):
        safe_name(value)  # type: ignore[arg-type]


def test_a_plain_name_stays_as_it_is() -> None:
    for name in ("a", "My-dog_2.5", "x" * 64, "0", "console", "a.safetensors"):
        assert safe_name(name) == name


@given(some.text(max_size=80))
def test_a_suggested_name_is_always_safe(text: str) -> None:
    assert safe_name(suggested_name(text, "run"))


def test_suggested_names_stay_near_to_what_was_said() -> None:
    assert suggested_name("My dog, Rex!") == "My-dog-Rex"
    assert suggested_name("Bär") == "Bar"
    assert suggested_name("../../etc/passwd") == "etc-passwd"
    assert suggested_name("犬", "dog") == "dog"


def test_a_path_is_inside_its_root_or_refused(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    assert inside(root, "a") == root / "a"
    (root / "link").symlink_to(other)
    with pytest.raises(ConfigError, match="leads out"):
        inside(root, "link")
    with pytest.raises(ConfigError):
        inside(root, "..")
    assert is_inside(root, root / "a" / "b") and not is_inside(root, other)
    assert not is_inside(root, root / ".." / "other") and not is_inside(root, "a\0b")
    assert not is_inside(root, tmp_path / "root-and-more")


def test_a_free_name_is_taken_by_nobody(tmp_path: Path) -> None:
    assert free_name(tmp_path, "a") == "a"
    (tmp_path / "A").mkdir()
    assert free_name(tmp_path, "a") == "a-2"
    (tmp_path / "a-2").mkdir()
    assert free_name(tmp_path, "a") == "a-3"
    (tmp_path / "x.safetensors").touch()
    assert free_name(tmp_path, "x.safetensors") == "x-2.safetensors"
    long = "x" * 64
    (tmp_path / long).mkdir()
    assert free_name(tmp_path, long) == "x" * 62 + "-2"
    assert free_name(tmp_path / "nowhere", "a") == "a"


def test_the_parts_of_a_workspace_are_made_when_first_used(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "space")
    assert not space.root.exists()
    assert space.runs.is_dir() and not (space.root / "gallery").exists()
    for part in (space.adapters, space.gallery, space.uploads, space.trash):
        assert part.is_dir() and part.parent == space.root


def test_a_workspace_that_cannot_be_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        _ = Workspace(tmp_path / "file").runs
