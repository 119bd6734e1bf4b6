"""What every task answers, so that one loop can train all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch

from lora_diffusion.errors import ConfigError, DatasetError
from train.text_bad_rows import BadRows
from train.text_rows import Row
from train.text_template import VirtualPrompt

IGNORED = -100  # a label that the loss does not count
TOO_LONG = ("error", "truncate", "skip")

Batch = dict[str, torch.Tensor]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Example:
    """One row as the model takes it.

    Attributes:
        inputs: arguments of the model by name, a value for each token: input_ids, and token_type_ids where the
            tokenizer makes them.
        labels: what the loss compares with; its form is the task's.
        reference: what a prediction is compared with.
        counted: how many positions the loss counts.
        source: where the row stands.
    """

    inputs: Mapping[str, list[int]]
    labels: Any
    reference: Any
    counted: int
    source: str
    length: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", len(self.inputs["input_ids"]))


class Task(ABC):
    """How rows become examples, examples batches, batches a loss, and a model's outputs figures.

    name: on the command line. model_class: of transformers. task_type: PEFT's word for it; None where PEFT has none.

    Args:
        tokenizer: a fast one.
        max_length: of a row, in tokens, virtual ones included.
        too_long: what happens to a longer row: "error", "truncate" or "skip" (both are counted).

    Raises:
        ConfigError: a setting that cannot be used, or a tokenizer without what the task needs.
    """

    name: ClassVar[str]
    model_class: ClassVar[str]
    task_type: ClassVar[str | None]

    def __init__(self, tokenizer: Any, *, max_length: int = 512, too_long: str = "error") -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"a {type(tokenizer).__name__} is no fast tokenizer, which is needed: give tokenizer.json"
            )
        if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 2:
            raise ConfigError(f"max_length={max_length!r}: give a whole number of tokens from 2")
        if too_long not in TOO_LONG:
            raise ConfigError(f"too_long={too_long!r}: give one of {', '.join(map(repr, TOO_LONG))}")
        self.tokenizer, self.max_length, self.too_long = tokenizer, max_length, too_long

    @abstractmethod
    def prepare(self, rows: Sequence[Row], bad: BadRows, *, training: bool = True) -> list[Example]:
        """Examples of the rows that can be used, in their order.

        training: these rows say which labels there are; another label in rows that come later is bad.

        Raises:
            ConfigError: a column that no row has.
            DatasetError: a bad row, where bad rows are errors; no row left.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Example], *, multiple: int = 1) -> Batch:
        """A batch, padded to its longest example and on to a multiple (of 8, for tensor cores)."""

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The mean over all positions that count in the batch, fp32; a scalar with a graph."""

    @abstractmethod
    def predict(self, model: Any, batch: Batch) -> list[Any]:
        """One prediction for each example, on the CPU. Call it in evaluation mode, without gradients."""

    @abstractmethod
    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Figures by name, of the predictions for all examples beside their `reference`s."""

    @property
    @abstractmethod
    def best_by(self) -> str:
        """The figure to choose a checkpoint by: the highest, or the lowest where its name is "loss"."""

    def model_settings(self) -> dict[str, Any]:
        """Keywords for `from_pretrained` that follow from the rows: the number of labels and their names."""
        return {}

    def preview(self, example: Example) -> str:
        """The row as the model sees it, what the loss counts between « and »."""
        return shown(self.tokenizer, example.inputs["input_ids"], counted_positions(example))

    def _fits(self, length: int, row: Row, bad: BadRows, *, most: int | None = None, what: str = "") -> bool:
        """Whether a row of `length` tokens can be used as it is. False: leave it out, or, with too_long="truncate",
        cut it; it is counted already. most, what: where a part of the row has a limit of its own: "an answer"."""
        most = self.max_length if most is None else most
        if length <= most:
            return True
        if self.too_long == "truncate":
            bad.change(row.source, f"cut to {most:,} tokens{f' ({what})' if what else ''}")
            return False
        reason = f"{f'has {what}' if what else 'is'} longer than {most:,} tokens"
        if self.too_long == "skip":
            bad.leave_out(row.source, reason)
        else:
            bad.report(
                row.source, reason, "raise the limit where the model takes more, truncate long rows", f"{length:,}"
            )
        return False

    def _virtual(self, virtual: VirtualPrompt, row: Row, room: int, bad: BadRows) -> list[int] | None:
        """A prompt with virtual tokens of at most `room` tokens, cut where long rows are cut; None: leave it out."""
        ids = virtual.encode(self.tokenizer, row)
        if self._fits(len(ids) + self.max_length - room, row, bad):
            return ids
        if self.too_long != "truncate":
            return None
        try:
            return virtual.encode(self.tokenizer, row, max(1, room))
        except ConfigError as problem:
            bad.report(row.source, "cannot be cut to fit", "raise max_length", str(problem))
            return None

    @staticmethod
    def _left(items: list[_Item], bad: BadRows) -> list[_Item]:
        """What is left, if anything is. Raises DatasetError."""
        if not items:
            raise DatasetError(f"no row can be used: {'; '.join(bad.summary()) or 'there are none'}")
        return items


def counted_positions(example: Example) -> set[int]:
    """Positions whose label counts, where labels are one for each token."""
    labels = example.labels
    if not isinstance(labels, list) or len(labels) != example.length:
        return set()
    return {place for place, label in enumerate(labels) if label != IGNORED}


def shown(tokenizer: Any, ids: Sequence[int], counted: set[int]) -> str:
    """Tokens as text on one line; `counted` positions between « and », virtual tokens as [V0], [V1], …"""
    size = len(tokenizer)
    first = min((token for token in ids if token >= size), default=size)  # embeddings may be larger than vocabularies
    pieces: list[str] = []
    run: list[int] = []
    for place, token in enumerate([*ids, None]):
        ends = token is None or (run and ((place in counted) != (place - 1 in counted)))
        if run and (ends or (token is not None and token >= size)):
            text = tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            pieces.append(f"«{text}»" if place - 1 in counted else text)
            run = []
        if token is not None and token >= size:
            pieces.append(f"[V{token - first}]")
        elif token is not None:
            run.append(token)
    text = "".join(pieces).replace("\n", "⏎")
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
