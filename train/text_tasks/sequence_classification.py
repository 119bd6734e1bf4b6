"""One label, or one number, for a text or a pair of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy, mse_loss

from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable
from train import text_metrics
from train.text_bad_rows import BadRows
from train.text_rows import Row
from train.text_tasks.labels import Labels
from train.text_tasks.task import Batch, Example, Task, shown
from train.text_tasks.tokens import joins_pairs, model_inputs, pad_id
from train.text_template import MASK, Filled, TextTemplate

BETWEEN = "\n"  # the texts of a pair, where the tokenizer puts nothing between them (GPT-2, Llama)
Prediction = list[float]  # the logits


class SequenceClassification(Task):
    """GLUE's tasks.

    Args:
        template: its `prompt` is the text, `second` the other of a pair, `answer` the column of the label.
        labels: their names in order; None learns them from the rows to train on.
        regression: labels are numbers, and the loss is the mean square error (STS-B).
        positive: the label that "f1" is about, where there are two; None takes the last one.
    """

    name: ClassVar[str] = "sequence-classification"
    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    task_type: ClassVar[str | None] = "SEQ_CLS"

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: TextTemplate,
        labels: Sequence[str] | None = None,
        regression: bool = False,
        positive: str | None = None,
        max_length: int = 512,
        too_long: str = "error",
    ) -> None:
        super().__init__(tokenizer, max_length=max_length, too_long=too_long)
        template.check_answer(self.name)
        if not template.prompt or f"{{{MASK}}}" in template.prompt:
            raise ConfigError(f"{self.name} needs a template of the text, such as '{{sentence}}', without {{mask}}")
        if regression and (labels is not None or positive is not None):
            raise ConfigError("regression predicts a number: leave labels and positive out")
        self.template, self.regression, self.positive = template, regression, positive
        self.labels = None if labels is None else Labels(labels)
        self._joins = joins_pairs(tokenizer)

    def prepare(self, rows: Sequence[Row], bad: BadRows, *, training: bool = True) -> list[Example]:
        filled = list(self.template.fill(rows, bad))
        if not self.regression and self.labels is None:
            if not training:
                raise ConfigError("the labels are not known: prepare the rows to train on first, or give them")
            self._left(filled, bad)
            self.labels = Labels.found(texts.answer for _, texts in filled)
        if self.labels is not None and self.positive is not None and self.positive not in self.labels.ids:
            raise ConfigError(f"positive={self.positive!a} is no label; {self.labels.advice(self.positive)}")
        examples = []
        for row, texts in filled:
            label = self._number(texts.answer, row, bad) if self.regression else self._label(texts.answer, row, bad)
            inputs = None if label is None else self._inputs(texts, row, bad)
            if inputs is not None and label is not None:
                examples.append(Example(inputs, label, label, 1, row.source))
        return self._left(examples, bad)

    def _label(self, name: str, row: Row, bad: BadRows) -> int | None:
        assert self.labels is not None
        if name not in self.labels.ids:
            bad.report(
                row.source, "has a label never seen in training", self.labels.advice(name), ascii(printable(name))
            )
        return self.labels.ids.get(name)

    @staticmethod
    def _number(text: str, row: Row, bad: BadRows) -> float | None:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return value
        bad.report(row.source, "has no number to predict", "give one, or leave regression out", ascii(printable(text)))
        return None

    def _inputs(self, texts: Filled, row: Row, bad: BadRows) -> dict[str, list[int]] | None:
        pair = (texts.prompt, texts.second) if texts.second else (texts.prompt,)
        if len(pair) == 2 and not self._joins:
            pair = (BETWEEN.join(pair),)
        found = self.tokenizer(*pair, verbose=False)
        if not self._fits(len(found.input_ids), row, bad):
            if self.too_long != "truncate":
                return None
            found = self.tokenizer(*pair, truncation=True, max_length=self.max_length, verbose=False)
        if not found.input_ids:
            bad.report(row.source, "has no tokens", "write text")
            return None
        return {name: list(ids) for name, ids in found.items() if name != "attention_mask"}

    def model_settings(self) -> dict[str, Any]:
        """The pad token among them: a decoder's head reads the last token that is none."""
        padding = {"pad_token_id": pad_id(self.tokenizer)}
        if self.regression:
            return {"num_labels": 1, "problem_type": "regression", **padding}
        if self.labels is None:
            raise ConfigError("the labels are not known: prepare the rows to train on first, or give them")
        return {**self.labels.settings(), "problem_type": "single_label_classification", **padding}

    def collate(self, examples: Sequence[Example], *, multiple: int = 1) -> Batch:
        """The inputs (rows, length); labels (rows,), int64 or fp32."""
        batch = model_inputs([dict(one.inputs) for one in examples], self.tokenizer, multiple=multiple)
        dtype = torch.float32 if self.regression else torch.long
        batch["labels"] = torch.tensor([one.labels for one in examples], dtype=dtype)
        return batch

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        logits = self._logits(model, batch)
        return mse_loss(logits[:, 0], batch["labels"]) if self.regression else cross_entropy(logits, batch["labels"])

    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        """The logits, so that the loss is known beside the choice."""
        return self._logits(model, batch).tolist()

    def metrics(self, predictions: Sequence[Prediction], references: Sequence[Any]) -> dict[str, float]:
        """Of classes: loss, accuracy, f1 (of two: of `positive`), f1_macro, matthews. Of numbers: loss, pearson,
        spearman."""
        logits = torch.tensor(predictions, dtype=torch.double)
        if self.regression:
            values = logits[:, 0].tolist()
            return {
                "loss": float(mse_loss(logits[:, 0], torch.tensor(references, dtype=torch.double))),
                "pearson": text_metrics.pearson(values, references),
                "spearman": text_metrics.spearman(values, references),
            }
        chosen = logits.argmax(dim=-1).tolist()
        figures = {
            "loss": float(cross_entropy(logits, torch.tensor(references))),
            "accuracy": text_metrics.accuracy(chosen, references),
            "f1_macro": text_metrics.f1_macro(chosen, references),
            "matthews": text_metrics.matthews(chosen, references),
        }
        if logits.shape[1] == 2:
            positive = 1 if self.positive is None or self.labels is None else self.labels.ids[self.positive]
            figures["f1"] = text_metrics.f1_binary(chosen, references, positive)
        return figures

    @property
    def best_by(self) -> str:
        return "pearson" if self.regression else "accuracy"

    def preview(self, example: Example) -> str:
        """The text and, after an arrow, the label."""
        label = example.labels if self.labels is None else self.labels.names[example.labels]
        return f"{shown(self.tokenizer, example.inputs['input_ids'], set())} → «{printable(str(label))}»"

    @staticmethod
    def _logits(model: Any, batch: Batch) -> torch.Tensor:
        """(rows, labels), fp32."""
        logits: torch.Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return logits.float()
