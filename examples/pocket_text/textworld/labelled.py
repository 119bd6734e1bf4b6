"""The labelled data of the pocket tasks: rows of train, validation and test, no text in two of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

from .entities import tagged
from .facts import FACTS, PEOPLE
from .inference import pair
from .opinions import review, topical
from .passages import passage
from .restaurants import attributes, listed, sentence

Row = dict[str, object]

SIZES = {
    "sentiment": (1200, 300, 600), "topic": (1200, 300, 600), "entailment": (1500, 300, 600), "tags": (800, 200, 300),
    "qa": (600, 150, 250), "describe": (600, 150, 300),
}  # fmt: skip
"""Rows of train, validation and test."""

FACT_RELATIONS = ("lives_in", "born_in", "works_as")
FACT_SPLIT = (320, 80, 240)  # subjects


def _sentiment(rng: random.Random) -> tuple[str, Row]:
    text, label = review(rng)
    return text, {"text": text, "label": label}


def _topic(rng: random.Random) -> tuple[str, Row]:
    text, label = topical(rng)
    return text, {"text": text, "label": label}


def _entailment(rng: random.Random) -> tuple[str, Row]:
    premise, hypothesis, label = pair(rng)
    return f"{premise} {hypothesis}", {"premise": premise, "hypothesis": hypothesis, "label": label}


def _tags(rng: random.Random) -> tuple[str, Row]:
    words = tagged(rng)
    tokens = [w for w, _ in words]
    return " ".join(tokens), {"tokens": tokens, "tags": [t for _, t in words]}


def _qa(rng: random.Random) -> tuple[str, Row]:
    context, question, answer, start = passage(rng)
    return f"{context} {question}", {
        "context": context, "question": question, "answer": answer,
        "answers": {"text": [answer], "answer_start": [start]},
    }  # fmt: skip


def _describe(rng: random.Random) -> tuple[str, Row]:
    found = attributes(rng)
    return listed(found), {"attributes": listed(found), "text": sentence(found, rng)}


_MAKERS: dict[str, Callable[[random.Random], tuple[str, Row]]] = {
    "sentiment": _sentiment, "topic": _topic, "entailment": _entailment, "tags": _tags, "qa": _qa,
    "describe": _describe,
}  # fmt: skip


@cache
def _draw(task: str) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """All rows of a task and their keys, in one order, no key twice."""
    rng = random.Random(f"labelled {task}")
    rows: dict[str, Row] = {}
    while len(rows) < sum(SIZES[task]):
        key, row = _MAKERS[task](rng)
        rows.setdefault(key, row)
    return tuple(rows), tuple(rows.values())


def splits(task: str) -> dict[str, list[Row]]:
    """{"train": rows, "validation": rows, "test": rows} of a task; `facts` are split by subject."""
    if task == "facts":
        order = list(PEOPLE)
        random.Random("labelled facts").shuffle(order)
        parts = _cut(order, FACT_SPLIT)
        by_subject = {name: {f.subject: f.answer for f in FACTS[name]} for name in FACT_RELATIONS}
        return {
            split: [
                {"subject": s, "relation": name, "answer": by_subject[name][s]} for name in FACT_RELATIONS for s in part
            ]
            for split, part in parts.items()
        }
    return _cut(list(_draw(task)[1]), SIZES[task])


def held_out() -> frozenset[str]:
    """The keys of every validation and test row (facts apart: they are what the models must know)."""
    return frozenset(key for task, sizes in SIZES.items() for key in _draw(task)[0][sizes[0] :])


def _cut(rows: list, sizes: tuple[int, int, int]) -> dict[str, list]:
    a, b, c = sizes
    return {"train": rows[:a], "validation": rows[a : a + b], "test": rows[a + b : a + b + c]}
