"""Prefixes for DeBERTa v2 and v3 (He et al. 2021), whose attention takes no cache and counts distances off its input.

The layer is given an input with a row more in front for each token of the prefix. Their keys and values are exchanged
for the prefix's where the projections give them out, and their outputs are cut off: the real tokens see keys and values
as of tokens in front of them, distances included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .prefix_plan import ATTRIBUTE, Prefixes
from .prefix_site import Argument, argument


@dataclass
class _Projection:
    """front: (batch, tokens, width), what comes out of the coming call in front; None: nothing does."""

    front: torch.Tensor | None = None


@dataclass
class _Layer:
    """What the hooks round one attention layer have to know of it."""

    prefixes: Prefixes
    index: int
    keys: _Projection
    values: _Projection
    mask: Argument
    queries: Argument
    distances: Argument


def attach_disentangled(prefixes: Prefixes, index: int, attention: Any) -> None:
    """Put the hooks of one layer in place."""
    arguments = [argument(attention, name) for name in ("attention_mask", "query_states", "relative_pos")]
    layer = _Layer(prefixes, index, _Projection(), _Projection(), *arguments)
    prefixes.hook(attention, layer, before=_before, after=_after)
    prefixes.hook(attention.key_proj, layer.keys, after=_behind_projection)
    prefixes.hook(attention.value_proj, layer.values, after=_behind_projection)


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    own: _Layer = module.__dict__[ATTRIBUTE]
    plan = own.prefixes.plan
    if plan is None:
        return None
    hidden, *rest = args
    batch, length = hidden.shape[:2]
    own.keys.front, own.values.front = plan.in_front(own.index, hidden, None).transpose(2, 3).flatten(3)
    args = (_longer(hidden, plan.tokens), *rest)
    queries = own.queries.of(args, kwargs)
    if queries is not None:
        args, kwargs = own.queries.put(_longer(queries, plan.tokens), args, kwargs)
    mask = own.mask.of(args, kwargs).bool()
    wide = plan.widened(mask, batch, length, length, False, None, hidden.device)
    assert wide is not None, "made from a mask"
    top = wide.new_ones(*wide.shape[:2], plan.tokens, wide.shape[3])  # the rows that are cut off
    args, kwargs = own.mask.put(torch.cat([top, wide], dim=2), args, kwargs)
    return own.distances.put(None, args, kwargs)


def _behind_projection(projection: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
    own: _Projection = projection.__dict__[ATTRIBUTE]
    front, own.front = own.front, None  # the projection is also called for distances
    return None if front is None else torch.cat([front.to(output.dtype), output[:, front.shape[1] :]], dim=1)


def _after(module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
    plan = module.__dict__[ATTRIBUTE].prefixes.plan
    if plan is None:
        return None
    context, attentions = output
    return context[:, plan.tokens :], attentions if attentions is None else attentions[:, :, plan.tokens :]


def _longer(hidden: torch.Tensor, tokens: int) -> torch.Tensor:
    """(batch, tokens + length, width), with zeros in front."""
    return functional.pad(hidden, (0, 0, tokens, 0))
