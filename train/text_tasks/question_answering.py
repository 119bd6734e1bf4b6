"""Extractive question answering: where in a context the answer begins and ends (SQuAD)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy

from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable
from train.text_bad_rows import BadRows
from train.text_metrics import exact_match, token_f1
from train.text_rows import Row
from train.text_tasks.task import Batch, Example, Task, shown
from train.text_tasks.tokens import ids_of, model_inputs, padded
from train.text_template import check_columns, text_of

MOST_STARTS = 20  # of the likeliest starts and ends that are combined
_OWN = ("start_positions", "end_positions", "places")


@dataclass(frozen=True)
class Window:
    """One window of a context, for reading an answer off it.

    row: the number of the row; a long context has several windows. offsets: for each token the characters of the
    context that it covers, None outside of it. answers: all that count as right, none where there is no answer.
    """

    row: int
    context: str
    offsets: tuple[tuple[int, int] | None, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Span:
    """The likeliest tokens of an answer in one window. score: the sum of their two logits; none: that of no answer."""

    start: int
    end: int
    score: float
    none: float


class QuestionAnswering(Task):
    """Rows hold a question, a context, and either SQuAD's `answers` ({"text": […], "answer_start": […]}) or one answer
    in the columns `answer` and `answer_start`. No answer is an answer too, at the first token (SQuAD 2).

    Contexts that do not fit are read in windows that overlap by `stride` tokens; nothing is cut off.

    Args:
        stride: None: a third of max_length, at most 128.
        max_answer_length: in tokens.
    """

    name: ClassVar[str] = "question-answering"
    model_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    task_type: ClassVar[str | None] = "QUESTION_ANS"

    def __init__(
        self,
        tokenizer: Any,
        *,
        question_column: str = "question",
        context_column: str = "context",
        answers_column: str = "answers",
        stride: int | None = None,
        max_answer_length: int = 30,
        max_length: int = 384,
        too_long: str = "error",
    ) -> None:
        super().__init__(tokenizer, max_length=max_length, too_long=too_long)
        stride = min(128, max_length // 3) if stride is None else stride
        if not 0 <= stride < max_length:
            raise ConfigError(f"stride={stride}: give a number of tokens from 0 to below max_length={max_length}")
        if max_answer_length < 1:
            raise ConfigError(f"max_answer_length={max_answer_length}: give a number of tokens from 1")
        self.question_column, self.context_column, self.answers_column = question_column, context_column, answers_column
        self.stride, self.max_answer_length = stride, max_answer_length
        self._special = tokenizer.num_special_tokens_to_add(pair=True)

    def prepare(self, rows: Sequence[Row], bad: BadRows, *, training: bool = True) -> list[Example]:
        """Several examples for a row whose context is long."""
        nested = any(self.answers_column in row for row in rows)
        check_columns([self.question_column, self.context_column, self.answers_column if nested else "answer"], rows)
        examples: list[Example] = []
        for number, row in enumerate(rows):
            examples += self._windows(number, row, bad)
        return self._left(examples, bad)

    def _windows(self, number: int, row: Row, bad: BadRows) -> Iterator[Example]:
        question, context = text_of(row.get(self.question_column)), text_of(row.get(self.context_column))
        if not question or not context:
            lacking = self.question_column if not question else self.context_column
            bad.report(row.source, f"has nothing in {lacking!a}", "fill it in")
            return
        answers = self._answers(row, context, bad)
        if answers is None:
            return
        room = self.max_length - len(ids_of(self.tokenizer, question.strip())) - self._special
        if room < 2:
            bad.report(row.source, f"has a question that leaves no room in {self.max_length:,} tokens",
                       "raise max_length or shorten the question")  # fmt: skip
            return
        found = self.tokenizer(
            question.strip(), context, truncation="only_second", max_length=self.max_length,
            stride=min(self.stride, room // 2), return_overflowing_tokens=True, return_offsets_mapping=True,
            verbose=False,
        )  # fmt: skip
        names = [name for name in found if name in ("input_ids", "token_type_ids")]
        texts = tuple(text for text, _ in answers)
        for place in range(len(found["input_ids"])):
            belongs = found.sequence_ids(place)
            offsets = tuple(
                (int(span[0]), int(span[1])) if owner == 1 and span[1] > span[0] else None
                for span, owner in zip(found["offset_mapping"][place], belongs)
            )
            labels = _tokens_of(answers[0], offsets) if answers else (0, 0)
            inputs = {name: list(found[name][place]) for name in names}
            yield Example(inputs, labels, Window(number, context, offsets, texts), 1, row.source)

    def _answers(self, row: Row, context: str, bad: BadRows) -> list[tuple[str, int]] | None:
        """The answers with the character at which each begins; None: the row is bad."""
        given = row.get(self.answers_column)
        if isinstance(given, dict):
            texts, starts = given.get("text"), given.get("answer_start")
        elif self.answers_column in row:
            texts = starts = None
        else:
            one = text_of(row.get("answer"))
            texts, starts = ([one], [row.get("answer_start")]) if one else ([], [])
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            bad.report(row.source, "has no answers that can be read", 'give {"text": […], "answer_start": […]}')
            return None
        answers = []
        for text, start in zip(texts, starts):
            place = _whole_number(start)
            if not isinstance(text, str) or not text.strip() or place is None or not context.startswith(text, place):
                bad.report(row.source, "has an answer that is not in the context where it says",
                           "correct the answer or its answer_start", f"{printable(str(text), 60)!a} at "
                           f"{printable(str(start), 20)!a}")  # fmt: skip
                return None
            answers.append((text, place))
        return answers

    def collate(self, examples: Sequence[Example], *, multiple: int = 1) -> Batch:
        """The inputs, and places: 1 where an answer may be (the context and the first token), (rows, length) each;
        start_positions, end_positions (rows,)."""
        batch = model_inputs([dict(one.inputs) for one in examples], self.tokenizer, multiple=multiple)
        places = [
            [int(place == 0 or span is not None) for place, span in enumerate(one.reference.offsets)]
            for one in examples
        ]  # fmt: skip
        batch["places"] = padded(places, 0, multiple=multiple)
        batch["start_positions"] = torch.tensor([one.labels[0] for one in examples])
        batch["end_positions"] = torch.tensor([one.labels[1] for one in examples])
        return batch

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The mean of the two cross-entropies over places where an answer may be."""
        starts, ends = self._logits(model, batch)
        return (cross_entropy(starts, batch["start_positions"]) + cross_entropy(ends, batch["end_positions"])) / 2

    def predict(self, model: Any, batch: Batch) -> list[Span]:
        starts, ends = self._logits(model, batch)
        return [self._best(start, end) for start, end in zip(starts.cpu(), ends.cpu())]

    def _best(self, starts: torch.Tensor, ends: torch.Tensor) -> Span:
        none = float(starts[0] + ends[0])
        count = min(MOST_STARTS, len(starts) - 1)
        first, last = (starts[1:].topk(count).indices + 1)[:, None], (ends[1:].topk(count).indices + 1)[None, :]
        score = starts[first] + ends[last]
        score[(last < first) | (last - first >= self.max_answer_length)] = -torch.inf
        best = int(score.argmax())
        start, end = int(first[best // count, 0]), int(last[0, best % count])
        return Span(start, end, float(score.flatten()[best]), none)

    def metrics(self, predictions: Sequence[Span], references: Sequence[Window]) -> dict[str, float]:
        """exact_match and f1 over rows, as in SQuAD's own script (from 0 to 1)."""
        texts = self.answers(predictions, references)
        right = {window.row: window.answers for window in references}
        return {
            "exact_match": sum(exact_match(text, right[row]) for row, text in texts.items()) / max(len(texts), 1),
            "f1": sum(token_f1(text, right[row]) for row, text in texts.items()) / max(len(texts), 1),
        }

    @staticmethod
    def answers(predictions: Sequence[Span], references: Sequence[Window]) -> dict[int, str]:
        """The best answer for each row over its windows. "" where no answer is likelier, and only if some row has
        none."""
        may_be_silent = any(not window.answers for window in references)
        best: dict[int, tuple[float, str]] = {}
        none: dict[int, float] = {}
        for span, window in zip(predictions, references):
            none[window.row] = min(none.get(window.row, float("inf")), span.none)
            first, last = window.offsets[span.start], window.offsets[span.end]
            text = window.context[first[0] : last[1]] if first and last else ""
            if window.row not in best or span.score > best[window.row][0]:
                best[window.row] = (span.score, text)
        return {row: "" if may_be_silent and none[row] > score else text for row, (score, text) in best.items()}

    @property
    def best_by(self) -> str:
        return "f1"

    def preview(self, example: Example) -> str:
        """The window with the answer's tokens between « and »."""
        start, end = example.labels
        counted = set(range(start, end + 1))
        return shown(self.tokenizer, example.inputs["input_ids"], counted)

    @staticmethod
    def _logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of starts and of ends, (rows, length) fp32, -inf where no answer may be."""
        output = model(**{name: value for name, value in batch.items() if name not in _OWN})
        closed = batch["places"] == 0
        starts = output.start_logits.float().masked_fill(closed, -torch.inf)
        return starts, output.end_logits.float().masked_fill(closed, -torch.inf)


def _tokens_of(answer: tuple[str, int], offsets: Sequence[tuple[int, int] | None]) -> tuple[int, int]:
    """The first and the last token of an answer; (0, 0) where it is not wholly in the window."""
    text, begin = answer
    stop = begin + len(text)
    inside = [place for place, span in enumerate(offsets) if span is not None and span[0] < stop and span[1] > begin]
    if not inside:
        return 0, 0
    first, last = offsets[inside[0]], offsets[inside[-1]]
    assert first is not None and last is not None
    # A token may cover the space before the answer, or begin within it where the window does.
    whole = first[0] <= begin + len(text) - len(text.lstrip()) and last[1] >= begin + len(text.rstrip())
    return (inside[0], inside[-1]) if whole else (0, 0)


def _whole_number(value: Any) -> int | None:
    try:
        number = int(value)
    except (TypeError, ValueError):
        return None
    return number if number >= 0 else None
