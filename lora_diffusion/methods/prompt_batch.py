"""Prompts in front of the inputs of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..components import choose_components
from ..errors import ConfigError
from ..state import ComponentState, holders, state_of
from .prompt_piece import PromptPiece
from .prompt_rows import IGNORED, Heads
from .prompts import prompts_in

# What has as many columns as input_ids: its value at virtual tokens, and at padding.
_FILLS = {"attention_mask": (1, 0), "token_type_ids": (0, 0), "labels": (IGNORED, IGNORED)}


def prepend_prompt(
    model: nn.Module, batch: Mapping[str, Any], names: str | Sequence[str | None] | None = None
) -> dict[str, Any]:
    """A batch with virtual tokens in front of everything, [CLS] included, as PEFT puts them, for the model to take.

    names: None puts the active adapters' prompts in front of every row, in the order in which they came (inside
        `adapters_per_sample`, each row's own); prompts with a template are left to it. A name: that adapter's prompt.
        One for each row, or None for a row of the base: different prompts in one batch.
    batch: "input_ids" (rows, columns) and what goes with it: attention_mask, labels (rows, columns; -100 at virtual
        tokens), token_type_ids, position_ids, start_positions and end_positions; the rest is handed on as it is. With
        prompts of different lengths the shorter rows are padded on the side where the batch has its padding.

    Of an encoder-decoder model the encoder's input gets the prompt; labels and decoder_input_ids stay as they are.

    Nothing is put in front inside `disable_adapters`.
    Raises ConfigError for an unknown adapter or one without a prompt, another number of names than rows, a prompt that
    stands elsewhere by its template, a batch that cannot be extended, and rows that become longer than the model takes.
    """
    component = next(iter(choose_components(model, None).values()))
    return with_prompts(component, batch, names)


def with_prompts(
    component: nn.Module,
    batch: Mapping[str, Any],
    names: str | Sequence[str | None] | None,
    left: bool | None = None,
) -> dict[str, Any]:
    """See `prepend_prompt`. left: whether rows are padded on the left; None: where the batch has its padding."""
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        raise ConfigError("the batch has no input_ids of shape (rows, columns): a prompt needs them")
    state = state_of(component)
    rows = _prompts_of_rows(component, state, ids.shape[0], names)
    if not any(rows):
        return dict(batch)
    seq2seq = bool(getattr(getattr(component, "config", None), "is_encoder_decoder", False))
    pad = padding_id(component, rows)
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ConfigError(f"attention_mask has shape {tuple(mask.shape)}: one of {tuple(ids.shape)}, as input_ids, "
                          "can be extended")  # fmt: skip
    if left is None:
        left = mask is not None and bool((mask[:, 0] == 0).any())
    heads = Heads([[n for piece in row for n in piece.ids] for row in rows], ids, left)
    _check_length(component, ids.shape[1] + heads.width)
    made = dict(batch)
    made["input_ids"] = heads.joined(ids, heads.ids, pad)
    if mask is None and heads.uneven:
        mask = torch.ones_like(ids)
    made.update({"attention_mask": mask} if mask is not None else {})
    for key, value in list(made.items()):
        if key == "input_ids" or (seq2seq and (key == "labels" or key.startswith("decoder_"))):
            continue
        if key == "labels" and (not isinstance(value, torch.Tensor) or value.is_floating_point()):
            continue
        if key == "position_ids" and value is not None:
            made[key] = heads.positions(value, mask)
        elif key in ("start_positions", "end_positions") and value is not None:
            made[key] = heads.moved(value)
        elif isinstance(value, torch.Tensor) and value.shape == ids.shape:
            if key not in _FILLS:
                raise ConfigError(f"the batch has {key!a} for every token, and there is no value of it for virtual "
                                  "tokens: take it out and put it back extended")  # fmt: skip
            made[key] = heads.joined(value, *_FILLS[key])
    return made


def padding_id(component: Any, rows: Sequence[Sequence[PromptPiece]]) -> int:
    """The id that the model takes for padding; 0 where it has none, which a mask then covers."""
    given = getattr(getattr(component, "config", None), "pad_token_id", None)
    host = next(piece.hosts[0] for row in rows for piece in row)
    known = given if isinstance(given, int) and 0 <= given < host.num_embeddings else host.padding_idx
    return 0 if known is None else int(known)


def _prompts_of_rows(
    component: nn.Module, state: ComponentState | None, count: int, names: str | Sequence[str | None] | None
) -> list[list[PromptPiece]]:
    """Each row's prompts."""
    if names is None:
        if state is None or state.disabled:
            return [[]] * count
        found = [piece for piece in prompts_in(state, state.adapters) if _free(piece)]
        if state.per_sample is None:
            return [[piece for piece in found if piece.acting]] * count
        if count % len(state.per_sample):
            raise ConfigError(f"adapters_per_sample has {len(state.per_sample)} rows, the batch has {count}")
        times = count // len(state.per_sample)
        order = [row for row in range(len(state.per_sample)) for _ in range(times)]
        return [[piece for piece in found if piece.in_rows is not None and piece.in_rows[row]] for row in order]
    listed = [names] * count if isinstance(names, str) else list(names)
    if len(listed) != count:
        raise ConfigError(f"{len(listed)} names for {count} rows: give one, or None, for each")
    prompts: dict[str | None, list[PromptPiece]] = {None: []}
    for name in dict.fromkeys(name for name in listed if name is not None):
        holders(component, name)
        assert state is not None, "holders() found the adapter"
        prompts[name] = prompts_in(state, [name])
        if not prompts[name]:
            raise ConfigError(f"adapter {name!r} has no virtual tokens: it has no prompt tuning or P-tuning in it")
        elsewhere = next((piece for piece in prompts[name] if not _can_stand_in_front(piece)), None)
        if elsewhere is not None:
            template = ascii(getattr(elsewhere.config, "template", None))
            raise ConfigError(f"the prompt of {name!r} stands where its template {template} says: encode the rows with "
                              "PromptTemplate")  # fmt: skip
    return [[]] * count if state is not None and state.disabled else [prompts[name] for name in listed]


def _free(piece: PromptPiece) -> bool:
    return getattr(piece.config, "template", None) is None


def _can_stand_in_front(piece: PromptPiece) -> bool:
    parsed = getattr(piece.config, "parsed", None)
    return parsed is None or parsed.is_prefix


def _check_length(component: nn.Module, length: int) -> None:
    """Raises ConfigError where a table of learned positions is too short."""
    limit = getattr(getattr(component, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int) or 2 * length <= limit:
        return
    for path, module in component.named_modules():
        if isinstance(module, nn.Embedding) and path.endswith(("position_embeddings", "wpe", "embed_positions")):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there
            room = min(limit, module.num_embeddings - skipped)
            if length > room:
                raise ConfigError(
                    f"with the prompt the rows are {length} tokens long, and the model takes {room}: shorten them"
                )
