"""What an adapter file says of its task, so that it can be asked later: the columns of its rows, its labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.text_tasks.labels import MAX_LABELS, Labels
from train.text_tasks.task import Task
from train.text_template import MASK, TextTemplate, parse

LONGEST = 500  # characters of a label or a column's name


def task_facts(task: Task) -> dict[str, Any]:
    """JSON values for the adapter's metadata, of a task that has seen the rows to train on.

    columns: those that no row can be without, but for the answer's.
    """
    facts: dict[str, Any] = {}
    labels = getattr(task, "labels", None)
    if isinstance(labels, Labels):
        facts["labels"] = list(labels.names)
    template, virtual = getattr(task, "template", None), getattr(task, "virtual", None)
    if virtual is not None:
        facts["columns"] = virtual.columns
    elif isinstance(template, TextTemplate):
        prompt = template.prompt if template.prompt_without is None else template.prompt_without
        names = [name for text in (prompt, template.second or "") for _, name in parse(text)]
        facts["columns"] = list(dict.fromkeys(name for name in names if name is not None and name != MASK))
    return facts


def labels_in(metadata: Mapping[str, Any]) -> list[str] | None:
    """The labels that a file's metadata name, if they can be used as such."""
    return _texts(metadata.get("labels"))


def columns_in(metadata: Mapping[str, Any]) -> list[str] | None:
    """The columns that a file's metadata name, if they can be used as such."""
    return _texts(metadata.get("columns"))


def _texts(value: Any) -> list[str] | None:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_LABELS:
        return None
    fine = all(isinstance(one, str) and one.strip() and len(one) <= LONGEST for one in value)
    return list(value) if fine and len(set(value)) == len(value) else None
