"""The prompts that are in a model: which there are, their ids, and doing away with their encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import ConfigError
from ..layers.virtual_tokens import VirtualPart
from ..state import ComponentState, holders
from .prompt_encoder_config import PromptEncoderConfig
from .prompt_networks import BareVectors
from .prompt_piece import PromptPiece


def prompt_ids(target: Any, name: str = "default") -> list[int]:
    """The ids of an adapter's virtual tokens, in order: what a template puts into `input_ids`.

    They hold while the adapter is in the target, and need not be the same after it is loaded again.
    Raises ConfigError if there is no such adapter, or if it has no prompt.
    """
    return [number for piece in prompts_of(target, name) for number in piece.ids]


def freeze_prompt(target: Any, name: str = "default") -> None:
    """Put bare vectors in the place of P-tuning's encoder, for inference: the same rows, and no network any more.

    The encoder is gone; what is saved from now on is (tokens, dim). Nothing happens to a prompt that is bare already.
    Raises ConfigError if there is no such adapter, or if it has no prompt.
    """
    for piece in prompts_of(target, name):
        if isinstance(piece.config, PromptEncoderConfig) and piece.part.costly:
            bare = BareVectors(_settled(piece.part)).requires_grad_(False)
            piece.replace(bare, dataclasses.replace(piece.config, encoder_reparameterization_type="NONE"))


@torch.no_grad()
def _settled(part: VirtualPart) -> torch.Tensor:
    """The rows of a part without dropout."""
    training = part.training
    try:
        return part.eval()().clone()
    finally:
        part.train(training)


def prompts_of(target: Any, name: str) -> list[PromptPiece]:
    """The prompts of one adapter. Raises ConfigError if it has none."""
    found = [piece for state in holders(target, name).values() for piece in prompts_in(state, [name])]
    if not found:
        raise ConfigError(f"adapter {name!r} has no virtual tokens: it has no prompt tuning or P-tuning in it")
    return found


def prompts_in(state: ComponentState, names: Iterable[str]) -> list[PromptPiece]:
    """The prompts of several adapters in one component, in order; adapters without any have none."""
    held = [state.adapters[name] for name in names if name in state.adapters]
    return [piece for one in held for piece in one.pieces.values() if isinstance(piece, PromptPiece)]
