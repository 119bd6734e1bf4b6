"""`<lora:name:0.8>` in prompts: what is read, what is refused, and which names are meant."""

from __future__ import annotations

import pytest

from app.web.prompt_syntax import check_weight, known, merged, parse_prompt, tag_of
from lora_diffusion.errors import ConfigError


@pytest.mark.parametrize(
    ("prompt", "text", "adapters"),
    [
        ("a dog", "a dog", []),
        ("a  dog ,  big", "a  dog ,  big", []),
        ("a dog <lora:rex:0.8>", "a dog", [("rex", 0.8)]),
        ("<lora:rex> a dog<lora:runs/ink-2:-1>, big", "a dog, big", [("rex", 1.0), ("runs/ink-2", -1.0)]),
        ("a <LORA: rex : .5 > dog", "a dog", [("rex", 0.5)]),
        ("<lora:rex:unet=0.8:text_encoder=0.3>", "", [("rex", {"unet": 0.8, "text_encoder": 0.3})]),
        ("a <sks> dog < 3", "a <sks> dog < 3", []),
        ("<lora:dog@40:1e-1>", "", [("dog@40", 0.1)]),
    ],
)
def test_tags_are_taken_out(prompt: str, text: str, adapters: object) -> None:
    found = parse_prompt(prompt)
    assert found.text == text and found.adapters == adapters


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <lora:rex:0.8 dog", "without its end"),
        ("<lora::1>", "names no adapter"),
        ("<lora:>", "names no adapter"),
        ("<lora:rex:strong>", "'strong' is no number"),
        ("<lora:rex:nan>", "no finite number"),
        ("<lora:rex:inf>", "no finite number"),
        ("<lora:rex:11>", "beyond 10"),
        ("<lora:rex:1:2>", "write <lora:name:0.8>"),
        ("<lora:rex:unet=1:unet=2>", "write <lora:name:0.8>"),
        ("<lora:rex:U N=1>", "names of components"),
        ("<lora:rex> <lora:rex:0.5>", "twice"),
        ("".join(f"<lora:a{n}>" for n in range(17)), "at most 16"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(prompt: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_prompt(prompt)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_long_prompts_are_read_in_no_time() -> None:
    for bad in ("<lora:" * 20_000, "<" * 100_000, "<lora:" + "a" * 100_000):
        with pytest.raises(ConfigError) if "<lora:" in bad else pytest.MonkeyPatch.context():
            parse_prompt(bad)


def test_a_tag_wins_over_what_was_chosen() -> None:
    adapters, notes = merged([("rex", 1.0), ("ink", 0.5)], [("ink", 0.9), ("zorp", {"unet": 0.2})])
    assert adapters == [("rex", 1.0), ("ink", 0.9), ("zorp", {"unet": 0.2})]
    assert notes == ["ink: the prompt's weight is used, 0.9"]
    with pytest.raises(ConfigError, match="chosen twice"):
        merged([("rex", 1.0), ("rex", 0.5)], [])


def test_names_are_looked_up() -> None:
    there = ["rex", "runs/zorp", "Ink"]
    assert known("rex", there) == "rex" and known("INK", there) == "Ink"
    with pytest.raises(ConfigError, match="did you mean rex"):
        known("rexx", there)
    with pytest.raises(ConfigError, match="there are Ink, rex, runs/zorp"):
        known("0000", there)
    with pytest.raises(ConfigError, match="train or import one first"):
        known("rex", [])
    with pytest.raises(ConfigError) as caught:
        known("<script>\x1b[31m" + "x" * 10_000, there)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 300


def test_weights() -> None:
    assert check_weight(1, "x") == 1.0 and check_weight({"unet": 1}, "x") == {"unet": 1.0}
    for bad in (True, None, "1", float("nan"), 1e9, {}, {"a": "b"}, {"A b": 1}, [1]):
        with pytest.raises(ConfigError):
            check_weight(bad, "x")
    for weight in (0.5, {"unet": 1.0, "text_encoder": 0.25}):
        assert parse_prompt(tag_of("rex", weight)).adapters == [("rex", weight)]
