"""Columns into text."""

from __future__ import annotations

from typing import Any

import pytest

import lora_diffusion as ld
from train.text_bad_rows import BadRows
from train.text_rows import Row
from train.text_template import INSTRUCTION, PLAIN, Filled, TextTemplate, VirtualPrompt, words_together


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(value, f"a.jsonl, line {number}") for number, value in enumerate(values, start=1)]


def filled(template: TextTemplate, *values: dict[str, Any], on_bad: str = "error") -> list[Filled]:
    return [texts for _, texts in template.fill(rows(*values), BadRows(on_bad))]


QA = TextTemplate("{question}\nAnswer: ", "{answer}")


def test_prompt_and_answer() -> None:
    assert filled(QA, {"question": "1 {+} 1?", "answer": 2}) == [Filled("1 {+} 1?\nAnswer: ", "2")]
    assert filled(TextTemplate("{{{a}}}", "{b}."), {"a": "x", "b": True}) == [Filled("{x}", "True.")]
    assert filled(TextTemplate("{p}", "{l}", second="{h}"), {"p": "x", "h": "y", "l": "z"}) == [Filled("x", "z", "y")]
    assert filled(PLAIN, {"text": "all of it"}) == [Filled("", "all of it")]


def test_one_text_is_split_at_its_answer() -> None:
    assert TextTemplate.split("{question}\nAnswer: {answer}", "answer") == QA
    assert TextTemplate.split("{{{q}}}: {a} of {b}.", "a") == TextTemplate("{{{q}}}: ", "{a} of {b}.")
    with pytest.raises(ld.ConfigError, match=r"has no \{answer\}, so there is no answer to learn"):
        TextTemplate.split("{question}\nAnswer: ", "answer")


def test_spaces_belong_to_the_word_that_follows() -> None:
    assert words_together("Answer: ", "blue") == ("Answer:", " blue")
    assert words_together("Answer:\n", "blue") == ("Answer:\n", "blue")


def test_instructions_with_and_without_input() -> None:
    one, other = filled(
        INSTRUCTION,
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        {"instruction": "Sing", "input": "", "output": "La"},
    )
    assert "Input: 1 and 2" in one.prompt and one.answer == "3"
    assert "Input" not in other.prompt and "Sing" in other.prompt
    assert filled(INSTRUCTION, {"instruction": "Sing", "output": "La"})[0] == other
    assert INSTRUCTION.given({"instruction": "Sing"}) == other.prompt
    assert INSTRUCTION.given({"instruction": "Add", "input": "1 and 2"}) == one.prompt


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"question": "Who?"}, "has no 'answer' (it has 'question')"),
        ({"question": " \n", "answer": "Anna"}, "has nothing in 'question'"),
        ({"question": None, "answer": "Anna"}, "has nothing in 'question'"),
        ({"question": ["Who?"], "answer": "Anna"}, "holds no text in 'question' (a list)"),
    ],
)
def test_a_row_without_a_value(values: dict[str, Any], words: str) -> None:
    good = {"question": "Who?", "answer": "Tom"}
    with pytest.raises(ld.DatasetError) as caught:
        filled(QA, good, values)
    assert str(caught.value).startswith("a.jsonl, line 2: the row ") and words in str(caught.value)
    assert len(filled(QA, good, values, on_bad="skip")) == 1


def test_a_column_that_no_row_has() -> None:
    with pytest.raises(ld.ConfigError, match=r"no column 'question' in a\.jsonl; there are 'questions'"):
        filled(QA, {"questions": "Who?", "answer": "Tom"})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{question", "expected '}'"),
        ("question}", "Single '}'"),
        ("{}", "empty braces"),
        ("{P:3} {x}", "virtual tokens"),
        ("{x!r}", "is no column"),
    ],
)
def test_templates_that_cannot_be_used(template: str, words: str) -> None:
    with pytest.raises(ld.ConfigError) as caught:
        TextTemplate(template, "{answer}")
    assert words in str(caught.value)


def test_without_the_answer() -> None:
    with pytest.raises(ld.ConfigError, match="is without the answer"):
        TextTemplate("{question}").check_answer("causal-lm")
    with pytest.raises(ld.ConfigError, match="stands in the prompt"):
        TextTemplate("{x}", "{mask}")
    with pytest.raises(ld.ConfigError, match="needs a value for 'question'"):
        QA.given({"answer": "x"})


def test_a_prompt_with_virtual_tokens_gets_the_row_as_text() -> None:
    class Encoding:
        def encode(self, tokenizer: Any, values: Any, virtual_ids: Any, max_length: int) -> list[int]:
            assert values == {"x": "Anna", "n": "3"} and max_length == 9
            return [*virtual_ids, 1]

    assert VirtualPrompt(Encoding(), [7, 8]).encode(None, Row({"x": "Anna", "n": 3, "l": []}, ""), 9) == [7, 8, 1]
