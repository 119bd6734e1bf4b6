"""alpha_pattern's regular expressions fit the same paths as in PEFT, and none takes for ever."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diffusion.config import pattern_fits
from lora_diffusion.files.peft_patterns import Patterns

PATHS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.k_proj",
    "transformer.h.1.attn.c_attn",
    "q_proj",
    "down_blocks.0.attentions.0.to_out.0",
)
PATTERNS = (
    "q_proj", "roj", "self_attn.q_proj", "^q_proj", "^model.layers.0.self_attn.q_proj$",
    r"layers\.0\.self_attn\.q_proj",
    r".*q_proj", r".+proj", r".*?_attn", r".*\.self_attn\..*", r"layers\.(0|1|2)\..*_proj", r"\w+\.h\.\d+\..*",
    r"layers\.[0-9]+\.self_attn\.[qk]_proj", "(?:q|k)_proj", "h.[0-9].attn.c_attn", "to_out.0", "(a|(b|to_out)).0",
    "x?q_proj", "", "^$|q_proj", "[^q]_proj",
)  # fmt: skip
PIECES = ["a", "b", r"\.", ".", ".*", "a+", "b?", "(a|b)", "[ab]", "[^a]*", "^", "$", "(a.*|b)", r"\w", "|", ".+?"]


def fits(pattern: str, path: str) -> bool:
    return bool(Patterns({pattern: True}).value_for(path, False))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_as_in_peft(pattern: str) -> None:
    assert [fits(pattern, path) for path in PATHS] == [pattern_fits(pattern, path) for path in PATHS]


@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=6),
    st.from_regex(r"[abc]{1,3}(\.[abc]{1,2}){0,2}", fullmatch=True),
)
def test_as_in_peft_at_random(pieces: list[str], path: str) -> None:
    """But for a dot between plain letters, which stands for a dot here and for any character there."""
    pattern = "".join(pieces)
    expected = pattern_fits(pattern, path)
    if fits(pattern, path) != expected:
        assert set(pieces) <= {"a", "b", ".", r"\.", "^", "$"}
        assert expected


def test_the_first_that_fits() -> None:
    patterns = Patterns({"c_attn": 1, r".*\.q_proj": 2, "self_attn.q_proj": 3, "^q_proj": 4})
    assert [patterns.value_for(path, 0) for path in PATHS] == [2, 0, 1, 4, 0]


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(?=a)b", "a{3}", "[z-a]", "(a", "a)", "*a", r"(a)\1", "(?i)a", "a**", "^*"]
)
def test_what_is_not_followed(pattern: str) -> None:
    with pytest.raises(ValueError, match="not followed"):
        Patterns({pattern: 1})


def test_no_expression_takes_for_ever() -> None:
    """Python's own engine needs hours for either."""
    begun = time.perf_counter()
    assert not fits(".*" * 900 + "x", "a" * 500)
    assert not fits("a*" * 900 + "x", "a" * 500)
    assert time.perf_counter() - begun < 2
