"""Keys and values in front of every attention layer's, behind the back of the model's caller.

Attention layers of transformers hand their new keys and values to a cache and attend to what it returns. A hook in
front of each one gives it a cache that puts the prefix in front of the rest, and a mask with columns for it. The real
cache holds real tokens only, so generation, cropping and static caches work as ever. A prefix takes the first
positions, as tokens would: hooks in front of position tables and rotary embeddings move the real tokens up by its
length.

A sliding window does not hide the prefix: every layer has it in front for every token. (A prefix that lives in the
cache, as PEFT's does, slides out of the window.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import AdapterMismatchError, ConfigError
from .prefix_disentangled import attach_disentangled
from .prefix_plan import ATTRIBUTE, Plan, Prefixes
from .prefix_site import CACHES, MASKS, Argument, Site, argument, is_disentangled

_IMPLEMENTATIONS = ("eager", "sdpa")  # of attention: those that take a mask of four dimensions


@dataclass
class _Layer:
    """What the hook in front of one attention layer has to know of it."""

    prefixes: Prefixes
    index: int
    cache: Argument
    mask: Argument


@dataclass
class _Rotary:
    """The same of a rotary embedding."""

    prefixes: Prefixes
    positions: Argument


class _Cache:
    """What an attention layer takes for its cache. inner: the real one, if there is one."""

    def __init__(self, plan: Plan, layer: int, inner: Any) -> None:
        self.plan, self.layer, self.inner = plan, layer, inner

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """(keys, values) to attend to: the prefix, what the real cache has, and the given ones."""
        front = self.plan.in_front(self.layer, keys, self.inner)
        if self.inner is not None:
            keys, values = self.inner.update(keys, values, *args, **kwargs)
        if front.shape[2] != keys.shape[1] or front.shape[4] != keys.shape[3] or keys.shape != values.shape:
            raise AdapterMismatchError(
                f"layer {self.layer} has keys of {keys.shape[1]} heads of {keys.shape[3]} numbers (values: "
                f"{values.shape[1]} of {values.shape[3]}), the prefix {front.shape[2]} of {front.shape[4]}: "
                "prefix tuning does not know this model's attention"
            )
        return torch.cat([front[0], keys], dim=2), torch.cat([front[1], values], dim=2)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """How many tokens stand in front of the new ones, the prefix's among them: T5 measures distances by it."""
        return self.plan.tokens + (self.inner.get_seq_length(*args, **kwargs) if self.inner is not None else 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


def attach(site: Site) -> Prefixes:
    """Put the hooks in place; they change nothing while no prefix acts. Raises ConfigError where others' are."""
    prefixes = Prefixes(site)
    if any(ATTRIBUTE in module.__dict__ for module in (*site.attention, *site.tables, *site.rotary)):
        raise ConfigError(
            "the model's layers have prefixes already, given to them through another target: use that one"
        )
    for index, module in enumerate(site.attention):
        if is_disentangled(module):
            attach_disentangled(prefixes, index, module)
        else:
            note = _Layer(prefixes, index, argument(module, *CACHES), argument(module, *MASKS))
            prefixes.hook(module, note, before=_before_attention)
    for table in site.tables:
        prefixes.hook(table, prefixes, before=_before_table)
    for module in site.rotary:
        prefixes.hook(module, _Rotary(prefixes, argument(module, "position_ids")), before=_before_rotary)
    return prefixes


def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    own: _Layer = module.__dict__[ATTRIBUTE]
    plan = own.prefixes.plan
    if plan is None:
        return None
    implementation = module.config._attn_implementation
    mask, cache = own.mask.of(args, kwargs), own.cache.of(args, kwargs)
    if implementation not in _IMPLEMENTATIONS or (mask is not None and mask.ndim != 4):
        raise ConfigError(
            f"attention of the kind {implementation!r} cannot have a prefix in front: "
            "load the model with attn_implementation='sdpa'"
        )
    cache = getattr(cache, "self_attention_cache", cache)  # of an encoder and a decoder's two
    hidden = args[0] if args else kwargs["hidden_states"]
    batch, queries = hidden.shape[:2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    keys = queries if cache is None else cache.get_mask_sizes(queries, module.layer_idx)[0]
    eager = implementation == "eager"
    wanted = (batch, queries, keys, causal and not eager, hidden.dtype if eager else None, hidden.device)
    wide = _shared(own, plan, mask, wanted)
    args, kwargs = own.cache.put(_Cache(plan, own.index, cache), args, kwargs)
    return own.mask.put(wide, args, kwargs)


def _shared(own: _Layer, plan: Plan, mask: torch.Tensor | None, wanted: tuple[Any, ...]) -> torch.Tensor | None:
    """The widened mask: one for all layers that were given the same, so that a backward pass keeps only one."""
    if torch.compiler.is_compiling():
        return plan.widened(mask, *wanted)
    if own.index == 0:
        plan.masks.clear()  # of a pass that ended in an error
    known = [wide for given, of, wide in plan.masks if given is mask and of == wanted]
    wide = known[0] if known else plan.widened(mask, *wanted)
    if own.index == len(own.prefixes.site.attention) - 1:
        plan.masks.clear()
    elif not known:
        plan.masks.append((mask, wanted, wide))
    return wide


def _before_table(table: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plan, (positions, *_) = table.__dict__[ATTRIBUTE].plan, args
    if plan is None:
        return None
    padding = table.padding_idx
    room = table.num_embeddings - (0 if padding is None else padding + 1)  # RoBERTa counts from behind its padding
    if positions.shape[-1] + plan.tokens > room:
        raise ConfigError(
            f"{positions.shape[-1]} tokens and a prefix of {plan.tokens} are more than the model's {room} positions: "
            "cut the text shorter"
        )
    moved = positions + plan.shift(positions.shape[0], positions.device)
    return (moved if padding is None else torch.where(positions == padding, positions, moved),), kwargs


def _before_rotary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    own: _Rotary = module.__dict__[ATTRIBUTE]
    plan = own.prefixes.plan
    if plan is None:
        return None
    positions, batch = own.positions.of(args, kwargs), args[0].shape[0]
    return own.positions.put(positions + plan.shift(batch, positions.device), args, kwargs)
