"""A tag for each word: names of people and places, parts of speech."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy

from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable
from train import text_metrics
from train.text_bad_rows import BadRows
from train.text_entities import entity_scores, has_entities
from train.text_rows import Row
from train.text_tasks.labels import Labels
from train.text_tasks.task import IGNORED, Batch, Example, Task, shown
from train.text_tasks.tokens import frame, ids_of, model_inputs, padded
from train.text_template import check_columns, text_of


class TokenClassification(Task):
    """CoNLL's tasks. Rows hold a list of words and a list of their tags (in CSV: texts with spaces between them).

    A word's tag counts at its first token; the word's other tokens count nothing.

    Args:
        tokens_column, tags_column: of the two lists.
        labels: the tags in order; None learns them from the rows to train on.
        too_long: "truncate" leaves out the last words.
    """

    name: ClassVar[str] = "token-classification"
    model_class: ClassVar[str] = "AutoModelForTokenClassification"
    task_type: ClassVar[str | None] = "TOKEN_CLS"

    def __init__(
        self,
        tokenizer: Any,
        *,
        tokens_column: str = "tokens",
        tags_column: str = "tags",
        labels: Sequence[str] | None = None,
        max_length: int = 512,
        too_long: str = "error",
    ) -> None:
        super().__init__(tokenizer, max_length=max_length, too_long=too_long)
        self.tokens_column, self.tags_column = tokens_column, tags_column
        self.labels = None if labels is None else Labels(labels)
        self.start, self.finish = frame(tokenizer)

    def prepare(self, rows: Sequence[Row], bad: BadRows, *, training: bool = True) -> list[Example]:
        check_columns([self.tokens_column, self.tags_column], rows)
        pairs = [(row, pair) for row in rows if (pair := self._pair(row, bad)) is not None]
        if self.labels is None:
            if not training:
                raise ConfigError("the tags are not known: prepare the rows to train on first, or give them as labels")
            if not pairs:
                self._left([], bad)
            self.labels = Labels.found(tag for _, (_, tags) in pairs for tag in tags)
        examples = [self._example(row, words, tags, bad) for row, (words, tags) in pairs]
        return self._left([one for one in examples if one is not None], bad)

    def _pair(self, row: Row, bad: BadRows) -> tuple[list[str], list[str]] | None:
        """The words and the tags, as many of one as of the other."""
        lists = []
        for name in (self.tokens_column, self.tags_column):
            value = row.get(name)
            found = value.split() if isinstance(value, str) else value
            texts = [text_of(one) for one in found] if isinstance(found, list) else []
            if not texts or not all(texts):
                bad.report(row.source, f"has no list of words in {name!a}", "give one word or tag for each place")
                return None
            lists.append([text for text in texts if text])
        words, tags = lists
        if len(words) == len(tags):
            return words, tags
        bad.report(row.source, "has another number of tags than of words", "give one tag for each word",
                   f"{len(words)} words, {len(tags)} tags")  # fmt: skip
        return None

    def _example(self, row: Row, words: list[str], tags: list[str], bad: BadRows) -> Example | None:
        assert self.labels is not None
        for tag in tags:
            if tag not in self.labels.ids:
                bad.report(row.source, "has a label never seen in training", self.labels.advice(tag),
                           ascii(printable(tag)))  # fmt: skip
                return None
        pieces = [ids_of(self.tokenizer, word if place == 0 else f" {word}") for place, word in enumerate(words)]
        if not all(pieces):
            word = words[next(place for place, piece in enumerate(pieces) if not piece)]
            bad.report(row.source, "has a word without tokens", "remove the word", ascii(word[:40]))
            return None
        around = len(self.start) + len(self.finish)
        if not self._fits(around + sum(map(len, pieces)), row, bad):
            if self.too_long != "truncate":
                return None
            while pieces and around + sum(map(len, pieces)) > self.max_length:
                pieces.pop()
            if not pieces:
                bad.report(row.source, "has a first word longer than max_length", "remove the word")
                return None
        ids = [*self.start, *(token for piece in pieces for token in piece), *self.finish]
        labels = [IGNORED] * len(self.start)
        for piece, tag in zip(pieces, tags):
            labels += [self.labels.ids[tag], *[IGNORED] * (len(piece) - 1)]
        labels += [IGNORED] * len(self.finish)
        return Example({"input_ids": ids}, labels, tags[: len(pieces)], len(pieces), row.source)

    def model_settings(self) -> dict[str, Any]:
        if self.labels is None:
            raise ConfigError("the tags are not known: prepare the rows to train on first, or give them as labels")
        return self.labels.settings()

    def collate(self, examples: Sequence[Example], *, multiple: int = 1) -> Batch:
        """input_ids, attention_mask, labels, all (rows, length)."""
        batch = model_inputs([dict(one.inputs) for one in examples], self.tokenizer, multiple=multiple)
        batch["labels"] = padded([one.labels for one in examples], IGNORED, multiple=multiple)
        return batch

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        logits = self._logits(model, batch)
        return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)

    def predict(self, model: Any, batch: Batch) -> list[list[str]]:
        """The tags of each row's words."""
        assert self.labels is not None
        chosen, kept = self._logits(model, batch).argmax(dim=-1).cpu(), (batch["labels"] != IGNORED).cpu()
        return [[self.labels.names[tag] for tag in row[own].tolist()] for row, own in zip(chosen, kept)]

    def metrics(self, predictions: Sequence[list[str]], references: Sequence[list[str]]) -> dict[str, float]:
        """accuracy over words; where tags are of the form B-PER, precision, recall and f1 of whole entities; else
        f1_macro over tags."""
        flat = [tag for row in predictions for tag in row], [tag for row in references for tag in row]
        figures = {"accuracy": text_metrics.accuracy(*flat)}
        if has_entities(flat[1]):
            return figures | entity_scores(predictions, references)
        return figures | {"f1_macro": text_metrics.f1_macro(*flat)}

    @property
    def best_by(self) -> str:
        return "f1" if self.labels is not None and has_entities(self.labels.names) else "accuracy"

    def preview(self, example: Example) -> str:
        """Each word's counted token between « and », with its tag."""
        assert self.labels is not None
        pieces = []
        for token, label in zip(example.inputs["input_ids"], example.labels):
            text = shown(self.tokenizer, [token], set())
            pieces.append(text if label == IGNORED else f" «{text.strip()}»/{printable(self.labels.names[label])}")
        return "".join(pieces).strip()

    @staticmethod
    def _logits(model: Any, batch: Batch) -> torch.Tensor:
        """(rows, length, tags), fp32."""
        logits: torch.Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return logits.float()
