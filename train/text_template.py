"""How the columns of a row become the text that a model sees: "{question}\\nAnswer: " and then "{answer}".

A name in braces stands for a column, "{{" for a brace. "{mask}" is where a masked model answers. Templates with virtual
tokens are objects of their own (`VirtualPrompt`).
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable
from train.text_bad_rows import BadRows
from train.text_rows import Row

MASK = "mask"
MASK_MARK = "\ufdd0"  # stands for the mask in a filled prompt; a code point that is no character
MAX_TEMPLATE = 100_000  # characters

Parts = list[tuple[str, str | None]]  # literal text and the column that comes after it


@dataclass(frozen=True)
class Filled:
    """A template with the values of one row. second is "" where the template has none."""

    prompt: str
    answer: str
    second: str = ""


@dataclass(frozen=True)
class TextTemplate:
    """Which text a model sees of a row.

    Attributes:
        prompt: what is given: "{question}\\nAnswer: ". Empty where the whole text is learned.
        answer: what is asked for: "{answer}", or the column of a label: "{label}".
        second: the second text of a pair: "{hypothesis}".
        prompt_without: the prompt of rows in which a column of `prompt` is missing or empty; None makes such rows bad.

    Raises:
        ConfigError: braces that do not match, or something other than a name in them.
    """

    prompt: str = ""
    answer: str = ""
    second: str | None = None
    prompt_without: str | None = None

    def __post_init__(self) -> None:
        for text in (self.prompt, self.answer, self.second, self.prompt_without):
            if text is not None:
                parse(text)
        if MASK in _names(self.answer) or MASK in _names(self.second):
            raise ConfigError(f"template {printable(self.answer)!a}: {{mask}} stands in the prompt, not in the answer")

    @classmethod
    def split(cls, text: str, answer_column: str) -> TextTemplate:
        """From one text that holds the answer: "{question}\\nAnswer: {answer}" ends its prompt before "{answer}".

        Raises:
            ConfigError: the answer is not there.
        """
        parts = parse(text)
        places = [n for n, (_, name) in enumerate(parts) if name == answer_column]
        if not places:
            raise ConfigError(
                f"the template {printable(text)!a} has no {{{answer_column}}}, so there is no answer to learn; end it "
                f"with {{{answer_column}}}"
            )
        literal = parts[places[0]][0]
        prompt = [*parts[: places[0]], (literal, None)]
        return cls(_written(prompt), _written([("", answer_column), *parts[places[0] + 1 :]]))

    def columns(self) -> list[str]:
        """The columns that every row needs, in order."""
        prompt = self.prompt if self.prompt_without is None else self.prompt_without
        names = [*_names(prompt), *_names(self.second), *_names(self.answer)]
        return [name for name in dict.fromkeys(names) if name != MASK]

    def check_answer(self, task: str) -> None:
        """Raises ConfigError where no column is in the answer."""
        if not _names(self.answer):
            raise ConfigError(
                f"the template {printable(self.prompt + self.answer)!a} is without the answer: {task} needs the column "
                "to learn, such as '{answer}'"
            )

    def fill(
        self, rows: Sequence[Row], bad: BadRows, *, virtual: VirtualPrompt | None = None
    ) -> Iterator[tuple[Row, Filled]]:
        """The rows that can be used, with their texts. virtual: makes the prompt instead.

        Raises:
            ConfigError: a column that no row has.
            DatasetError: a row without a value, where bad rows are errors.
        """
        own = self if virtual is None else TextTemplate("", self.answer, self.second)
        needed = list(dict.fromkeys([*own.columns(), *([] if virtual is None else virtual.columns)]))
        check_columns(needed, rows)
        for row in rows:
            filled = own._filled(row, needed, bad)
            if filled is not None:
                yield row, filled

    def given(self, row: Mapping[str, Any]) -> str:
        """The prompt alone, for a row whose answer is not known. Raises ConfigError for a value that is missing."""
        values = {name: text_of(row.get(name)) or "" for name in _names(self.prompt) if name != MASK}
        lacking = [name for name, value in values.items() if not value]
        if not lacking:
            return _put(self.prompt, values)
        if self.prompt_without is None or any(not text_of(row.get(name)) for name in _names(self.prompt_without)):
            raise ConfigError(f"the prompt needs a value for {', '.join(map(ascii, lacking))}")
        return _put(self.prompt_without, values)

    def _filled(self, row: Row, needed: Sequence[str], bad: BadRows) -> Filled | None:
        values: dict[str, str] = {}
        for name in dict.fromkeys([*needed, *_names(self.prompt)]):
            if name == MASK:
                continue
            value = text_of(row.get(name))
            if value is None and name in row and row[name] is not None:
                bad.report(row.source, f"holds no text in {name!a}", "give a text or a number",
                           f"a {type(row[name]).__name__}")  # fmt: skip
                return None
            if not value and name in needed:
                what = f"has nothing in {name!a}" if name in row else f"has no {name!a}"
                bad.report(row.source, what, "fill it in", "" if name in row else f"it has {_listed(row)}")
                return None
            values[name] = value or ""
        whole = all(values[name] for name in _names(self.prompt) if name != MASK)
        prompt = _put(self.prompt if whole or self.prompt_without is None else self.prompt_without, values)
        return Filled(prompt, _put(self.answer, values), "" if self.second is None else _put(self.second, values))


def words_together(prompt: str, answer: str) -> tuple[str, str]:
    """Spaces at the end of the prompt go to the beginning of the answer.

    Most tokenizers keep the space before a word in the word's token; a prompt that ends in one is continued by no such
    token.
    """
    ended = prompt.rstrip(" ")
    return ended, prompt[len(ended) :] + answer


class PromptEncoding(Protocol):
    """A template with virtual tokens; `lora_diffusion.methods.prompt_template` has one."""

    def encode(
        self, tokenizer: Any, values: Mapping[str, str], virtual_ids: Sequence[int], max_length: int | None
    ) -> list[int]:
        """Token ids, virtual ones among them, cut to `max_length` if that is given."""
        ...


@dataclass(frozen=True)
class VirtualPrompt:
    """A prompt with virtual tokens in it. ids: those of the virtual tokens, in order."""

    template: PromptEncoding
    ids: Sequence[int]

    @property
    def columns(self) -> list[str]:
        """The columns that every row needs."""
        return list(getattr(self.template, "columns", []))

    def encode(self, tokenizer: Any, row: Row, max_length: int | None = None) -> list[int]:
        """The prompt of one row, whose columns are the values. Raises ConfigError where it cannot be cut enough."""
        values = {name: text for name, value in row.items() if (text := text_of(value)) is not None}
        return list(self.template.encode(tokenizer, values, self.ids, max_length))


def parse(text: str) -> Parts:
    """Literal pieces, each with the name that follows it. Raises ConfigError."""
    if not isinstance(text, str) or len(text) > MAX_TEMPLATE:
        raise ConfigError(f"a template is a text of at most {MAX_TEMPLATE:,} characters")
    try:
        found = list(string.Formatter().parse(text))
    except ValueError as problem:
        raise ConfigError(f"template {printable(text)!a}: {problem}; write {{{{ and }}}} for braces") from None
    parts: Parts = []
    for literal, name, spec, conversion in found:
        if spec or conversion:
            raise ConfigError(
                f"template {printable(text)!a}: {{{printable(str(name))}:{printable(spec or '')}}} is no column; "
                "virtual tokens ({P:3}) are for methods that learn a prompt"
            )
        if name is not None and not name.strip():
            raise ConfigError(f"template {printable(text)!a}: empty braces; name a column in them")
        parts.append((literal, name))
    return parts


def check_columns(columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Raises ConfigError for a column that not one of the rows has, with the names nearest to it."""
    known = {name for row in rows for name in row}
    for name in columns:
        if rows and name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)[:8]
            raise ConfigError(
                f"there is no column {name!a} in {rows[0].source.rsplit(',', 1)[0]}; there are "
                f"{', '.join(ascii(printable(one)) for one in near)}"
            )


def text_of(value: Any) -> str | None:
    """A text or a number as text; "" for one of spaces alone; None for anything else."""
    if isinstance(value, str):
        return value if value.strip() else ""
    return str(value) if isinstance(value, int | float) else None


def _names(text: str | None) -> list[str]:
    return [name for _, name in parse(text or "") if name is not None]


def _put(text: str, values: Mapping[str, str]) -> str:
    """`text` with its columns' values, and MASK_MARK for "{mask}"."""
    pieces = []
    for literal, name in parse(text):
        value = "" if name is None else MASK_MARK if name == MASK else values[name].replace(MASK_MARK, "")
        pieces.append(literal + value)
    return "".join(pieces)


def _written(parts: Parts) -> str:
    """The text that `parse` makes these parts of."""
    return "".join(
        literal.replace("{", "{{").replace("}", "}}") + ("" if name is None else f"{{{name}}}")
        for literal, name in parts
    )


def _listed(row: Row, most: int = 6) -> str:
    return ", ".join(ascii(printable(name)) for name in list(row)[:most]) + (", …" if len(row) > most else "")


# A task said in words, in the columns that instruction data sets have.
INSTRUCTION = TextTemplate(
    prompt="Instruction: {instruction}\nInput: {input}\nResponse: ",
    prompt_without="Instruction: {instruction}\nResponse: ",
    answer="{output}",
)
PLAIN = TextTemplate(answer="{text}")
