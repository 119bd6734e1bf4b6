"""Where virtual tokens stand in a text (Liu et al. 2021, P-tuning): `"{P:3} {mask} {P:3} {x} {P:3}"`. No torch here.

    {P:3}       three virtual tokens, {P} one
    {mask}      the tokenizer's mask, where a masked model answers
    {column}    the value of a column
    other words anchors: ordinary tokens of the vocabulary; {{ and }} are braces

A tuple of three numbers is the paper's code's: (3, 3, 3) is `"{P:3} {mask} {P:3} {x} {P:3}"`, and (3, 3, 0) ends in a
full stop instead. Of two it is for causal models: (3, 3) is `"{P:3} {x} {P:3}"`, answered after the last token.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..text import printable
from .prompt_tuning_config import MAX_TEXT, MAX_VIRTUAL_TOKENS

MASK, VIRTUAL, VALUE = "mask", "P", "x"


@dataclass(frozen=True)
class EncodedPrompt:
    """A row as ids. answer: the position whose logits are the answer's: the mask, or the last token of all.

    truncated: whether values were cut to fit.
    """

    ids: list[int]
    answer: int
    truncated: bool = False


@dataclass(frozen=True)
class PromptTemplate:
    """text: as it can be parsed again. parts: ("P", 3), ("mask", ""), ("text", " of ") and ("column", "x") in order."""

    text: str
    parts: tuple[tuple[str, Any], ...]

    @classmethod
    def parse(cls, template: str | Sequence[int] | PromptTemplate) -> PromptTemplate:
        """Raises ConfigError for what is no template with at least one virtual token."""
        if isinstance(template, PromptTemplate):
            return template
        text = template if isinstance(template, str) else _of_counts(template)
        if len(text) > MAX_TEXT:
            raise ConfigError(f"template {printable(text, 60)!a}: it has more than {MAX_TEXT:,} characters")
        made = cls(text, tuple(_parts(text)))
        if not 1 <= made.num_virtual_tokens <= MAX_VIRTUAL_TOKENS:
            raise made._error(f"it has {made.num_virtual_tokens} virtual tokens; 1 to {MAX_VIRTUAL_TOKENS} can be")
        if [kind for kind, _ in made.parts].count(MASK) > 1:
            raise made._error("it has more than one {mask}")
        return made

    @property
    def num_virtual_tokens(self) -> int:
        return sum(value for kind, value in self.parts if kind == VIRTUAL)

    @property
    def columns(self) -> list[str]:
        """The columns whose values it needs, each once."""
        return list(dict.fromkeys(value for kind, value in self.parts if kind == "column"))

    @property
    def has_mask(self) -> bool:
        return any(kind == MASK for kind, _ in self.parts)

    @property
    def is_prefix(self) -> bool:
        """Whether all virtual tokens come before everything else."""
        kinds = [kind for kind, value in self.parts if kind != "text" or value.strip()]
        first = next((n for n, kind in enumerate(kinds) if kind != VIRTUAL), len(kinds))
        return VIRTUAL not in kinds[first:]

    def encode(
        self,
        tokenizer: Any,
        values: Mapping[str, str],
        virtual_ids: Sequence[int],
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Token ids of one row; see `encode_row`."""
        return self.encode_row(tokenizer, values, virtual_ids, max_length, add_special_tokens).ids

    def encode_row(
        self,
        tokenizer: Any,
        values: Mapping[str, str],
        virtual_ids: Sequence[int],
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> EncodedPrompt:
        """One row as ids, with the position of its answer.

        values: {column: its value}; more columns than those of the template do no harm.
        virtual_ids: of the virtual tokens in order, from `prompt_ids`; as many as the template has.
        max_length: of all; the longest value is cut at its end until the row fits. Virtual tokens, the mask and anchors
            are never cut.
        add_special_tokens: put what the tokenizer puts around a text ([CLS], [SEP], <s> …) around the whole.
        Raises ConfigError for a missing column, another number of ids, a tokenizer without a mask, and a row that
        cannot be cut to fit.
        """
        lacking = [name for name in self.columns if not isinstance(values.get(name), str)]
        if lacking:
            there = ", ".join(ascii(printable(str(name))) for name in list(values)[:8])
            raise self._error(f"it needs the column {lacking[0]!a}; the row has {there or 'none'}")
        if len(virtual_ids) != self.num_virtual_tokens:
            raise self._error(f"{len(virtual_ids)} ids were given for its {self.num_virtual_tokens} virtual tokens")
        if self.has_mask and getattr(tokenizer, "mask_token_id", None) is None:
            raise self._error("the tokenizer has no mask token; leave {mask} out for a causal model")
        before, after, spaced = _habits(tokenizer)
        before, after = (before, after) if add_special_tokens else ([], [])
        texts, truncated = {name: values[name].strip() for name in self.columns}, False
        while True:
            ids, mask = self._ids(tokenizer, texts, list(virtual_ids), spaced)
            excess = 0 if max_length is None else len(before) + len(ids) + len(after) - max_length
            if excess <= 0:
                break
            texts, truncated = self._cut(tokenizer, texts, excess, max_length), True
        whole = [*before, *ids, *after]
        return EncodedPrompt(whole, len(whole) - 1 if mask is None else len(before) + mask, truncated)

    def _ids(
        self, tokenizer: Any, texts: Mapping[str, str], virtual: list[int], spaced: bool
    ) -> tuple[list[int], int | None]:
        """The ids without special tokens, and where the mask is. spaced: see `_habits`."""
        ids: list[int] = []
        mask, run = None, ""
        for kind, value in [*self.parts, ("end", "")]:
            if kind == "text":
                run += value
                continue
            if kind == "column":
                run += texts[value]
                continue
            words = run.strip()
            if words:
                apart = not spaced and run[0].isspace()
                ids += _encoded(tokenizer, f" {words}" if apart else words)
            run = ""
            if kind == VIRTUAL:
                ids += virtual[:value]
                del virtual[:value]
            elif kind == MASK:
                mask = len(ids)
                ids.append(tokenizer.mask_token_id)
        return ids, mask

    def _cut(self, tokenizer: Any, texts: Mapping[str, str], excess: int, max_length: int | None) -> dict[str, str]:
        """The texts with the longest shorter by about `excess` tokens. Raises ConfigError where none is left."""
        lengths = {name: len(_encoded(tokenizer, text)) for name, text in texts.items() if text}
        if not lengths:
            raise self._error(f"max_length={max_length} leaves no room for any value")
        longest = max(lengths, key=lambda name: lengths[name])
        keep = max(0, lengths[longest] - excess)
        return {**texts, longest: _beginning(tokenizer, texts[longest], keep)}

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"template {printable(self.text, 80)!a}: {what}")


def _of_counts(counts: Any) -> str:
    if not isinstance(counts, list | tuple) or not all(type(n) is int and 0 <= n <= MAX_VIRTUAL_TOKENS for n in counts):
        raise ConfigError(f"template={str(counts)[:60]!a}: give a text such as '{{P:3}} {{x}} {{P:3}}', or counts")
    if len(counts) not in (2, 3):
        raise ConfigError(f"template={str(counts)[:60]!a}: give three counts for a masked model, two for a causal one")
    words = [f" {{P:{n}}}" if n else "" for n in counts]
    if len(counts) == 2:
        return f"{words[0].lstrip()} {{x}}{words[1]}"
    return f"{words[0]} {{mask}}{words[1]} {{x}}{words[2] or ' .'}".lstrip()


def _parts(text: str) -> Iterator[tuple[str, Any]]:
    try:
        found = list(string.Formatter().parse(text))
    except ValueError as problem:
        raise ConfigError(f"template {printable(text, 80)!a}: {problem}; write {{{{ and }}}} for braces") from None
    for literal, name, spec, conversion in found:
        if literal:
            yield "text", literal
        if name is None:
            continue
        if conversion or not name.strip() or (spec and name != VIRTUAL):
            raise ConfigError(
                f"template {printable(text, 80)!a}: {{{printable(name + (':' + spec if spec else ''))}}} is neither "
                "{P:3}, nor {mask}, nor a column such as {x}"
            )
        if name == VIRTUAL:
            if spec and not (spec.isascii() and spec.isdigit() and 1 <= int(spec[:9]) <= MAX_VIRTUAL_TOKENS):
                raise ConfigError(
                    f"template {printable(text, 80)!a}: {{P:{printable(spec, 20)}}} needs a whole number from 1 to "
                    f"{MAX_VIRTUAL_TOKENS}"
                )
            yield VIRTUAL, int(spec) if spec else 1
        else:
            yield (MASK, "") if name == MASK else ("column", name)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _habits(tokenizer: Any) -> tuple[list[int], list[int], bool]:
    """What a tokenizer does to every text: ids that it puts before and after, and whether it puts a space in front."""
    bare = _encoded(tokenizer, "a")
    full = list(tokenizer("a").input_ids)
    start = next((n for n in range(len(full) - len(bare) + 1) if full[n : n + len(bare)] == bare), 0)
    spaced = str(tokenizer.convert_ids_to_tokens(bare)[0]).startswith("\N{LOWER ONE EIGHTH BLOCK}")
    return full[:start], full[start + len(bare) :], spaced


def _beginning(tokenizer: Any, text: str, keep: int) -> str:
    """The text of the first `keep` tokens; always shorter than `text`."""
    if keep == 0:
        return ""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        shorter = text[: offsets[keep - 1][1]].rstrip()
    else:
        shorter = tokenizer.decode(_encoded(tokenizer, text)[:keep]).strip()
    return shorter if len(shorter) < len(text) else text[:-1].rstrip()
