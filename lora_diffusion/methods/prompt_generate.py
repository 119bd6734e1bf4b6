"""Generating from inputs with virtual tokens in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..components import choose_components
from ..errors import ConfigError
from ..state import state_of
from .prompt_batch import padding_id, with_prompts
from .prompts import prompts_in


def prompted_generate(
    model: nn.Module, batch: Mapping[str, Any], names: str | Sequence[str | None] | None = None, **kwargs: Any
) -> Any:
    """`model.generate` for a batch with virtual tokens: those that prompts put in front, and those of a template.

    The model gets embeddings in the place of ids, so that repetition penalties and whatever else reads ids only meet
    those of the vocabulary. What comes back is what `generate` gives without virtual tokens: for a causal model the
    tokens of the input and the new ones, for an encoder-decoder model the new ones.

    batch: input_ids and attention_mask; a causal model's padding is on the left. names: as for `prepend_prompt`.
    kwargs: those of `generate`.
    Raises ConfigError as `prepend_prompt`, and for a batch that holds labels or max_length without room.
    """
    component: Any = next(iter(choose_components(model, None).values()))
    if batch.get("labels") is not None:
        raise ConfigError("the batch has labels: leave them out to generate")
    seq2seq = bool(getattr(component.config, "is_encoder_decoder", False))
    given = {key: value for key, value in batch.items() if key not in ("labels", "position_ids", "token_type_ids")}
    full = with_prompts(component, given, names, left=None if seq2seq else True)
    state = state_of(component)
    pieces = prompts_in(state, state.adapters) if state is not None else []
    virtual = torch.tensor([n for piece in pieces for n in piece.part.ids], device=full["input_ids"].device)
    if not pieces or not bool(torch.isin(full["input_ids"], virtual).any()):
        return component.generate(**full, **kwargs)
    ids = full.pop("input_ids")
    if full.get("attention_mask") is None:
        full["attention_mask"] = torch.ones_like(ids)
    with torch.no_grad():
        embeds = pieces[0].hosts[0](ids)
    if seq2seq:
        return component.generate(inputs_embeds=embeds, **full, **kwargs)
    real = given["input_ids"]
    if bool(torch.isin(real, virtual).any()):
        real = _without(real, virtual, padding_id(component, [pieces]))
    kwargs = _with_new_tokens(component, kwargs, real.shape[1])
    return component.generate(input_ids=real, inputs_embeds=embeds, **full, **kwargs)


def _without(ids: torch.Tensor, virtual: torch.Tensor, padding: int) -> torch.Tensor:
    """The rows without virtual tokens, padded on the left to one length."""
    rows = [row[~torch.isin(row, virtual)] for row in ids]
    made = ids.new_full((len(rows), max(1, max(len(row) for row in rows))), padding)
    for place, row in zip(made, rows):
        place[len(place) - len(row) :] = row
    return made


def _with_new_tokens(component: Any, kwargs: dict[str, Any], columns: int) -> dict[str, Any]:
    """A limit on all tokens as one on the new ones: what `generate` makes of the former counts embeddings twice."""
    config = kwargs.get("generation_config") or component.generation_config
    given = kwargs.pop("max_length", None)
    limit = given if given is not None else config.max_length
    if "max_new_tokens" in kwargs or config.max_new_tokens is not None or limit is None:
        return kwargs
    if limit <= columns:
        if given is None:
            return kwargs
        raise ConfigError(f"max_length={limit} leaves no room after {columns} tokens of input: give max_new_tokens")
    return {**kwargs, "max_new_tokens": limit - columns}
