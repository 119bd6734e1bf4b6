"""Spans: where an answer begins and ends, in one window or several."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lora_diffusion as ld
from tests.train.text_models import FAMILIES, model, tokenizer
from train.text_bad_rows import BadRows
from train.text_data import evaluate
from train.text_rows import Row
from train.text_tasks.question_answering import QuestionAnswering, Span

CONTEXT = "The sky is blue. Anna lives in Paris, Tom lives in Rome. The dog of Tom sleeps in the garden."


def row(answer: str | None, *, repeat: int = 1, number: int = 1) -> Row:
    context = "The grass is green. " * (repeat - 1) + CONTEXT
    answers = (
        {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    )
    return Row(
        {"question": "Where does Anna live ?", "context": context, "answers": answers}, f"a.jsonl, line {number}"
    )


def read(task: QuestionAnswering, example: Any) -> str:
    """The text between the labelled tokens."""
    start, end = example.labels
    offsets = example.reference.offsets
    return example.reference.context[offsets[start][0] : offsets[end][1]].strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_point_at_the_answer(family: str) -> None:
    task = QuestionAnswering(tokenizer(family), max_length=128, stride=16)
    for answer in ("Paris", "blue", "Anna lives in Paris", "the garden", "in Rome"):
        (example,) = task.prepare([row(answer)], BadRows())
        assert read(task, example) == answer
        assert "»" in task.preview(example)


@pytest.mark.parametrize("family", FAMILIES)
def test_long_contexts_have_windows(family: str) -> None:
    """Every character of the context is in a window, and the answer is labelled in those that hold all of it."""
    task = QuestionAnswering(tokenizer(family), max_length=40, stride=12)
    examples = task.prepare([row("Paris", repeat=8)], BadRows())
    assert len(examples) >= 3 and all(one.length <= 40 for one in examples)
    covered = {n for one in examples for span in one.reference.offsets if span for n in range(*span)}
    context = examples[0].reference.context
    assert {n for n, char in enumerate(context) if not char.isspace()} <= covered
    found = [one for one in examples if one.labels != (0, 0)]
    assert found and all(read(task, one) == "Paris" for one in found)
    begin = context.index("Paris")
    for one in examples:
        spans = [span for span in one.reference.offsets if span]
        holds = min(a for a, _ in spans) <= begin and max(b for _, b in spans) >= begin + 5
        assert (one.labels != (0, 0)) == holds


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "gpt2", "llama", "t5"])
def test_it_learns_to_point(family: str) -> None:
    task = QuestionAnswering(tokenizer(family), max_length=48, stride=12)
    examples = task.prepare([row("Paris", repeat=3), row("the garden", number=2)], BadRows())
    made = model(family, "ForQuestionAnswering")
    optimizer = torch.optim.AdamW(made.parameters(), lr=5e-3)
    before = evaluate(made, task, examples, batch_size=3)
    first = float(task.loss(made, task.collate(examples)).detach())
    for _ in range(12):
        loss = task.loss(made, task.collate(examples))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < first / 1.2
    assert set(before) == {"exact_match", "f1"} == set(evaluate(made, task, examples))


def test_the_loss_is_that_of_transformers_where_every_place_may_answer() -> None:
    task, made = QuestionAnswering(tokenizer("bert"), max_length=128), model("bert", "ForQuestionAnswering")
    batch = task.collate(task.prepare([row("Paris")], BadRows()))
    everywhere = {**batch, "places": torch.ones_like(batch["places"])}
    inputs = {name: value for name, value in batch.items() if name != "places"}
    torch.testing.assert_close(task.loss(made, everywhere), made(**inputs).loss)
    assert float(task.loss(made, batch).detach()) < float(task.loss(made, everywhere).detach())


def test_the_best_window_answers() -> None:
    task = QuestionAnswering(tokenizer("bert"), max_length=40, stride=12)
    examples = task.prepare([row("Paris", repeat=8)], BadRows())
    references = [one.reference for one in examples]
    right = next(n for n, one in enumerate(examples) if one.labels != (0, 0))
    start, end = examples[right].labels
    inside = next(n for n, span in enumerate(references[0].offsets) if span)
    spans = [Span(inside, inside, 1.0, 9.0) for _ in examples]
    spans[right] = Span(start, end, 2.0, -9.0)
    assert task.metrics(spans, references) == {"exact_match": 1.0, "f1": 1.0}
    spans[0] = Span(inside, inside, 3.0, 9.0)
    assert task.metrics(spans, references)["exact_match"] == 0.0


def test_no_answer_is_said_only_where_some_row_has_none() -> None:
    task = QuestionAnswering(tokenizer("bert"), max_length=128)
    examples = task.prepare([row("Paris"), row(None, number=2)], BadRows())
    assert examples[1].labels == (0, 0)
    references = [one.reference for one in examples]
    start, end = examples[0].labels
    spans = [Span(start, end, 2.0, 1.0), Span(start, end, 2.0, 3.0)]
    assert task.answers(spans, references) == {0: "Paris", 1: ""}
    assert task.metrics(spans, references)["exact_match"] == 1.0
    assert task.answers([Span(start, end, 2.0, 3.0)], references[:1]) == {0: "Paris"}


def test_the_likeliest_span_is_ordered_and_short() -> None:
    task = QuestionAnswering(tokenizer("bert"), max_answer_length=2)
    starts, ends = torch.full((8,), -5.0), torch.full((8,), -5.0)
    starts[5], ends[2], ends[7], starts[1] = 9.0, 9.0, 8.0, 1.0
    best = task._best(starts, ends)
    assert (best.start, best.end, best.score) == (1, 2, 10.0)


def test_one_answer_in_columns_of_its_own() -> None:
    data = Row({"question": "Where ?", "context": CONTEXT, "answer": "Rome", "answer_start": "51"}, "a.csv, line 2")
    task = QuestionAnswering(tokenizer("bert"), max_length=128)
    assert CONTEXT.index("Rome") == 51
    assert read(task, task.prepare([data], BadRows())[0]) == "Rome"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answers": {"text": ["Paris"], "answer_start": [3]}}, "an answer that is not in the context where it says"),
        ({"answers": {"text": ["Paris"], "answer_start": [-1]}}, "an answer that is not in the context where it says"),
        ({"answers": {"text": ["Paris"]}}, "no answers that can be read"),
        ({"answers": "Paris"}, "no answers that can be read"),
        ({"context": ""}, "has nothing in 'context'"),
        ({"question": None}, "has nothing in 'question'"),
        ({"question": "Where " * 60}, "a question that leaves no room in 48 tokens"),
    ],
)
def test_bad_rows(change: dict[str, Any], words: str) -> None:
    task = QuestionAnswering(tokenizer("bert"), max_length=48, stride=8)
    bad_row = Row({**row("Paris"), **change}, "a.jsonl, line 2")
    with pytest.raises(ld.DatasetError) as caught:
        task.prepare([row("Paris"), bad_row], BadRows())
    assert "a.jsonl, line 2: the row has" in str(caught.value) and words in str(caught.value)
    bad = BadRows("skip")
    assert task.prepare([row("Paris"), bad_row], bad) and bad.total == 1


def test_bad_settings() -> None:
    with pytest.raises(ld.ConfigError, match="stride=384"):
        QuestionAnswering(tokenizer("bert"), stride=384)
    with pytest.raises(ld.ConfigError, match="max_answer_length=0"):
        QuestionAnswering(tokenizer("bert"), max_answer_length=0)
