"""Layers that read the same x: q, k and v of an attention, gate and up of an MLP.

Which they are follows from the modules: brothers under one parent, named as such layers are, of one input width. The
first of them that is called computes for all, and the others, called with the same tensor, take what lies ready. A
brother that is called with another x is computed on its own: a wrong guess costs time and never a result.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .gathered import MIN_TOKENS, run_gathered
from .kernel import Member, Shared, compute_dtype, run_group

if TYPE_CHECKING:
    from .linear import LoraLinear

# The usual names, in the order in which they are called. In cross-attention the first reads another tensor.
_ATTENTION = (
    ("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"), ("add_q_proj", "add_k_proj", "add_v_proj"), ("query_proj", "key_proj", "value_proj"),
)  # fmt: skip
_MLP = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"))
_CROSS_WORDS = ("cross", "encdec", "enc_attn", "encoder_attn", "attn2")


class InputGroup:
    """The brothers and, between their calls, the outputs that were computed ahead."""

    def __init__(self, members: list[LoraLinear]) -> None:
        self.members = members
        self.forget()

    def forget(self) -> None:
        """Drop what depends on which adapters act, and what lies ready."""
        self._acting: list[LoraLinear] | None = None
        self._ready: dict[int, torch.Tensor] = {}
        self._x: Any = None
        self._when: Any = None
        self._alive: list[bool] = []
        self._read: list[torch.Tensor] = []

    def take(self, layer: LoraLinear, x: torch.Tensor) -> torch.Tensor | None:
        """The output of `layer` on x, from what lies ready or by computing for all; None if that cannot be done."""
        if self._ready:
            fresh = self._alive and self._x() is x and self._when == self._now(x)
            if fresh and (y := self._ready.pop(id(layer), None)) is not None:
                return y
            self._ready = {}
        acting = self._acting
        if acting is None:
            acting = self._acting = [m for m in self.members if m.shares_input()]
        if len(acting) < 2 or layer not in acting or not all(m.is_plain_on(x) for m in acting):
            return None
        first = acting[0]
        if any(m.training != first.training for m in acting):
            return None
        members = [m.member() for m in acting]
        self._alive = [True]
        outputs = dict(zip(map(id, acting), _run(acting, x, members, self._alive)))
        mine = outputs.pop(id(layer))
        self._read = [t for m in members for t in (m.weight, *m.a, *m.b) if t is not None]
        self._ready, self._x, self._when = outputs, weakref.ref(x), self._now(x)
        return mine

    def _now(self, x: torch.Tensor) -> tuple[Any, ...]:
        """Everything that has to be as it was for what lies ready to be right: modes, x, weights and factors."""
        modes = (torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type), self.members[0].training)
        return (*modes, _version(x), *[_version(t) for t in self._read])

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles start with nothing ready
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.members = state["members"]
        self.forget()


def find_groups(component: nn.Module, layers: Mapping[str, LoraLinear]) -> list[list[LoraLinear]]:
    """The groups among `layers` ({path in component: layer}), each in calling order, two members at least."""
    brothers: dict[str, dict[str, LoraLinear]] = {}
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        brothers.setdefault(parent, {})[name] = layer
    groups = []
    for parent, named in brothers.items():
        module = component.get_submodule(parent) if parent else component
        # DeBERTa's k reads positions too.
        attention = () if getattr(module, "relative_attention", False) else _ATTENTION
        start = 1 if _is_cross(parent, module) else 0
        groups += [[named[n] for n in names[start:] if n in named] for names in attention]
        groups += [[named[n] for n in names if n in named] for names in _MLP]
    return [g for group in groups for g in _of_one_width(group)]


def _of_one_width(layers: list[LoraLinear]) -> list[list[LoraLinear]]:
    widths: dict[int, list[LoraLinear]] = {}
    for layer in layers:
        widths.setdefault(layer.shapes(layer, 1)[0][1], []).append(layer)
    return [group for group in widths.values() if len(group) > 1]


def _is_cross(path: str, attention: nn.Module) -> bool:
    said = getattr(attention, "is_cross_attention", None)
    if isinstance(said, bool):
        return said
    return any(word in path.lower() for word in _CROSS_WORDS)


def _version(x: torch.Tensor) -> int:
    return -1 if x.is_inference() else x._version


def single(layer: LoraLinear, x: torch.Tensor, member: Member) -> torch.Tensor:
    """The output of one layer that shares its input with no other."""
    return _run([layer], x, [member], [])[0]


def _run(layers: list[LoraLinear], x: torch.Tensor, members: list[Member], alive: list[bool]) -> tuple[Any, ...]:
    dropout = layers[0].dropout()
    if layers[0]._rows is None:
        return run_group(x, members, Shared(dropout, None, alive))
    gathers = [layer.gather(x) for layer in layers]
    if x.numel() >= MIN_TOKENS * x.shape[0] * x.shape[-1]:
        return run_gathered(x, members, gathers, dropout, alive, compute_dtype(x))
    rows = [gather.stacked(sum(a.shape[0] for a in m.a)) for gather, m in zip(gathers, members)]
    return run_group(x, members, Shared(dropout, torch.cat(rows, dim=1), alive))
