"""Templates with virtual tokens in them: parsing, and rows as ids for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import lora_diffusion as ld
from tests.lora_diffusion.methods.prompt_tokenizers import bert_tokenizer, gpt2_tokenizer, llama_tokenizer

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bert": bert_tokenizer,
    "gpt2": gpt2_tokenizer,
    "roberta": lambda: gpt2_tokenizer(roberta=True),
    "llama": llama_tokenizer,
}
ROW = {"x": "Paris lives", "y": "Rome"}


def spelled(tokenizer: Any, ids: list[int]) -> str:
    """The tokens with spaces between them; virtual ones as P0, P1 …"""
    words = [f"P{n - 1000}" if n >= 1000 else tokenizer.convert_ids_to_tokens(n) for n in ids]
    return " ".join(words)


def encoded(kind: str, template: Any, row: dict[str, str] = ROW, **options: Any) -> tuple[str, str]:
    """(the tokens, the one at the answer's position)."""
    tokenizer, parsed = TOKENIZERS[kind](), ld.PromptTemplate.parse(template)
    ids = list(range(1000, 1000 + parsed.num_virtual_tokens))
    row_ids = parsed.encode_row(tokenizer, row, ids, **options)
    assert parsed.encode(tokenizer, row, ids, **options) == row_ids.ids
    return spelled(tokenizer, row_ids.ids), spelled(tokenizer, [row_ids.ids[row_ids.answer]])


class TestParsing:
    def test_words_placeholders_and_braces(self) -> None:
        template = ld.PromptTemplate.parse("{P:2} {premise} Question: {hypothesis}? {P} {{note}} {mask}.")
        assert template.num_virtual_tokens == 3
        assert template.columns == ["premise", "hypothesis"]
        assert template.has_mask and not template.is_prefix
        assert ("text", " Question: ") in template.parts

    @pytest.mark.parametrize(
        ("counts", "text"),
        [
            ((3, 3, 3), "{P:3} {mask} {P:3} {x} {P:3}"),
            ([3, 3, 0], "{P:3} {mask} {P:3} {x} ."),
            ((0, 3, 2), "{mask} {P:3} {x} {P:2}"),
            ((3, 3), "{P:3} {x} {P:3}"),
            ((0, 3), " {x} {P:3}"),
        ],
    )
    def test_the_papers_counts(self, counts: Any, text: str) -> None:
        """In the released order: the mask comes before the subject."""
        assert ld.PromptTemplate.parse(counts).text == text

    @pytest.mark.parametrize(
        ("text", "prefix"),
        [("{P:3} {x}", True), ("{P}{P:2} Question: {x} {mask}", True), ("{P} {x} {P}", False), ("a {P} {x}", False)],
    )
    def test_prefix(self, text: str, prefix: bool) -> None:
        assert ld.PromptTemplate.parse(text).is_prefix is prefix

    @pytest.mark.parametrize(
        ("template", "words"),
        [
            ("{x} is {mask}", "0 virtual tokens"),
            ("{P:0} {x}", "{P:0}"),
            ("{P:many} {x}", "{P:many}"),
            ("{P:99999} {x}", "1 to 4096"),
            ("{P:4096}{P:4096}", "8192 virtual tokens"),
            ("{P} {mask} {mask}", "more than one {mask}"),
            ("{P} {x", "write {{ and }} for braces"),
            ("{P} {}", "is neither"),
            ("{P} {x:3}", "{x:3} is neither"),
            ("{P} {x!r}", "is neither"),
            ((3, 3, 3, 3), "three counts"),
            ((3, -1, 3), "counts"),
            ((0, 0, 0), "0 virtual tokens"),
            (7, "counts"),
        ],
    )
    def test_mistakes(self, template: Any, words: str) -> None:
        with pytest.raises(ld.ConfigError) as caught:
            ld.PromptTemplate.parse(template)
        assert words in str(caught.value) and "\n" not in str(caught.value)


class TestRows:
    @pytest.mark.parametrize(
        ("kind", "tokens"),
        [
            ("bert", "[CLS] P0 P1 [MASK] P2 paris lives P3 [SEP]"),
            ("roberta", "<s> P0 P1 <mask> P2 ĠParis Ġlives P3 </s>"),
        ],
    )
    def test_masked(self, kind: str, tokens: str) -> None:
        found, answer = encoded(kind, "{P:2} {mask} {P} {x} {P}")
        assert found == tokens
        assert answer in ("[MASK]", "<mask>")

    @pytest.mark.parametrize(
        ("kind", "tokens"),
        [
            ("gpt2", "P0 P1 ĠParis Ġlives P2 P3"),
            ("llama", "<s> P0 P1 ▁Paris ▁lives P2 P3"),
        ],
    )
    def test_causal(self, kind: str, tokens: str) -> None:
        """The answer comes after the last token, whose logits say it."""
        assert encoded(kind, (2, 2)) == (tokens, "P3")

    @pytest.mark.parametrize(
        ("kind", "tokens"),
        [
            ("bert", "[CLS] paris lives P0 question : rome ? [SEP]"),
            ("gpt2", "Paris Ġlives P0 ĠQuestion Ġ: ĠRome Ġ?"),
            ("llama", "<s> ▁Paris ▁lives P0 ▁Question ▁: ▁Rome ▁?"),
        ],
    )
    def test_anchors_are_ordinary_tokens(self, kind: str, tokens: str) -> None:
        """And a space before a word is what the tokenizer makes of it, after a virtual token as anywhere."""
        assert encoded(kind, "{x}{P} Question : {y} ?")[0] == tokens

    def test_words_are_as_in_plain_text(self) -> None:
        """Values and words around them are one text to the tokenizer."""
        tokenizer = TOKENIZERS["gpt2"]()
        template = ld.PromptTemplate.parse("{P}{x}s lives in{y}")
        plain = tokenizer("Annas lives inRome").input_ids
        assert template.encode(tokenizer, {"x": "Anna", "y": "Rome"}, [1000]) == [1000, *plain]

    def test_without_special_tokens(self) -> None:
        assert encoded("bert", (1, 1, 1), add_special_tokens=False) == ("P0 [MASK] P1 paris lives P2", "[MASK]")

    def test_empty_values(self) -> None:
        assert encoded("gpt2", "{P} {x} {P}", {"x": "  "})[0] == "P0 P1"

    @pytest.mark.parametrize("kind", TOKENIZERS)
    @pytest.mark.parametrize("room", [9, 10, 12])
    def test_the_longest_value_is_cut(self, kind: str, room: int) -> None:
        """Virtual tokens, anchors and the shorter value stay whole."""
        row = {"x": "Anna lives in Oslo in Rome in France is Answer", "y": "Rome"}
        tokenizer, template = TOKENIZERS[kind](), ld.PromptTemplate.parse("{P} {x} is {y} {P:2}")
        found = template.encode_row(tokenizer, row, [1000, 1001, 1002], room)
        assert room - 1 <= len(found.ids) <= room and found.truncated
        assert [n for n in found.ids if n >= 1000] == [1000, 1001, 1002]
        text = tokenizer.decode([n for n in found.ids if n < 1000], skip_special_tokens=True).lower()
        assert text.strip().startswith("anna lives") and text.strip().endswith("is rome")
        assert not template.encode_row(tokenizer, row, [1000, 1001, 1002], 50).truncated

    @pytest.mark.parametrize(
        ("kind", "template", "options", "words"),
        [
            ("gpt2", (1, 1, 1), {}, "no mask token"),
            ("gpt2", "{P} {z}", {}, "needs the column 'z'; the row has 'x', 'y'"),
            ("gpt2", "{P:4} {x}", {"max_length": 3}, "leaves no room"),
        ],
    )
    def test_mistakes(self, kind: str, template: Any, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ld.ConfigError, match=words):
            encoded(kind, template, **options)

    def test_another_number_of_ids(self) -> None:
        with pytest.raises(ld.ConfigError, match="2 ids were given for its 3"):
            ld.PromptTemplate.parse("{P:3} {x}").encode(bert_tokenizer(), ROW, [1000, 1001])
