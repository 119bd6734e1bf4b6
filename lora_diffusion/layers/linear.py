"""The low-rank term beside a Linear layer; the arithmetic is in `kernel.py`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .composed import compose, compose_all
from .group import single
from .host import AdaptedModule
from .kernel import Member, compute_dtype
from .rows import Gather

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class LoraLinear(AdaptedModule):
    """A Linear layer with any number of low-rank terms; without an active one it is the Linear layer's own forward.

    x: (…, in), y: (…, out), A: (r, in), B: (out, r). Outputs have the dtype that the base layer's would have.
    """

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, module.in_features), (module.out_features, rank)

    @staticmethod
    def is_plain(base: type[nn.Module]) -> bool:
        return base.forward is nn.Linear.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return (compose_all if self._rows is None else compose)(self, x, super().forward(x))
        if self._simple and self._rows is None and not torch.is_grad_enabled():
            y = self._quick(x)
            if y is not None:
                return y
        if not self._active and self._rows is None:
            return super().forward(x)
        if self._group is not None and (y := self._group.take(self, x)) is not None:
            return y
        if not self.shares_input():  # DoRA, or dropouts that differ
            return compose(self, x, super().forward(x))
        if self.is_plain_on(x):
            return single(self, x, self.member())
        return single(self, x, self.member(super().forward(x)))

    def _quick(self, x: torch.Tensor) -> torch.Tensor | None:
        """The commonest case, plain adapters and no gradient, with as little around the products as possible; None
        where it is not that simple. Sharing x with other layers gains less than it costs here."""
        mine, dtype = self._parameters, x.dtype
        weight: Any = mine["weight"]
        if weight.dtype is not dtype or type(weight) is not nn.Parameter or torch.is_autocast_enabled(x.device.type):
            return None
        for part, own, _ in self._simple:
            if own["lora_A"].dtype is not dtype or (part.dropout and self.training):
                return None
        y = F.linear(x, weight.t() if self.transposed else weight, mine["bias"])
        onto = y if y.ndim == 2 else y.view(-1, y.shape[-1])
        for _, own, factor in self._simple:
            h = F.linear(x, own["lora_A"])
            onto.addmm_(h if h.ndim == 2 else h.view(-1, h.shape[-1]), own["lora_B"].t(), alpha=factor)
        return y

    def shares_input(self) -> bool:
        """Whether this layer has terms now that the kernel knows."""
        acting = self._active if self._rows is None else self._rows.parts
        if not acting or any(part.lora_magnitude_vector is not None for part, _ in acting):
            return False
        return not self.training or len({part.dropout for part, _ in acting}) == 1

    def dropout(self) -> float:
        acting = self._active if self._rows is None else self._rows.parts
        return acting[0][0].dropout if self.training else 0.0

    def is_plain_on(self, x: torch.Tensor) -> bool:
        """Whether the kernel may compute the base layer too: an ordinary frozen weight in the dtype that x asks for."""
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        return (
            self._plain
            and type(weight) is nn.Parameter
            and weight.dtype in _FLOATS
            and (weight.dtype == x.dtype or compute_dtype(x) != x.dtype)
            and not (torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)))
        )

    def member(self, base: torch.Tensor | None = None) -> Member:
        terms = self.terms()
        a, b, factors = zip(*terms)
        if base is not None:
            return Member(None, None, base, a, b, factors)
        return Member(self.oriented_weight(), self._parameters["bias"], None, a, b, factors)

    def oriented_weight(self) -> torch.Tensor:
        """The weight as (out, in)."""
        return self._parameters["weight"]

    def low(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return F.linear(x, a.to(x.dtype))

    def up(self, h: torch.Tensor, b: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        b = b.to(h.dtype)
        if onto is None or onto.dtype != h.dtype:
            term = F.linear(h, b)
            return term if onto is None else onto + term.to(onto.dtype)
        return torch.addmm(onto.reshape(-1, onto.shape[-1]), h.reshape(-1, h.shape[-1]), b.t()).view(onto.shape)

    def low_rows(self, x: torch.Tensor, a: torch.Tensor, gather: Gather) -> torch.Tensor:
        own = a.to(x.dtype).index_select(0, gather.index.flatten()).view(*gather.index.shape, -1)
        h = x.reshape(x.shape[0], -1, x.shape[-1]) @ own.mT
        return (h * gather.strength.unsqueeze(1).to(h.dtype)).view(*x.shape[:-1], -1)

    def up_rows(self, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (h.reshape(h.shape[0], -1, h.shape[-1]) @ b.to(h.dtype)).view(*h.shape[:-1], -1)

    def base(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.matrix(self).to(x.dtype))
