"""Language models on the page: to write on from a prompt, or to judge it, with adapters and beside the base.

One lock, as for pictures: requests take turns, and what was active is inactive after each. Models stay in memory, each
with the adapters that were asked for last.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.web.adapter_names import AdapterNames
from app.web.library import Library
from app.web.limits import Limits
from app.web.pictures import WAIT, Stopped
from app.web.places import Workspace
from app.web.prompt_syntax import MAX_TAGS, Weight, check_weight
from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable
from train.config import check
from train.generate_config import WITH_HEAD, WRITING, GenerateConfig, check_drawing
from train.text_task_names import TASK_TYPES

OnPiece = Callable[[str], None]
Stop = Callable[[], bool]
MODELS_KEPT, ADAPTERS_KEPT = 2, 8
MAX_FIELDS = 16
MOST_DRAWN = 2**31  # a seed that is chosen lies below: short enough to be read out


@dataclass(frozen=True)
class TextRequest:
    """What to ask.

    Attributes:
        model: "pocket-gpt", "pocket-bert", a folder, or a hub id.
        prompt: a text to go on from, to fill ("{mask}") or to judge.
        adapters: names from the library, each with its weight; the first says what the task is.
        fields: a row instead of a prompt, for adapters that were trained on several columns: {"question": …}.
        task: None: what the first adapter was trained for, else what the model can.
        labels: in their order, where the adapter does not say them.
        template: put the prompt where the texts stood in training.
        chat: put it into the model's own chat format.
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, num_beams: as of `lora-diffusion generate`.
        seed: None draws one, which the answer tells.
    """

    model: str
    prompt: str = ""
    adapters: Sequence[tuple[str, Weight]] = ()
    fields: Mapping[str, str] | None = None
    task: str | None = None
    labels: Sequence[str] | None = None
    template: bool = True
    chat: bool = False
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    seed: int | None = None


@dataclass(frozen=True)
class Said:
    """What came of a request.

    text: in words. found: more about it, JSON values (a label's "scores", "tags", the "words" at a mask).
    """

    text: str
    task: str
    seed: int
    found: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Texts:
    """Asks; may be called from several threads. Arguments as of `app.web.pictures.Pictures`."""

    def __init__(
        self, workspace: Workspace, limits: Limits, library: Library | None = None, *, device: str = "auto",
        models_kept: int = MODELS_KEPT, adapters_kept: int = ADAPTERS_KEPT,
    ) -> None:  # fmt: skip
        self.limits, self.names = limits, AdapterNames(workspace, limits, library)
        self._device, self._kept, self._adapters_kept = device, models_kept, adapters_kept
        self._models: OrderedDict[Any, _Model] = OrderedDict()
        self._lock = threading.Lock()

    def complete(
        self, request: TextRequest, owner: str | None = None, *, on_piece: OnPiece | None = None,
        should_stop: Stop | None = None,
    ) -> str:  # fmt: skip
        """The text of `ask`."""
        return self.ask(request, owner, on_piece=on_piece, should_stop=should_stop).text

    def ask(
        self, request: TextRequest, owner: str | None = None, *, on_piece: OnPiece | None = None,
        should_stop: Stop | None = None,
    ) -> Said:  # fmt: skip
        """What the model says.

        Args:
            owner: who asks; on a Space, whose adapters may be used.
            on_piece: told of every piece of a text that is being written.
            should_stop: asked after every token; True ends the text there.

        Raises:
            ConfigError: a setting beyond the limits, an adapter that is not there, or a prompt where a row is needed.
            AdapterMismatchError, AdapterFormatError, ModelNotFoundError: what was named cannot be used.
            Stopped: before its turn had come.
        """
        [said] = self._said(request, owner, (False,), lambda base, piece: (on_piece or _nobody)(piece), should_stop)
        return said

    def compare(
        self, request: TextRequest, owner: str | None = None, *, on_piece: Callable[[bool, str], None] | None = None,
        should_stop: Stop | None = None,
    ) -> tuple[str, str]:  # fmt: skip
        """What the base says, and what it says with the adapters, drawn from one seed. Raises as `ask`, and ConfigError
        where the base has no head for the task.

        on_piece: told whether it is the base that writes, and the piece.
        """
        base, adapted = self._said(request, owner, (True, False), on_piece or (lambda base, piece: None), should_stop)
        return base.text, adapted.text

    def _said(
        self, request: TextRequest, owner: str | None, ways: Sequence[bool], on_piece: Callable[[bool, str], None],
        should_stop: Stop | None,
    ) -> list[Said]:  # fmt: skip
        request = checked(request, self.limits)
        stopped = should_stop or (lambda: False)
        files = self.names.files(owner)
        found = [(self.names.find(name, owner, files), weight) for name, weight in request.adapters]
        if len({name for (name, _), _ in found}) < len(found):
            raise ConfigError("an adapter is chosen twice: give each once, with one weight")
        wanted = [(path, weight) for (_, path), weight in found]
        with self._turn(stopped):
            return self._ask(request, wanted, ways, on_piece, stopped)

    def _ask(
        self, request: TextRequest, wanted: Sequence[tuple[Path, Weight]], ways: Sequence[bool],
        on_piece: Callable[[bool, str], None], stopped: Stop,
    ) -> list[Said]:  # fmt: skip
        import lora_diffusion as ld
        from train.generate_model import Drawing
        from train.generate_predict import predict
        from train.generate_task import asked_of
        from train.text_models import check_task, load_config
        from train.text_rows import Row
        from train.text_tasks import TASKS

        read = [ld.read_adapter(path) for path, _ in wanted]
        architecture = load_config(request.model)
        labels = None if request.labels is None else ",".join(request.labels)
        asked = asked_of(read[0] if read else None, request.model, architecture, request.task, labels)
        check_task(TASKS[asked.task][1].model_class, architecture, asked.task)
        if True in ways and asked.task in WITH_HEAD:
            raise ConfigError(f"the base model has no head for {asked.task}, so there is nothing to compare with")
        if request.chat and asked.task not in WRITING:
            raise ConfigError(f"the chat format is for models that write; this adapter is for {asked.task}")
        notes = ["the adapter's file does not name its labels: they are numbered"] if asked.guessed else []
        drawing = Drawing(
            request.max_new_tokens, request.temperature, request.top_k, request.top_p, request.repetition_penalty,
            request.num_beams, request.seed or 0,
        )  # fmt: skip
        model = self._get(request.model, asked)
        given: str | Row = request.prompt if request.fields is None else Row(request.fields, "the row")
        said = []
        with model.active(wanted, read) as names:
            text_model, first = model.text_model, names[0] if names else None
            task, questions = text_model.questions(asked, [given], first, template=request.template, chat=request.chat)
            for base in ways:
                these = [text_model.base_question(one) if base else one for one in questions]
                with ld.disable_adapters(text_model.model) if base else nullcontext():
                    if asked.task in WRITING:
                        text = text_model.write(task, these[0], drawing, lambda p, b=base: on_piece(b, p), stopped)
                        found: dict[str, Any] = {}
                    else:
                        [found] = predict(text_model, task, these, 8)
                        text = found.pop("text")
                said.append(Said(text, asked.task, drawing.seed, found, notes))
        return said

    @contextmanager
    def _turn(self, stopped: Stop) -> Iterator[None]:
        """The lock, for which nobody waits who has wished to stop."""
        while not self._lock.acquire(timeout=WAIT):
            if stopped():
                raise Stopped("stopped")
        try:
            yield
        finally:
            self._lock.release()

    def _get(self, name: str, asked: Any) -> _Model:
        from train.generate_model import TextModel

        key = (name, asked.task, tuple(asked.labels or ()), asked.settings.regression)
        if key not in self._models:
            while len(self._models) >= self._kept:
                self._models.popitem(last=False)
            self._models[key] = _Model(TextModel(asked, device=self._device), self._adapters_kept)
        self._models.move_to_end(key)
        return self._models[key]


class _Model:
    """A model and its adapters, the least recently used of which goes first."""

    def __init__(self, text_model: Any, kept: int) -> None:
        self.text_model = text_model
        self._kept, self._count = kept, 0
        self._adapters: OrderedDict[str, tuple[tuple[int, int], str, int]] = OrderedDict()

    @contextmanager
    def active(self, wanted: Sequence[tuple[Path, Weight]], read: Sequence[Any]) -> Iterator[list[str]]:
        """Within it exactly these adapters act; gives their names in the model. After it none does."""
        import lora_diffusion as ld

        try:
            needed = {str(path) for path, _ in wanted}
            loaded: dict[Path, tuple[str, int]] = {}
            for path, adapter in sorted(zip((path for path, _ in wanted), read), key=lambda pair: pair[0]):
                loaded[path] = self._load(path, adapter, needed, max((n for _, n in loaded.values()), default=0))
            names = [loaded[path][0] for path, _ in wanted]
            if any(self.text_model.has_virtual_tokens(name) for name in names[1:]):
                raise ConfigError("virtual tokens can come from the first adapter only; put it first, and choose no "
                                  "other that has some")  # fmt: skip
            ld.set_adapters(self.text_model.model, names, [weight for _, weight in wanted])
            yield names
        finally:
            ld.set_adapters(self.text_model.model, [])

    def _load(self, path: Path, adapter: Any, needed: set[str], after: int) -> tuple[str, int]:
        """Name and number of the adapter, in the model after the one of that number: see `picture_adapters.Base`."""
        import lora_diffusion as ld

        model, status = self.text_model.model, path.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        known = self._adapters.get(str(path))
        if known is not None and known[0] == stamp and known[2] > after:
            self._adapters.move_to_end(str(path))
            return known[1], known[2]
        crowded = [one for one in self._adapters if one not in needed]
        gone = crowded[: max(0, len(self._adapters) - self._kept + 1)]
        for one in [*gone, *([str(path)] if known is not None else [])]:
            ld.delete_adapter(model, self._adapters.pop(one)[1])
        self._count += 1
        name = f"adapter_{self._count}"
        ld.load_adapter(model, adapter, name)
        ld.set_adapters(model, [])  # learned heads cannot act side by side, and loading one makes it act
        self._adapters[str(path)] = (stamp, name, self._count)
        return name, self._count


def checked(request: TextRequest, limits: Limits) -> TextRequest:
    """The request, if it is within the limits, its seed chosen.

    Raises:
        ConfigError: naming the first setting that cannot be used, its value and what can be.
    """
    _text("model", request.model, 200)
    if limits.models is not None and request.model not in limits.models:
        raise ConfigError(f"the model {printable(request.model, 60)!a} is not offered here; choose from "
                          f"{', '.join(limits.models)}")  # fmt: skip
    if request.fields is None:
        _text("prompt", request.prompt, limits.prompt)
    elif not isinstance(request.fields, Mapping) or not 1 <= len(request.fields) <= MAX_FIELDS:
        raise ConfigError(f"give 1 to {MAX_FIELDS} fields, each with its text")
    for name, value in (request.fields or {}).items():
        _text("field's name", name, 200)
        _text(f"field {printable(name, 40)!a}", value, limits.prompt)
    if request.task is not None and request.task not in TASK_TYPES:
        raise ConfigError(f"the task {printable(str(request.task), 40)!a} is none of {', '.join(TASK_TYPES)}")
    for label in request.labels or ():
        _text("label", label, 200)
    pairs = list(request.adapters) if isinstance(request.adapters, list | tuple) else [None]
    if len(pairs) > MAX_TAGS or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ConfigError(f"adapters: give at most {MAX_TAGS} names, each with its weight")
    adapters = []
    for name, weight in pairs:  # type: ignore[misc]
        _text("adapter's name", name, 200)
        adapters.append((name, check_weight(weight, name)))
    seed = secrets.randbelow(MOST_DRAWN) if request.seed is None else request.seed
    config = GenerateConfig(
        request.model, template=request.template, chat=request.chat, max_new_tokens=request.max_new_tokens,
        temperature=request.temperature, top_k=request.top_k, top_p=request.top_p,
        repetition_penalty=request.repetition_penalty, num_beams=request.num_beams, seed=seed,
    )  # fmt: skip
    try:
        check(config)
        check_drawing(request.temperature, request.top_k, request.top_p, request.num_beams)
    except ConfigError as problem:  # a page has no flags
        raise ConfigError(str(problem).replace("--", "")) from None
    if request.max_new_tokens > limits.new_tokens:
        raise ConfigError(f"max_new_tokens {request.max_new_tokens}: at most {limits.new_tokens:,} can be written here")
    return replace(request, adapters=adapters, seed=seed)


def _text(what: str, value: object, most: int) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"the {what} is no text")
    if not value.strip():
        raise ConfigError(f"the {what} is empty")
    if len(value) > most:
        raise ConfigError(f"the {what} has {len(value):,} characters; at most {most:,} can be used")
    if "\0" in value or any(0xD800 <= ord(char) <= 0xDFFF for char in value):
        raise ConfigError(f"the {what} holds characters that are no text")


def _nobody(piece: str) -> None:
    """Who listens where nobody does."""
