"""Prompt tuning: the vectors of virtual tokens, learned as they are (Lester et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..text import printable
from .prompt_networks import BareVectors
from .prompt_piece import PromptPiece, prompt_hosts
from .prompt_tuning_config import PromptTuningConfig


def build(
    component: nn.Module,
    config: PromptTuningConfig,
    name: str,
    *,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> PromptPiece:
    """Raises AdapterMismatchError for a model that takes no prompt, ConfigError for an initial text that cannot be
    read."""
    hosts = prompt_hosts(component, config)
    table = hosts[0].weight
    vectors = torch.empty(config.rows, table.shape[1], device="meta")
    if not table.is_meta:
        vectors = _initial(config, table.detach(), generator)
    return PromptPiece(config, name, hosts, BareVectors(vectors.to(table.device, dtype)))


def _initial(config: PromptTuningConfig, table: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """(rows, dim). table: (vocabulary, dim)."""
    if config.prompt_tuning_init == "RANDOM":
        return torch.randn(config.rows, table.shape[1], generator=generator)
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        ids = torch.randint(0, table.shape[0], (config.rows,), generator=generator)
    else:
        found = _text_ids(config)
        if max(found) >= table.shape[0]:
            raise ConfigError(f"the tokenizer {config.tokenizer_name_or_path!r} has more tokens than the model: "
                              "give the model's own")  # fmt: skip
        ids = torch.tensor((found * config.rows)[: config.rows])
    return table[ids.to(table.device)].float()


def _text_ids(config: PromptTuningConfig) -> list[int]:
    """The tokens of the initial text, as the tokenizer gives them, its special tokens included (which is PEFT's way).

    Raises ConfigError."""
    from transformers import AutoTokenizer

    text = config.prompt_tuning_init_text or ""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}), trust_remote_code=False
        )
    except Exception as problem:
        raise ConfigError(
            f"tokenizer_name_or_path={config.tokenizer_name_or_path!r}: no tokenizer could be loaded from there "
            f"({printable(str(problem))})"
        ) from None
    ids: list[int] = tokenizer(text).input_ids
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text={text[:60]!r} has no tokens: give a text with some")
    return ids
