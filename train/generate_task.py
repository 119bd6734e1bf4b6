"""From an adapter's file to the task that it was trained for, and from prompts and rows to what that task takes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lora_diffusion as ld
from lora_diffusion.errors import ConfigError
from lora_diffusion.methods.prompt_template import PromptTemplate
from lora_diffusion.text import printable
from train.config import from_dict, settings_of
from train.generate_config import WITH_HEAD
from train.text_columns import ANSWERS, CONTINUED, LABELS, SAID
from train.text_config import METHODS, TextConfig, methods_of
from train.text_facts import columns_in, labels_in
from train.text_methods import parsed_template
from train.text_rows import Row
from train.text_task_names import TASK_TYPES
from train.text_template import MASK, parse

_LOCAL = ("allowed_words_file",)  # what a file must not make us read
_WORDS = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Asked:
    """A task as an adapter knows it.

    settings: of the run that made the adapter, as far as its file tells them, with the model in hand.
    labels: in their order; None for tasks without them. guessed: whether these had to be made up.
    columns: of the texts in a row; None where the file does not say.
    """

    settings: TextConfig
    labels: list[str] | None = None
    guessed: bool = False
    columns: list[str] | None = None

    @property
    def task(self) -> str:
        return self.settings.task


def asked_of(adapter: ld.Adapter | None, model: str, architecture: Any, task: str | None, labels: str | None) -> Asked:
    """What to ask a model with this adapter (None: the base alone).

    Args:
        architecture: transformers' config of the model.
        task, labels: what the user says; they win over the file.

    Raises:
        ConfigError: settings in the file that cannot be used, or another number of labels than the adapter's head has.
    """
    metadata = adapter.metadata if adapter is not None else {}
    own = metadata.get("settings") if metadata.get("recipe") == "text" else None
    known = {item.name for item in settings_of(TextConfig)} - {*_LOCAL, "pretrained_model_name_or_path", "task"}
    values = {name: value for name, value in own.items() if name in known} if isinstance(own, Mapping) else {}
    chosen = task or _task_in(metadata, adapter) or _task_of(architecture)
    if adapter is None and chosen in WITH_HEAD:
        raise ConfigError(f"--task {chosen} needs an --adapter: the base model has no head for it")
    made = {"pretrained_model_name_or_path": model, "task": chosen}
    settings = from_dict(TextConfig, {**values, **made} if task in (None, metadata.get("task")) else made)
    unknown = [method for method in methods_of(settings) if method not in METHODS]
    if unknown:
        raise ConfigError(f"the adapter was made by the method {printable(unknown[0])!a}, which this version lacks")
    if settings.too_long == "split":
        settings = dataclasses.replace(settings, too_long="error")
    if chosen not in ("sequence-classification", "token-classification"):
        return Asked(settings, columns=columns_in(metadata))
    if chosen == "sequence-classification" and settings.regression:
        return Asked(settings, columns=columns_in(metadata))
    names, guessed = _labels(adapter, metadata, settings, labels)
    return Asked(dataclasses.replace(settings, labels=None), names, guessed, columns_in(metadata))


def prompt_columns(asked: Asked) -> list[str]:
    """The columns that the text of a row stands in, as far as anything says them; none where a text is all there is."""
    settings = asked.settings
    if settings.prompt_template is not None:
        return PromptTemplate.parse(parsed_template(settings.prompt_template)).columns
    if asked.columns is not None:
        return asked.columns
    if settings.template is not None:
        names = [name for _, name in parse(settings.template) if name is not None and name != MASK]
        if asked.task in ("causal-lm", "seq2seq-lm"):
            answer = settings.answer_column or names[-1]
            names = names[: names.index(answer)] if answer in names else names
        return list(dict.fromkeys(names))
    if asked.task in ("causal-lm", "seq2seq-lm"):
        return [settings.prompt_column] if settings.prompt_column is not None else []
    text = settings.text_column or "text"
    return [text] if settings.pair_column is None else [text, settings.pair_column]


def row_of(asked: Asked, prompt: str) -> Row:
    """A prompt as a row of the task. Raises ConfigError where one text is not enough."""
    source = f"the prompt {printable(prompt, 60)!a}"
    if asked.task == "token-classification":
        return Row({asked.settings.tokens_column: words_in(prompt)}, source)
    if asked.task == "question-answering":
        columns = [asked.settings.question_column, asked.settings.context_column]
    else:
        columns = prompt_columns(asked)
    if len(columns) != 1:
        raise ConfigError(
            f"one prompt is not enough: the adapter was trained on {' and '.join(map(ascii, columns)) or 'rows'}; give "
            "these apart, as columns of an --input_file or as fields"
        )
    return Row({columns[0]: prompt}, source)


def words_in(prompt: str, free: bool = True) -> list[str]:
    """The words of a text, marks apart; or, not free, what has spaces between it."""
    return _WORDS.findall(prompt) if free else prompt.split()


def answerable(asked: Asked, rows: Sequence[Row]) -> list[Row]:
    """Rows with an answer that the task accepts where theirs stands, or should stand; it is not looked at.

    A task makes examples of rows to learn from, which have answers. Those to be asked need not have any.
    """
    return [Row({**row, **_answer(asked, row, rows[0])}, row.source) for row in rows]


def _answer(asked: Asked, row: Row, first: Row) -> dict[str, Any]:
    settings, there = asked.settings, list(first)
    labels = asked.labels or ["0"]
    if asked.task == "sequence-classification":
        return {settings.label_column or _there(LABELS, there): "0" if settings.regression else labels[0]}
    if asked.task == "token-classification":
        words = row.get(settings.tokens_column)
        words = words.split() if isinstance(words, str) else words
        return {settings.tags_column: [labels[0]] * len(words) if isinstance(words, list) else []}
    if asked.task == "question-answering":
        return {settings.answers_column: {"text": [], "answer_start": []}}
    if asked.task == "masked-lm":
        column = settings.answer_column or settings.label_column or _there(ANSWERS, there)
        return {column: _word(settings)}
    if settings.prompt_template is not None:
        return {settings.answer_column or _there(ANSWERS, there): "."}
    if settings.template is not None:
        names = [name for _, name in parse(settings.template) if name is not None and name != MASK]
        return {settings.answer_column or (names[-1] if names else "answer"): "."}
    if settings.answer_column is not None:
        return {settings.answer_column: "."}
    if "instruction" in there:
        return {"output": "."}
    return next(({second: "."} for one, second in (*CONTINUED, *SAID) if one in there), {})


def _word(settings: TextConfig) -> str:
    """An answer of one token: a label's, or a full stop."""
    return settings.label_words.partition("=")[0].strip() if settings.label_words is not None else "."


def _there(known: Sequence[str], there: Sequence[str]) -> str:
    return next((name for name in known if name in there), known[0])


def _task_in(metadata: Mapping[str, Any], adapter: ld.Adapter | None) -> str | None:
    said = metadata.get("task")
    if isinstance(said, str) and said in TASK_TYPES:
        return said
    if adapter is None:
        return None
    learned = [part.config for kinds in adapter.methods.values() for part in kinds.values()]
    types = {getattr(config, "task_type", None) for config in (*adapter.configs.values(), *learned)}
    return next((name for name, kind in TASK_TYPES.items() if kind is not None and kind in types), None)


def _task_of(architecture: Any) -> str:
    """What a base model does by itself."""
    if getattr(architecture, "is_encoder_decoder", False):
        return "seq2seq-lm"
    import transformers

    causal = any("CausalLM" in name or "LMHead" in name for name in architecture.architectures or ())
    masked = type(architecture) in transformers.AutoModelForMaskedLM._model_mapping.keys()  # noqa: SIM118 (lazy)
    return "masked-lm" if masked and not causal else "causal-lm"


def _labels(
    adapter: ld.Adapter | None, metadata: Mapping[str, Any], settings: TextConfig, said: str | None
) -> tuple[list[str], bool]:
    """The labels, and whether they had to be numbered."""
    count = _outputs(adapter)
    named = said if said is not None else settings.labels
    names = [one.strip() for one in named.split(",") if one.strip()] if named is not None else labels_in(metadata)
    if names is None:
        if count is None:
            raise ConfigError(f"the labels of --task {settings.task} are not known; give --labels")
        return [f"LABEL_{number}" for number in range(count)], True
    if count is not None and len(names) != count:
        raise ConfigError(f"{len(names)} labels ({printable(', '.join(names))}), and the adapter's head has {count}")
    return names, False


def _outputs(adapter: ld.Adapter | None) -> int | None:
    """How many outputs the head that an adapter brings has."""
    copies = adapter.copies.get("model", {}) if adapter is not None else {}
    for path, tensors in reversed(copies.items()):
        weight = tensors.get("weight")
        if weight is not None and weight.ndim == 2 and path.rpartition(".")[2] in ("classifier", "score", "out_proj"):
            return int(weight.shape[0])
    return None


__all__ = ["Asked", "answerable", "asked_of", "prompt_columns", "row_of", "words_in"]
