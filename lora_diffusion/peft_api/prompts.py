"""Prompts that act, in front of what a model is called with, as PEFT puts them there."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..methods.prompt_batch import prepend_prompt
from ..methods.prompt_generate import prompted_generate
from ..methods.prompts import prompts_in
from ..state import state_of

# What goes in as a batch when text is generated; the rest are settings.
_BATCH = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def with_prompts(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `model(…)` with the virtual tokens of the prompts that act in front; the same where none does.

    Masks, token types and positions are made longer with the input; labels of tokens with -100; start and end positions
    move along. (PEFT leaves labels of tokens and positions of answers where they were, and drops position_ids.)
    Raises ConfigError for a call without input_ids, and for rows that become longer than the model takes.
    """
    if not _any_acts(model):
        return args, kwargs
    named = dict(inspect.signature(model.forward).bind_partial(*args).arguments)
    given = {name: value for name, value in {**named, **kwargs}.items() if value is not None}
    return (), prepend_prompt(model, given)


def generated(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`model.generate(…)` with the prompts that act in front; the model's own where none does."""
    if not _any_acts(model):
        return model.generate(*args, **kwargs)
    named = dict(inspect.signature(model.generate).bind_partial(*args).arguments)
    given = {**named, **kwargs}
    if "inputs" in given:
        given["input_ids"] = given.pop("inputs")
    batch = {name: given.pop(name) for name in _BATCH if name in given}
    return prompted_generate(model, batch, **given)


def _any_acts(model: nn.Module) -> bool:
    state = state_of(model)
    if state is None or state.disabled:
        return False
    return any(piece.acting or piece.in_rows is not None for piece in prompts_in(state, state.adapters))
