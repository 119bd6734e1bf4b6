"""Where prefixes go in a model of transformers: its attention layers, and what turns positions into vectors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ..errors import AdapterMismatchError

CACHES, MASKS = ("past_key_values", "layer_past"), ("attention_mask", "mask")
_CROSS = ("encoder_attn", "cross_attn", "crossattention", "EncDecAttention")
_TABLES = ("wpe", "position_embeddings")


class Argument(NamedTuple):
    """One argument of a module's forward: its name, and its place among the positional ones."""

    name: str
    place: int

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[self.place] if self.place < len(args) else kwargs.get(self.name)

    def put(self, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another value for this one."""
        if self.place < len(args):
            return (*args[: self.place], value, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


@dataclass
class Site:
    """attention: the layers, in order. tables, rotary: what turns positions into vectors. heads, size: of a layer's
    keys, the same in all layers."""

    attention: list[nn.Module]
    tables: list[nn.Embedding]
    rotary: list[nn.Module]
    heads: int
    size: int


def find_site(component: nn.Module) -> Site:
    """Of a model with an encoder and a decoder the decoder's self-attention, as PEFT's prefixes are.

    Raises AdapterMismatchError for a model whose attention takes no keys from outside, whose layers differ in their
    keys, or whose positions are worked out in a way not known here.
    """
    name, stack = type(component).__name__, _stack(component)
    attention = list(_attention(stack)) or [module for module in stack.modules() if is_disentangled(module)]
    if not attention:
        raise AdapterMismatchError(
            f"{name} cannot take a prefix: none of its attention layers accepts keys from outside "
            f"({' or '.join(CACHES)}); use LoRA, P-tuning or prompt tuning with it"
        )
    shapes = sorted({_keys_shape(module) for module in attention})
    if len(shapes) > 1:
        raise AdapterMismatchError(
            f"{name} cannot take a prefix: its layers' keys differ (heads and head sizes {shapes}), "
            "and a prefix is of one shape for all"
        )
    tables = [
        module
        for path, module in stack.named_modules()
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _TABLES
    ]
    alibi = getattr(getattr(attention[0], "config", None), "alibi", False)
    rotary = [] if alibi else [module for module in stack.modules() if _is_rotary(module)]
    relative = any(hasattr(module, "compute_bias") or is_disentangled(module) for module in attention)
    if not tables and not rotary and not relative:
        raise AdapterMismatchError(
            f"{name} cannot take a prefix: how it tells positions apart is not known here (no table "
            f"{' or '.join(_TABLES)}, no rotary embedding, no bias by distance); "
            "use LoRA, P-tuning or prompt tuning with it"
        )
    return Site(attention, tables, rotary, *shapes[0])


def argument(module: nn.Module, *names: str) -> Argument:
    """The one of these arguments that the module's forward has."""
    known = _positional(module)
    return next(Argument(name, known.index(name)) for name in names if name in known)


def is_disentangled(module: nn.Module) -> bool:
    """Whether this is the attention of DeBERTa v2 and v3."""
    parts = ("query_proj", "key_proj", "value_proj")
    return type(module).__name__ == "DisentangledSelfAttention" and all(part in module._modules for part in parts)


def _stack(component: nn.Module) -> nn.Module:
    """The part of a model whose layers get prefixes: the decoder, where there are two."""
    if getattr(getattr(component, "config", None), "is_encoder_decoder", False) and hasattr(component, "get_decoder"):
        decoder: nn.Module = component.get_decoder()
        return decoder
    return component


def _attention(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost modules that take keys from outside, without those that attend to another model's states."""
    if "CrossAttention" in type(module).__name__ or getattr(module, "is_cross_attention", False):
        return
    children = [child for name, child in module.named_children() if name not in _CROSS]
    inside = [found for child in children for found in _attention(child)]
    yield from inside
    if not inside and hasattr(module, "layer_idx") and hasattr(module, "config"):
        names = _positional(module)
        if not set(CACHES).isdisjoint(names) and not set(MASKS).isdisjoint(names):
            yield module


def _keys_shape(attention: Any) -> tuple[int, int]:
    """(heads, size of each) of a layer's keys; with grouped queries there are fewer than of queries."""
    if is_disentangled(attention):
        return attention.num_attention_heads, attention.attention_head_size
    config = attention.config
    counts = (getattr(attention, "num_kv_heads", None), getattr(config, "num_key_value_heads", None))
    heads = next((count for count in counts if count), config.num_attention_heads)
    sizes = (getattr(attention, name, None) for name in ("head_dim", "attention_head_size", "key_value_proj_dim"))
    return heads, next((size for size in sizes if size), config.hidden_size // config.num_attention_heads)


def _is_rotary(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RotaryEmbedding") and "position_ids" in _positional(module)


def _positional(module: nn.Module) -> list[str]:
    """The names of forward's arguments, self apart, that may be given by place."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
