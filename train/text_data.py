"""The data of a text run: files read, filled into the template, made into tokens, checked, and told of.

task = CausalLM(tokenizer, template=TextTemplate("{question}\\nAnswer: ", "{answer}"))
data = load("train.jsonl", task, on_bad="skip")
for line in data.remarks: …                        # what was left out or cut, by reason
for line in data.previews(): …                     # the first rows as the model sees them
batches = Batches(task, data.examples, batch_size=8, seed=0)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.text_bad_rows import BadRows
from train.text_batches import in_order
from train.text_rows import read_rows
from train.text_tasks.task import Example, Task


@dataclass(frozen=True)
class TextData:
    """The examples of one file or split.

    Attributes:
        name: of the file or the data set.
        rows: how many were read, the bad ones not among them.
        remarks: what the user should hear before training starts.
    """

    task: Task
    name: str
    examples: list[Example]
    rows: int
    remarks: list[str]

    def previews(self, count: int = 2) -> list[str]:
        """The first rows as the model will see them."""
        return [self.task.preview(example) for example in self.examples[:count]]

    @property
    def tokens(self) -> int:
        return sum(example.length for example in self.examples)

    @property
    def longest(self) -> int:
        """In tokens."""
        return max(example.length for example in self.examples)

    @property
    def fingerprint(self) -> str:
        """A hash over all tokens and labels, so that a resumed run can tell that its data is the same."""
        total = hashlib.sha256()
        for example in self.examples:
            total.update(json.dumps([dict(example.inputs), example.labels]).encode())
        return total.hexdigest()

    def describe(self) -> str:
        """One line: "train.jsonl: 1,000 examples, 64,012 tokens, the longest has 120"."""
        return f"{self.name}: {len(self.examples):,} examples, {self.tokens:,} tokens, the longest has {self.longest:,}"


def load(
    name: str | Path,
    task: Task,
    *,
    training: bool = True,
    on_bad: str = "error",
    split: str = "train",
    subset: str | None = None,
    separator: str | None = None,
    columns: Sequence[str] | None = None,
) -> TextData:
    """Read and prepare one file or split; see `read_rows` and `Task.prepare` for the arguments.

    Load the rows to train on first: they say which labels there are.

    Raises:
        ConfigError: settings that cannot be used, or a column that no row has.
        DatasetError: what cannot be read, a bad row where bad rows are errors, or none left.
    """
    bad = BadRows(on_bad)
    rows = read_rows(name, bad, split=split, subset=subset, separator=separator, columns=columns)
    examples = task.prepare(rows, bad, training=training)
    return TextData(task, str(name), examples, len(rows), [f"{name}: {said}" for said in bad.summary()])


@torch.no_grad()
def evaluate(model: Any, task: Task, examples: Sequence[Example], *, batch_size: int = 8) -> dict[str, float]:
    """The task's figures over all examples, the model in evaluation mode and afterwards as it was."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    predictions: list[Any] = [None] * len(examples)
    try:
        for indices in in_order(examples, batch_size):
            batch = task.collate([examples[index] for index in indices])
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            for index, prediction in zip(indices, task.predict(model, on_device), strict=True):
                predictions[index] = prediction
    finally:
        model.train(was_training)
    return task.metrics(predictions, [example.reference for example in examples])
