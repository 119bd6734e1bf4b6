"""A language model with adapters in it, ready to be asked: to write on, or to judge rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import lora_diffusion as ld
from lora_diffusion.errors import ConfigError
from lora_diffusion.methods.prompts import prompts_in
from lora_diffusion.state import state_of
from train.generate_config import WRITING
from train.generate_task import Asked, answerable, prompt_columns, row_of
from train.generate_write import Drawing, OnPiece, Stop, write
from train.models import PRECISIONS, resolve_device, resolve_precision
from train.text_bad_rows import BadRows
from train.text_learn import in_front
from train.text_models import load_config, load_text_model, load_tokenizer
from train.text_parts import make_task
from train.text_rows import Row
from train.text_tasks import TASKS, Example, Task
from train.text_tasks.tokens import frame, ids_of
from train.text_template import MASK


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt or a row as the model takes it. example: the ids, and what reads an answer off them."""

    source: str
    row: dict[str, Any]
    example: Example


class TextModel:
    """A transformers model of one task's class, on its device, in one precision; adapters come and go by name.

    Args:
        asked: the task and what is known of it (see `generate_task`).
        seed: for a head that neither model nor adapter holds.

    Raises:
        ModelNotFoundError, ConfigError: the model cannot be loaded, or has no such task.
    """

    def __init__(
        self, asked: Asked, *, revision: str | None = None, device: str = "auto", mixed_precision: str = "auto",
        quantize: str | None = None, attention: str | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        name = asked.settings.pretrained_model_name_or_path
        self.device = resolve_device(device)
        self.precision = PRECISIONS[resolve_precision(mixed_precision, self.device)]
        self.architecture, self.tokenizer = load_config(name, revision), load_tokenizer(name, revision)
        task_class = TASKS[asked.task][1]
        self.model, _ = load_text_model(
            name, task_class.model_class, self._model_settings(asked), seed=seed, precision=self.precision,
            device=self.device, revision=revision, quantize=quantize, attention=attention,
        )  # fmt: skip

    def task(self, asked: Asked, rows: Sequence[Row], adapter: str | None = None) -> Task:
        """The task for these rows. adapter: whose virtual tokens stand in its template."""
        settings = asked.settings
        if asked.labels is not None:
            settings = dataclasses.replace(settings, labels=None)
        ids: dict[str, Sequence[int]] = {}
        if settings.prompt_template is not None:
            if adapter is None:
                raise ConfigError("the template has virtual tokens, which only the adapter knows")
            ids["p_tuning"] = ld.prompt_ids(self.model, adapter)
        task = make_task(settings, self.tokenizer, self.architecture, rows, ids)
        if asked.labels is not None:
            _give_labels(task, asked.labels)
        return task

    def questions(
        self, asked: Asked, given: Sequence[str | Row], adapter: str | None = None, *, bad: BadRows | None = None,
        template: bool = True, chat: bool = False,
    ) -> tuple[Task, list[Question]]:  # fmt: skip
        """Prompts (texts) or rows as the model takes them, and the task that they belong to.

        Args:
            adapter: whose virtual tokens come into them; None for those of none.
            bad: what happens to rows that cannot be used; they are counted there.
            template: put prompts where the texts stood in training. chat: into the model's own chat format.

        Raises:
            ConfigError, DatasetError: a prompt or row that cannot be used.
        """
        bad = bad or BadRows()
        as_it_is = [one for one in given if isinstance(one, str) and self._whole(asked, one, template, chat)]
        if as_it_is and len(as_it_is) < len(given):
            raise ConfigError("some of the prompts have a {mask} and some have none; ask for them apart")
        if as_it_is:
            return self._as_they_are(asked, as_it_is, adapter, chat)
        rows = [row_of(asked, one) if isinstance(one, str) else one for one in given]
        full = answerable(asked, rows)
        task = self.task(asked, full, adapter)
        examples = task.prepare(full, bad, training=False)
        front = self.front_ids(adapter) if asked.task not in WRITING else []
        texts = {row.source: one for row, one in zip(rows, given)}
        shown: dict[str, dict[str, Any]] = {
            source: {"prompt": one} if isinstance(one, str) else dict(one) for source, one in texts.items()
        }
        return task, [Question(one.source, shown[one.source], one) for one in in_front(examples, front, task)]

    def front_ids(self, adapter: str | None) -> list[int]:
        """The virtual tokens that an adapter puts in front of everything."""
        state = state_of(self.model)
        if adapter is None or state is None:
            return []
        pieces = [one for one in prompts_in(state, [adapter]) if getattr(one.config, "template", None) is None]
        return [number for piece in pieces for number in piece.ids]

    def has_virtual_tokens(self, adapter: str) -> bool:
        state = state_of(self.model)
        return state is not None and bool(prompts_in(state, [adapter]))

    def write(
        self, task: Task, question: Question, drawing: Drawing, on_piece: OnPiece | None = None,
        should_stop: Stop | None = None,
    ) -> str:  # fmt: skip
        """What the model writes on from a question, with the adapters that are active."""
        example = dataclasses.replace(question.example, inputs={"input_ids": self._prompt(task, question.example)})
        with self.computing():
            return write(self.model, self.tokenizer, example.inputs["input_ids"], drawing, on_piece, should_stop)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within it, a half-precision base computes together with what is learned beside it in fp32."""
        half = self.precision != torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, dtype=self.precision, enabled=half):
            yield

    def base_question(self, question: Question) -> Question:
        """A question without virtual tokens, as the base alone is asked it."""
        size = int(self.model.get_input_embeddings().num_embeddings)
        kept = [place for place, token in enumerate(question.example.inputs["input_ids"]) if token < size]
        inputs = {name: [values[place] for place in kept] for name, values in question.example.inputs.items()}
        labels = question.example.labels
        if isinstance(labels, list) and len(labels) == question.example.length:
            labels = [labels[place] for place in kept]
        example = dataclasses.replace(question.example, inputs=inputs, labels=labels)
        return dataclasses.replace(question, example=example)

    def _prompt(self, task: Task, example: Example) -> list[int]:
        ids = getattr(task, "prompt_ids", None)
        whole = example.labels is None  # a prompt that was taken as it is
        return list(example.inputs["input_ids"]) if whole or ids is None else list(ids(example))

    def _whole(self, asked: Asked, prompt: str, template: bool, chat: bool) -> bool:
        """Whether a prompt is the model's whole input, but for the special tokens around it."""
        if asked.task == "masked-lm":
            return f"{{{MASK}}}" in prompt or (self.tokenizer.mask_token or f"{{{MASK}}}") in prompt
        if asked.task not in WRITING:
            return False
        if chat or not template:
            return True
        return asked.settings.prompt_template is None and not prompt_columns(asked)

    def _as_they_are(
        self, asked: Asked, prompts: Sequence[str], adapter: str | None, chat: bool
    ) -> tuple[Task, list[Question]]:
        """Prompts between the special tokens that the tokenizer puts around a text."""
        settings = asked.settings
        sample = dataclasses.replace(
            settings, template=None, prompt_template=None, prompt_column=None, answer_column=None, label_column=None,
            text_column=None,
        )  # fmt: skip
        if asked.task == "masked-lm":
            sample = dataclasses.replace(sample, template="{x} {mask}")
        rows = [Row({"x": ".", "answer": ".", "prompt": ".", "completion": "."}, "a prompt")]
        task = self.task(dataclasses.replace(asked, settings=sample), rows, adapter)
        start, finish = frame(self.tokenizer)
        if asked.task == "causal-lm":
            finish = []
        front = self.front_ids(adapter) if asked.task not in WRITING else []
        questions = []
        for number, prompt in enumerate(prompts, start=1):
            source = f"prompt {number}"
            text = [] if chat else ids_of(self.tokenizer, self._text(asked, prompt))
            ids = self._chat_ids(prompt) if chat else [*start, *text, *finish] if text else []
            masks = ids.count(self.tokenizer.mask_token_id)
            if asked.task == "masked-lm" and masks != 1:
                raise ConfigError(f"{source} has {masks} masks; give one")
            if not ids:
                raise ConfigError(f"{source} has no tokens; write something")
            if len(ids) > task.max_length:
                raise ConfigError(f"{source} has {len(ids):,} tokens; the model takes {task.max_length:,}")
            inputs = {"input_ids": [*front, *ids]}
            labels = 0 if asked.task == "masked-lm" else None
            questions.append(Question(source, {"prompt": prompt}, Example(inputs, labels, None, 1, source)))
        return task, questions

    def _text(self, asked: Asked, prompt: str) -> str:
        """A tokenizer keeps the space before a word in the word: what is said next begins with it."""
        if asked.task != "masked-lm":
            return prompt.rstrip(" ") if asked.task == "causal-lm" else prompt
        mask = self.tokenizer.mask_token
        before, found, after = prompt.replace(f"{{{MASK}}}", mask).partition(mask)
        return f"{before.rstrip()}{found}{after}"

    def _chat_ids(self, prompt: str) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError("the model has no chat format of its own; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return ids_of(self.tokenizer, text)

    def _model_settings(self, asked: Asked) -> dict[str, Any]:
        if asked.task not in ("sequence-classification", "token-classification"):
            return {}
        columns = prompt_columns(asked) if asked.task == "sequence-classification" else []
        row = Row(dict.fromkeys(columns, "a") | {asked.settings.tokens_column: ["a"]}, "a row")
        return self.task(asked, answerable(asked, [row])).model_settings()


def _give_labels(task: Any, names: Sequence[str]) -> None:
    from train.text_tasks.labels import Labels

    task.labels = Labels(list(names))


__all__ = ["Drawing", "Question", "TextModel"]
