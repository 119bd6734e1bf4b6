"""Several short texts in one row of a causal model, none of which sees another.

Positions begin at 0 with every text. Without an attention mask, transformers reads from that where one text ends and
the next begins, and keeps them apart in its masks (eager, SDPA, flex) or in its kernels' lengths (flash attention), so
long as it keeps no cache: every loss here is taken with `use_cache=False`.
Whether a model in hand really does so is found out by asking it.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_diffusion.errors import ConfigError
from train.text_tasks.language_model import targets_of
from train.text_tasks.task import IGNORED, Batch, Example, Task
from train.text_tasks.tokens import pad_id, padded

_NEAR = 1e-2  # how far outputs may differ, relative, for no other reason than rounding in bf16


@dataclass(frozen=True)
class Packed:
    """Examples that share one row."""

    examples: tuple[Example, ...]
    length: int = field(init=False)
    counted: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", sum(one.length for one in self.examples))
        object.__setattr__(self, "counted", sum(one.counted for one in self.examples))


def pack(examples: Sequence[Example], max_length: int) -> list[Packed]:
    """Rows of at most `max_length` tokens: the longest first, each into the row where it leaves the least room.

    Raises ConfigError for an example that is longer by itself.
    """
    rows: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted
    for example in sorted(examples, key=lambda one: -one.length):
        if example.length > max_length:
            raise ConfigError(f"{example.source}: {example.length:,} tokens do not go into packs of {max_length:,}")
        place = bisect.bisect_left(rooms, (example.length, -1))
        if place == len(rooms):
            rows.append([example])
            room, row = max_length, len(rows) - 1
        else:
            room, row = rooms.pop(place)
            rows[row].append(example)
        bisect.insort(rooms, (room - example.length, row))
    return [Packed(tuple(row)) for row in rows]


def collate_packed(packs: Sequence[Packed], task: Task, *, multiple: int = 1) -> Batch:
    """input_ids, position_ids, labels (packs, length); positions, targets (counted,).

    There is no attention mask: the padding at a row's end is a text of its own, of which nothing counts.
    """
    padding = pad_id(task.tokenizer)
    longest = max(one.length for one in packs)
    longest += -longest % multiple
    ids, places, labels = [], [], []
    for one in packs:
        rest = longest - one.length
        ids.append([*(token for part in one.examples for token in part.inputs["input_ids"]), *[padding] * rest])
        places.append([*(place for part in one.examples for place in range(part.length)), *range(rest)])
        labels.append([*(label for part in one.examples for label in part.labels), *[IGNORED] * rest])
    batch = {"input_ids": padded(ids, 0), "position_ids": padded(places, 0), "labels": padded(labels, IGNORED)}
    batch["positions"], batch["targets"] = targets_of(batch["labels"], shift=1)
    return batch


@torch.no_grad()
def check_packing(model: Any, task: Task) -> None:
    """Make sure that a model keeps packed texts apart: a text after another gives what it gives alone.

    Raises:
        ConfigError: the task is no causal one, the model takes no positions, or it lets a text see the one before it.
    """
    reason = _why_not(model, task)
    if reason is not None:
        raise ConfigError(f"packing cannot be used: {reason}; group by length instead")


def _why_not(model: Any, task: Task) -> str | None:
    if task.name != "causal-lm":
        return f"{task.name} is no causal language model"
    device = next(model.parameters()).device
    vocabulary = int(model.config.get_text_config().vocab_size)
    one, other, text = ([(seed + step) % vocabulary for step in (5, 9, 7, 6)] for seed in (0, 11, 23))
    was_training = model.training
    model.eval()
    try:
        alone = _logits(model, {"input_ids": [text], "position_ids": [[0, 1, 2, 3]]}, device)
        after = [
            _logits(model, {"input_ids": [[*before, *text]], "position_ids": [[0, 1, 2, 3] * 2]}, device)
            for before in (one, other)
        ]  # fmt: skip
    except TypeError:
        return f"a {type(model).__name__} takes no position_ids"
    finally:
        model.train(was_training)
    scale = float(alone.abs().max()) + 1e-12
    apart = max(float((each - alone).abs().max()) for each in after) / scale
    if apart < _NEAR:
        return None
    attention = getattr(model.config, "_attn_implementation", None)
    return f"a {type(model).__name__} with {attention} attention lets a text see the one before it in its row"


def _logits(model: Any, inputs: Mapping[str, list[list[int]]], device: torch.device) -> torch.Tensor:
    """(4, vocabulary) of the last text."""
    tensors = {name: torch.tensor(value, device=device) for name, value in inputs.items()}
    logits: torch.Tensor = model(**tensors, use_cache=False).logits
    return logits[0, -4:].float().cpu()
