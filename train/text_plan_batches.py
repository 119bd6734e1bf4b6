"""The largest batch of a text run by its shapes, and a task's loss of it: what a plan without data is made with.

The batches are those of `train.text_tasks`, key by key, without their values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from train.text_loss import answer_loss

Batch = dict[str, torch.Tensor]
_OWN = ("labels", "positions", "targets", "start_positions", "end_positions")


def example_batch(task: str, rows: int, length: int, answer: int) -> Batch:
    """Zeros in the shapes of a batch.

    Args:
        length: tokens of a row.
        answer: tokens of a row that the loss counts; of a decoder's row in sequence-to-sequence models.
    """

    def ids(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.long)

    batch = {"input_ids": ids(rows, length), "attention_mask": torch.ones(rows, length, dtype=torch.long)}
    if task in ("causal-lm", "seq2seq-lm", "masked-lm"):
        batch |= {"positions": ids(rows * answer), "targets": ids(rows * answer)}
    if task == "seq2seq-lm":
        batch |= {"decoder_input_ids": ids(rows, answer)}
    elif task == "sequence-classification":
        batch |= {"labels": ids(rows)}
    elif task == "token-classification":
        batch |= {"labels": ids(rows, length)}
    elif task == "question-answering":
        batch |= {"start_positions": ids(rows), "end_positions": ids(rows)}
    return batch


def loss_of(task: str, model: Any, batch: Batch) -> torch.Tensor:
    """As the task's own `loss`."""
    inputs = {name: value for name, value in batch.items() if name not in _OWN}
    if "targets" in batch:
        return answer_loss(model, inputs, batch["positions"], batch["targets"])
    said = model(**inputs)
    if task == "question-answering":
        starts, ends = said.start_logits.float(), said.end_logits.float()
        return (cross_entropy(starts, batch["start_positions"]) + cross_entropy(ends, batch["end_positions"])) / 2
    return cross_entropy(said.logits.float().flatten(0, -2), batch["labels"].flatten(), ignore_index=-100)
