"""Asking a language model with any number of adapters: to write on, or, with a head or a mask, to say what it sees.

    lora-diffusion generate --model pocket-gpt --adapter runs/x/adapter.safetensors:0.8 --prompt "…" --temperature 0.8

The same from Python:

    from train.generate import generate
    from train.generate_config import GenerateConfig

    [text] = generate(GenerateConfig("pocket-gpt", prompt=("anna lives in",)))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lora_diffusion as ld
from lora_diffusion.errors import ConfigError, DatasetError
from train.checkpoints import replace_file
from train.generate_config import WITH_HEAD, WRITING, GenerateConfig, validate
from train.generate_model import Drawing, Question, TextModel
from train.generate_predict import predict
from train.generate_task import Asked, asked_of
from train.record import OnEvent
from train.sample import Wanted, parse_adapter
from train.text_bad_rows import BadRows
from train.text_models import check_task, load_config
from train.text_rows import Row, read_rows
from train.text_tasks import TASKS, Task


@dataclass(frozen=True)
class Answer:
    """What the model said.

    text: in words. row: what was asked, {"prompt": …} or the row. found: more about it, JSON values by name (see
    `generate_predict`). base: the text of the model without adapters, where that was asked for.
    """

    text: str
    row: dict[str, Any]
    found: dict[str, Any] = field(default_factory=dict)
    base: str | None = None

    def record(self) -> dict[str, Any]:
        """One JSON line: the row, "prediction", what else was found, and "base"."""
        more = {name: value for name, value in self.found.items() if name not in self.row}
        return {**self.row, "prediction": self.text, **more, **({} if self.base is None else {"base": self.base})}


def generate(
    config: GenerateConfig,
    *,
    on_event: OnEvent | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[str]:
    """The texts of `answers`."""
    return [one.text for one in answers(config, on_event=on_event, should_stop=should_stop)]


def answers(
    config: GenerateConfig,
    *,
    on_event: OnEvent | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Answer]:
    """One answer for each prompt or row, in their order.

    Args:
        on_event: told of `start`; of every `piece` of a text that is being written ("base": whether without adapters);
            of every `answer`; of `warning`s; of the `end`.
        should_stop: asked after every token and every batch; True ends with what there is.

    Raises:
        ConfigError, DatasetError, AdapterFormatError, AdapterMismatchError, ModelNotFoundError: what was asked for
            cannot be used.
    """
    emit, stopped = on_event or (lambda event: None), should_stop or (lambda: False)
    validate(config)
    wanted = [parse_adapter(text) for text in config.adapter]
    read = [ld.read_adapter(one.file) for one in wanted]  # a wrong file shows itself before the model is loaded
    bad = BadRows(config.on_bad)
    given = _given(config, bad)
    architecture = load_config(config.model, config.revision)
    asked = asked_of(read[0] if read else None, config.model, architecture, config.task, config.labels)
    check_task(TASKS[asked.task][1].model_class, architecture, asked.task)
    _check(config, asked)
    text_model = TextModel(
        asked, revision=config.revision, device=config.device, mixed_precision=config.mixed_precision,
        quantize=config.quantize, attention=config.attn_implementation, seed=config.seed,
    )  # fmt: skip
    first = load_adapters(text_model, wanted, read)
    if asked.guessed:
        emit({"event": "warning", "message": "the adapter's file does not name its labels: they are numbered in the "
                                             "order that training gave them; --labels names them"})  # fmt: skip
    task, questions = text_model.questions(asked, given, first, bad=bad, template=config.template, chat=config.chat)
    for said in bad.summary():
        emit({"event": "warning", "message": said})
    emit({"event": "start", "recipe": "generate", "model": config.model, "task": asked.task,
          "questions": len({one.source for one in questions}), "device": str(text_model.device)})  # fmt: skip
    ask = _written if asked.task in WRITING else _predicted
    found: list[Answer] = []

    def keep(answer: Answer) -> None:
        emit({"event": "answer", "index": len(found), **answer.record()})
        found.append(answer)

    ask(config, text_model, task, questions, emit, stopped, keep)
    if config.output_file is not None:
        save_answers(config.output_file, found)
    emit({"event": "end", "recipe": "generate", "answers": len(found), "stopped": stopped()})
    return found


def load_adapters(text_model: TextModel, wanted: Sequence[Wanted], read: Sequence[ld.Adapter]) -> str | None:
    """Put adapters into a model and switch all on, each with its weight; the name of the first.

    Raises ConfigError for several with virtual tokens: their places in a row would depend on each other.
    """
    names = [f"adapter_{number}" for number in range(len(wanted))]
    for name, adapter in zip(names, read):
        ld.load_adapter(text_model.model, adapter, name)
    for name in names[1:]:
        if text_model.has_virtual_tokens(name):
            raise ConfigError("virtual tokens can come from the first --adapter only; put it first, and give no other")
    if names:
        ld.set_adapters(text_model.model, names, [one.weight for one in wanted])
    return names[0] if names else None


def save_answers(file: str, found: Sequence[Answer]) -> None:
    """Write JSON lines, complete or not at all. Raises DatasetError where that is impossible."""
    lines = "".join(json.dumps(one.record(), ensure_ascii=False) + "\n" for one in found)
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(file), lambda path: _put(path, lines))
    except OSError as problem:
        raise DatasetError(f"{file} cannot be written: {problem.strerror or problem}") from problem


def _put(path: Path, lines: str) -> None:
    path.write_text(lines, encoding="utf-8")


def _given(config: GenerateConfig, bad: BadRows) -> list[str | Row]:
    if config.input_file is not None:
        return list(read_rows(config.input_file, bad))
    prompts = list(config.prompt)
    if config.prompts_file is not None:
        prompts += _lines(config.prompts_file)
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ConfigError(f"prompt {number} is empty; write something")
    return list(prompts)


def _lines(file: str) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise DatasetError(f"--prompts_file {file} cannot be read: {' '.join(str(problem).split())}") from problem
    found = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not found:
        raise DatasetError(f"--prompts_file {file} holds no prompt; write one a line")
    return found


def _check(config: GenerateConfig, asked: Asked) -> None:
    """Raises ConfigError for settings that the task has no use for."""
    if asked.task in WITH_HEAD and config.compare:
        raise ConfigError(f"--compare: the base model has no head for {asked.task} to compare with")
    if asked.task not in WRITING:
        plain = GenerateConfig(config.model)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "chat"):
            if getattr(config, name) != getattr(plain, name):
                raise ConfigError(f"--{name} is for models that write; {asked.task} judges")


Ask = Callable[[Answer], None]


def _written(
    config: GenerateConfig, text_model: TextModel, task: Task, questions: Sequence[Question], emit: OnEvent,
    stopped: Callable[[], bool], keep: Ask,
) -> None:  # fmt: skip
    drawing = Drawing(config.max_new_tokens, config.temperature, config.top_k, config.top_p,
                      config.repetition_penalty, config.num_beams, config.seed)  # fmt: skip
    for index, question in enumerate(questions):
        if stopped():
            return
        texts = {}
        for base in (True, False) if config.compare else (False,):
            emit({"event": "writing", "index": index, "base": base, "of": len(questions), **question.row})

            def said(piece: str, index: int = index, base: bool = base) -> None:
                emit({"event": "piece", "index": index, "base": base, "text": piece})

            with ld.disable_adapters(text_model.model) if base else nullcontext():
                one = text_model.base_question(question) if base else question
                texts[base] = text_model.write(task, one, drawing, said, stopped)
        keep(Answer(texts[False], question.row, base=texts.get(True)))


def _predicted(
    config: GenerateConfig, text_model: TextModel, task: Task, questions: Sequence[Question], emit: OnEvent,
    stopped: Callable[[], bool], keep: Ask,
) -> None:  # fmt: skip
    rows = list({one.source: one.row for one in questions}.values())
    base: list[str] = []
    if config.compare:
        with ld.disable_adapters(text_model.model):
            bare = [text_model.base_question(one) for one in questions]
            base = [one["text"] for one in predict(text_model, task, bare, config.batch_size)]
    for index, found in enumerate(predict(text_model, task, questions, config.batch_size)):
        if stopped():
            return
        text = found.pop("text")
        keep(Answer(text, rows[index], found, base[index] if base else None))
