"""What a model with a head, or a masked one, says of a row: labels, tags, spans and words, as JSON values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from train.generate_model import Question, TextModel
from train.text_loss import answer_logits
from train.text_tasks import Task
from train.text_tasks.labels import Labels

WORDS = 5  # likeliest words at a mask
_OWN = ("labels", "positions", "targets")


def predict(model: TextModel, task: Task, questions: Sequence[Question], batch_size: int) -> Iterator[dict[str, Any]]:
    """One answer for each source among the questions, in their order; each has a "text" that says it in words."""
    if task.name == "question-answering":
        yield from _spans(model, task, questions, batch_size)
        return
    answer: Callable[..., Any] = {
        "sequence-classification": _labels,
        "token-classification": _tags,
        "masked-lm": _words,
    }[task.name]
    for start in range(0, len(questions), batch_size):
        part = list(questions[start : start + batch_size])
        with model.computing():
            yield from answer(model, task, part)


def _batch(model: TextModel, task: Task, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
    batch = task.collate([one.example for one in questions])
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _labels(model: TextModel, task: Any, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    """{"label", "score", "scores"}: the likeliest label and the probabilities; {"value"} of a regression."""
    for logits in task.predict(model.model, _batch(model, task, questions)):
        if task.regression:
            yield {"value": logits[0], "text": f"{logits[0]:.4g}"}
            continue
        shares = torch.tensor(logits, dtype=torch.double).softmax(dim=0).tolist()
        best = max(range(len(shares)), key=shares.__getitem__)
        names = _names(task.labels)
        found = {"label": names[best], "score": shares[best], "scores": dict(zip(names, shares))}
        yield {**found, "text": f"{names[best]} ({shares[best]:.1%})"}


def _tags(model: TextModel, task: Any, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    """{"words", "tags", "spans"}: a tag for each word, and, where tags are of the form B-PER, the words that belong
    together."""
    for question, tags in zip(questions, task.predict(model.model, _batch(model, task, questions))):
        words = question.row.get(task.tokens_column)
        if not isinstance(words, list):
            from train.generate_task import words_in

            words = words_in(str(question.row.get("prompt", words)), "prompt" in question.row)
        words = [str(word) for word in words[: len(tags)]]
        said = " ".join(f"{word}/{tag}" if tag != "O" else word for word, tag in zip(words, tags))
        yield {"words": words, "tags": tags, "spans": spans_of(words, tags), "text": said}


def spans_of(words: Sequence[str], tags: Sequence[str]) -> list[dict[str, Any]]:
    """[{"label": "PER", "text": "Anna Berg", "start": 0, "end": 2}, …] out of tags of the form B-PER, I-PER."""
    found: list[dict[str, Any]] = []
    for place, (word, tag) in enumerate(zip(words, tags)):
        kind, _, label = tag.partition("-")
        if kind not in ("B", "I") or not label:
            continue
        last = found[-1] if found else None
        if kind == "I" and last is not None and last["label"] == label and last["end"] == place:
            last["text"], last["end"] = f"{last['text']} {word}", place + 1
        else:
            found.append({"label": label, "text": word, "start": place, "end": place + 1})
    return found


def _words(model: TextModel, task: Any, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    """{"word", "score", "words"}: the likeliest at the mask, of the allowed; {"label"} too where labels have words."""
    batch = _batch(model, task, questions)
    given = {name: value for name, value in batch.items() if name not in _OWN}
    logits = answer_logits(model.model, given, batch["positions"]).float()[:, : len(task.tokenizer)]
    shares = logits.softmax(dim=-1)
    if task.allowed is not None:
        kept = torch.zeros(shares.shape[-1], dtype=torch.bool, device=shares.device)
        kept[torch.tensor(task.allowed, device=shares.device)] = True
        shares = shares.masked_fill(~kept, -1.0)
    top = shares.topk(min(WORDS, len(task.allowed) if task.allowed is not None else WORDS))
    for values, tokens in zip(top.values.tolist(), top.indices.tolist()):
        words = [task.tokenizer.decode([token]).strip() for token in tokens]
        found: dict[str, Any] = {"word": words[0], "score": values[0], "words": list(zip(words, values))}
        if task.words is not None:
            found["label"] = next(label for label, token in task.words.items() if token == tokens[0])
        yield {**found, "text": found.get("label", words[0])}


def _spans(model: TextModel, task: Any, questions: Sequence[Question], size: int) -> Iterator[dict[str, Any]]:
    """{"answer", "start", "score"}: the best span over a row's windows, and by how much it beats no answer."""
    best: dict[str, tuple[float, str, int, float]] = {}
    for start in range(0, len(questions), size):
        part = list(questions[start : start + size])
        with model.computing():
            found = task.predict(model.model, _batch(model, task, part))
        for question, span in zip(part, found):
            window = question.example.reference
            first, last = window.offsets[span.start], window.offsets[span.end]
            text, place = (window.context[first[0] : last[1]], first[0]) if first and last else ("", 0)
            known = best.get(question.source)
            none = span.none if known is None else min(known[3], span.none)
            if known is None or span.score > known[0]:
                best[question.source] = (span.score, text, place, none)
            else:
                best[question.source] = (*known[:3], none)
    for score, text, place, none in best.values():
        place += len(text) - len(text.lstrip())
        yield {"answer": text.strip(), "start": place, "score": score - none, "text": text.strip()}


def _names(labels: Labels | None) -> list[str]:
    assert labels is not None
    return labels.names
