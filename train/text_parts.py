"""The rows of a text run: read, given their task, made into examples, and shown as the model will see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.errors import ConfigError, DatasetError
from lora_diffusion.methods.prompt_template import VALUE, PromptTemplate
from train.text_bad_rows import BadRows
from train.text_checks import words_of
from train.text_columns import template_of
from train.text_config import TextConfig
from train.text_data import TextData
from train.text_learn import first_virtual_ids, in_front
from train.text_methods import parsed_template, virtual_tokens
from train.text_models import embedding_size
from train.text_packing import Packed, pack
from train.text_rows import Row, read_rows
from train.text_tasks import TASKS, Task
from train.text_tasks.tokens import longest
from train.text_template import VirtualPrompt

DEFAULT_LENGTH = 512
PARTS = ("train", "validation", "test")
VALUES = ("subject", "sub_label", "text", "sentence", "question", "prompt")  # what a template's {x} may be


@dataclass(frozen=True)
class TextParts:
    """A run's task and its examples.

    Attributes:
        virtual_ids: {kind: the ids that the examples use for virtual tokens}.
        packs: with `--packing`, the examples to train on as they share rows.
    """

    task: Task
    train: TextData
    validation: TextData | None
    test: TextData | None
    virtual_ids: dict[str, list[int]]
    packs: list[Packed] | None = None

    def all(self) -> dict[str, TextData]:
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: data for name, data in found.items() if data is not None}


def read_parts(config: TextConfig, tokenizer: Any, model_config: Any) -> TextParts:
    """Read what the settings name and prepare it.

    Args:
        model_config: transformers' config of the model: how long a row may be, how many words it knows.

    Raises:
        ConfigError, DatasetError: settings or rows that cannot be used.
    """
    rows: dict[str, tuple[str, list[Row], BadRows]] = {}
    for part in PARTS:
        if (found := _read(config, part)) is not None:
            rows[part] = found
    ids = first_virtual_ids(config, embedding_size(model_config))
    task = make_task(config, tokenizer, model_config, rows["train"][1], ids)
    front = [number for kind, numbers in ids.items() if kind != "p_tuning" or config.prompt_template is None
             for number in numbers]  # fmt: skip
    data = {}
    for part, (name, here, bad) in rows.items():
        examples = in_front(task.prepare(here, bad, training=part == "train"), front, task)
        data[part] = TextData(task, name, examples, len(here), [f"{name}: {said}" for said in bad.summary()])
    packs = pack(data["train"].examples, row_length(config, tokenizer, model_config)) if config.packing else None
    return TextParts(task, data["train"], data.get("validation"), data.get("test"), ids, packs)


def make_task(
    config: TextConfig, tokenizer: Any, model_config: Any, rows: Sequence[Row], ids: Mapping[str, Sequence[int]]
) -> Task:
    """The task object that the settings describe.

    Raises:
        ConfigError: a setting that it cannot take, or a length beyond the model's.
    """
    length = row_length(config, tokenizer, model_config) - virtual_tokens(config)
    if length < 4:
        raise ConfigError(
            f"{virtual_tokens(config)} virtual tokens leave {length} of --max_length for a row; raise it, or take fewer"
        )
    options: dict[str, Any] = {"max_length": length, "too_long": config.too_long}
    if config.task not in ("token-classification", "question-answering"):
        options["template"] = template_of(config, rows)
    if config.prompt_template is not None:
        template = _with_columns(PromptTemplate.parse(parsed_template(config.prompt_template)), config, rows)
        options["virtual"] = VirtualPrompt(template, list(ids["p_tuning"]))
    labels = None if config.labels is None else [name.strip() for name in config.labels.split(",") if name.strip()]
    if config.task == "sequence-classification":
        options |= {"labels": labels, "regression": config.regression, "positive": config.positive_label}
    elif config.task == "token-classification":
        options |= {"labels": labels, "tokens_column": config.tokens_column, "tags_column": config.tags_column}
    elif config.task == "question-answering":
        options |= {
            "question_column": config.question_column,
            "context_column": config.context_column,
            "answers_column": config.answers_column,
            "stride": min(config.doc_stride, length - 1),
            "max_answer_length": config.max_answer_length or 30,
        }
    elif config.task == "masked-lm":
        options |= {"words": words_of(config.label_words), "allowed": _allowed(config.allowed_words_file)}
    elif config.task == "seq2seq-lm":
        options |= {
            "max_answer_length": config.max_answer_length,
            "decoder_start": getattr(model_config, "decoder_start_token_id", None),
        }
    return TASKS[config.task][1](tokenizer, **options)


def row_length(config: TextConfig, tokenizer: Any, model_config: Any) -> int:
    """Tokens of a row, virtual ones included. Raises ConfigError for more than the model takes."""
    limit = longest(model_config, tokenizer)
    if config.max_length is not None and limit is not None and config.max_length > limit:
        raise ConfigError(f"--max_length {config.max_length} is more than the model takes, {limit}")
    return config.max_length or min(limit or DEFAULT_LENGTH, DEFAULT_LENGTH)


def _read(config: TextConfig, part: str) -> tuple[str, list[Row], BadRows] | None:
    """(name, rows, what was bad) of one part; None where the settings name none."""
    file = getattr(config, f"{part}_file")
    split = config.dataset_split if part == "train" else getattr(config, f"{part}_split")
    if file is None and (config.dataset is None or split is None):
        return None
    bad = BadRows(config.on_bad)
    name = file or str(config.dataset)
    columns = None if config.columns is None else [one.strip() for one in config.columns.split(",")]
    table = {"separator": config.separator, "columns": columns} if name.lower().endswith(".txt") else {}
    rows = read_rows(name, bad, split=split or "train", subset=config.dataset_config, **table)  # type: ignore[arg-type]
    most = {"train": config.max_train_samples, "validation": config.max_validation_samples}.get(part)
    return name if file is not None else f"{name} ({split})", rows[:most], bad


def _with_columns(template: PromptTemplate, config: TextConfig, rows: Sequence[Row]) -> PromptTemplate:
    """The template in the columns of these rows: the paper's {x} is `--prompt_column`, or found by its name."""
    known = list(dict.fromkeys(name for row in rows for name in row))
    if VALUE in template.columns and VALUE not in known:
        column = config.prompt_column or next((name for name in VALUES if name in known), None)
        if column is not None:
            template = PromptTemplate.parse(template.text.replace(f"{{{VALUE}}}", f"{{{column}}}"))
    for name in template.columns:
        if name not in known:
            listed = ", ".join(map(ascii, known[:8]))
            hint = ", or say with --prompt_column which of them it is" if name == VALUE else ""
            raise ConfigError(f"--prompt_template names the column {name!a}; there are {listed}{hint}")
    return template


def _allowed(file: str | None) -> list[str] | None:
    if file is None:
        return None
    try:
        words = Path(file).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as problem:
        raise DatasetError(f"--allowed_words_file {file} cannot be read: {problem}") from problem
    return words
