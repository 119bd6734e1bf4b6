"""Small questions to a tokenizer, and rows of unequal length as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lora_diffusion.errors import ConfigError

_NO_LIMIT = 10**9  # tokenizers without a limit name a number far above


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without special ones around it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else []


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that come before and after a single text: [CLS] and [SEP], or nothing."""
    bare, whole = ids_of(tokenizer, "a"), list(tokenizer("a", verbose=False).input_ids)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def joins_pairs(tokenizer: Any) -> bool:
    """Whether the tokenizer puts something of its own between the two texts of a pair."""
    return bool(tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False))


def pad_id(tokenizer: Any) -> int:
    """The token that fills rows up; GPT-2 has none, and takes its end of text, which neither attention nor loss sees.

    Raises ConfigError where there is no such token either.
    """
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    raise ConfigError("the tokenizer has no token to pad with: give it a pad_token")


def end_id(tokenizer: Any) -> int:
    """The token after which generating ends. Raises ConfigError where there is none."""
    found = tokenizer.eos_token_id
    if found is None:
        raise ConfigError("the tokenizer has no end of text to learn: give it an eos_token")
    return int(found)


def longest(config: Any, tokenizer: Any) -> int | None:
    """How many tokens a model takes in a row; None where nothing limits it (T5).

    config: of the model. RoBERTa's positions begin after the padding's number.
    """
    limits = []
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if positions and text.model_type not in ("t5", "mt5", "umt5"):
        starts = text.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "longformer")
        limits.append(positions - ((text.pad_token_id or 0) + 1 if starts else 0))
    if tokenizer.model_max_length and tokenizer.model_max_length < _NO_LIMIT:
        limits.append(int(tokenizer.model_max_length))
    return min(limits, default=None)


def padded(rows: Sequence[Sequence[int]], value: int, *, multiple: int = 1, left: bool = False) -> torch.Tensor:
    """(rows, longest) int64, filled up with `value` to a length that is a multiple of `multiple`."""
    length = max(len(row) for row in rows)
    length += -length % multiple
    filled = [
        [*[value] * (length - len(row)), *row] if left else [*row, *[value] * (length - len(row))] for row in rows
    ]
    return torch.tensor(filled, dtype=torch.long)


def model_inputs(
    inputs: Sequence[dict[str, list[int]]], tokenizer: Any, *, multiple: int = 1, left: bool = False
) -> dict[str, torch.Tensor]:
    """Token ids and what goes with them, (rows, longest) each, and the attention mask of the padding."""
    batch = {}
    for name in inputs[0]:
        fill = pad_id(tokenizer) if name == "input_ids" else 0
        batch[name] = padded([one[name] for one in inputs], fill, multiple=multiple, left=left)
    ones = [[1] * len(one["input_ids"]) for one in inputs]
    batch["attention_mask"] = padded(ones, 0, multiple=multiple, left=left)
    return batch
