"""Which columns of a data set are what: as the settings say, else by the names that data sets usually have."""

from __future__ import annotations

from collections.abc import Sequence

from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable
from train.text_config import TextConfig
from train.text_rows import Row
from train.text_template import INSTRUCTION, MASK, TextTemplate, parse

TEXTS = ("text", "sentence", "content", "review")
PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("passage", "question"),
    ("text1", "text2"),
)
LABELS = ("label", "labels", "class")
ANSWERS = ("answer", "label", "obj_label", "target")
CONTINUED = (("prompt", "completion"),)  # the second goes on where the first ends
SAID = (
    ("question", "answer"),
    ("input", "output"),
    ("source", "target"),
    ("attributes", "text"),
    ("mr", "ref"),
    ("document", "summary"),
)


def template_of(config: TextConfig, rows: Sequence[Row]) -> TextTemplate:
    """What a model is shown of a row, for tasks that have a template.

    Raises:
        ConfigError: nothing is said of the columns and they go by other names, or a template that cannot be used.
    """
    there = list(dict.fromkeys(name for row in rows for name in row))
    if config.task == "sequence-classification":
        return _of_classification(config, there)
    if config.task == "masked-lm":
        return _of_cloze(config, there)
    return _of_language(config, there)


def _of_classification(config: TextConfig, there: list[str]) -> TextTemplate:
    label = config.label_column or _first(LABELS, there, "--label_column", config)
    text, second = config.text_column, config.pair_column
    if config.template is not None:
        return TextTemplate(config.template, _column(label), None if second is None else _column(second))
    if text is None:
        pair = next((pair for pair in PAIRS if set(pair) <= set(there) and label not in pair), None)
        if pair is not None and second is None:
            text, second = pair
        else:
            text = _first(TEXTS, [one for one in there if one not in (label, second)], "--text_column", config)
    return TextTemplate(_column(text), _column(label), None if second is None else _column(second))


def _of_cloze(config: TextConfig, there: list[str]) -> TextTemplate:
    answer = config.answer_column or config.label_column
    if answer is None:
        answer = _first(ANSWERS, there, "--answer_column", config)
    if config.prompt_template is not None:
        return TextTemplate(answer=_column(answer))
    return TextTemplate(config.template or "", _column(answer))


def _of_language(config: TextConfig, there: list[str]) -> TextTemplate:
    prompt, answer = config.prompt_column, config.answer_column
    if config.prompt_template is not None:
        return TextTemplate(answer=_column(answer or _first(ANSWERS, there, "--answer_column", config)))
    if config.template is not None:
        return _of_text(config.template, answer)
    if prompt is not None or answer is not None:
        if prompt is None or answer is None:
            raise ConfigError("give both --prompt_column and --answer_column, or a --template")
        return TextTemplate(_column(prompt) + "\n", _column(answer))
    if config.text_column is not None:
        return TextTemplate(answer=_column(config.text_column))
    if {"instruction", "output"} <= set(there):
        return INSTRUCTION
    for first, second in (*CONTINUED, *SAID):
        if first in there and second in there:
            between = "" if (first, second) in CONTINUED else "\n"
            return TextTemplate(_column(first) + between, _column(second))
    if config.task == "causal-lm":
        return TextTemplate(answer=_column(_first(TEXTS, there, "--prompt_column and --answer_column", config)))
    raise ConfigError(_unknown("--prompt_column and --answer_column", there))


def _of_text(template: str, answer: str | None) -> TextTemplate:
    """`--template`: with the answer in it, its last column unless `--answer_column` says another; or without."""
    names = [name for _, name in parse(template) if name is not None and name != MASK]
    if answer is not None and answer not in names:
        return TextTemplate(template, _column(answer))
    if not names:
        raise ConfigError(f"--template {printable(template)!a} is without the answer: end it with a column in braces")
    return TextTemplate.split(template, answer or names[-1])


def _first(known: Sequence[str], there: Sequence[str], flag: str, config: TextConfig) -> str:
    found = next((name for name in known if name in there), None)
    if found is None:
        raise ConfigError(_unknown(flag, there))
    return found


def _unknown(flag: str, there: Sequence[str]) -> str:
    listed = ", ".join(ascii(printable(name)) for name in there[:8]) + (", …" if len(there) > 8 else "")
    return f"what each column is cannot be told from their names ({listed}): give {flag}, or a --template"


def _column(name: str) -> str:
    return "{" + name + "}"
