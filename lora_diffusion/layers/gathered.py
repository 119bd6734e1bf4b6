"""The arithmetic of `kernel.py` for a batch whose rows use different adapters.

Each row's A and B are taken out of the stack of all, and multiplied row by row in one batched product (as S-LoRA, Sheng
et al. 2023, and Punica, Chen et al. 2023, do), so that the cost does not grow with the number of adapters:

    y_i = W·x_i + b + B_i · (s_i ∘ (A_i · dropout(x_i)))        for each row i of the batch

For a few tokens per row, `kernel.py`'s one product with the whole stack is faster, though it computes every adapter's
term for every row.

Shapes: x (batch, …, in), A_i (R, in), B_i (R, out) on its side, h (batch, R, tokens).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel import Member, drop_mask, new_seed, stack, unflatten
from .rows import Gather

MIN_TOKENS = 4  # in a row; below, the stack is faster (a CPU, eight adapters of rank 16)


def run_gathered(
    x: Tensor, members: list[Member], gathers: list[Gather], dropout: float, alive: list[bool], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """As `kernel.run_group`, one Gather for each member."""
    seed = new_seed() if dropout else 0
    counts = tuple((m.weight is not None, m.bias is not None, len(m.a), m.factors) for m in members)
    index, spans, start, offset = [], [], 0, 0
    for m, gather in zip(members, gathers):
        index.append(gather.index + offset)
        spans.append(slice(start, start + gather.index.shape[1]))
        start, offset = start + gather.index.shape[1], offset + sum(a.shape[0] for a in m.a)
    plan = _Plan(
        torch.cat(index, dim=1),
        torch.cat([gather.strength for gather in gathers], dim=1).to(dtype),
        [gather.index for gather in gathers],
        spans,
    )
    flat = [t for m in members for t in (m.weight, m.bias, m.base, *m.a, *m.b) if t is not None]
    if not torch.is_grad_enabled():
        return _forward(x, dtype, counts, plan, dropout, seed, flat)[0]
    return _Gathered.apply(x, dtype, counts, plan, dropout, seed, alive, *flat)


class _Plan:
    """index, strength: (batch, R) over the whole group's stack of A; own: each member's index into its own B;
    spans: each member's part of R."""

    def __init__(self, index: Tensor, strength: Tensor, own: list[Tensor], spans: list[slice]) -> None:
        self.index, self.strength, self.own, self.spans = index, strength, own, spans


def _taken(stacked: Tensor, index: Tensor) -> Tensor:
    """Rows of (Σr, n) by (batch, R): (batch, R, n)."""
    return stacked.index_select(0, index.flatten()).view(*index.shape, -1)


def _lying(m: Member, dtype: torch.dtype) -> Tensor:
    """All B of a member, (Σr, out)."""
    return (m.b[0] if len(m.b) == 1 else torch.cat(m.b, dim=1)).t().to(dtype)


def _forward(
    x: Tensor, dtype: torch.dtype, counts: tuple, plan: _Plan, dropout: float, seed: int, flat: Any
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(outputs, x as (batch, tokens, in) in the computing dtype, h)."""
    x3 = x.to(dtype).reshape(x.shape[0], -1, x.shape[-1])
    members = unflatten(counts, flat)
    source = x3 * drop_mask(x3, dropout, seed) if dropout else x3
    a = _taken(stack([a for m in members for a in m.a], dtype), plan.index)
    h = (a @ source.mT).mul_(plan.strength.unsqueeze(2))
    outputs = []
    for m, own, span in zip(members, plan.own, plan.spans):
        if m.base is not None:
            y = m.base.reshape(x.shape[0], -1, m.base.shape[-1])
        else:
            assert m.weight is not None, "a member has a weight where it has no base output"
            y = F.linear(x3, m.weight.to(dtype), None if m.bias is None else m.bias.to(dtype))
        b, alpha = _taken(_lying(m, dtype), own), 1.0 / (1.0 - dropout)
        if y.dtype != dtype:
            y = y + (alpha * (h[:, span].mT @ b)).to(y.dtype)
        elif m.base is not None:
            y = torch.baddbmm(y, h[:, span].mT, b, alpha=alpha)
        else:
            y.baddbmm_(h[:, span].mT, b, alpha=alpha)
        outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
    return tuple(outputs), x3, h


class _Gathered(torch.autograd.Function):
    """`_forward` with its derivative written out."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, counts: tuple, plan: _Plan, dropout: float, seed: int,
        alive: list[bool], *flat: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        outputs, x3, h = _forward(x, dtype, counts, plan, dropout, seed, flat)
        ctx.set_materialize_grads(False)
        ctx.counts, ctx.plan, ctx.dropout, ctx.seed, ctx.dtype, ctx.alive = counts, plan, dropout, seed, dtype, alive
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        kept = [t for m in unflatten(counts, flat) for t in (m.weight, *m.a, *m.b) if t is not None]
        ctx.save_for_backward(x3, h, *kept)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x3, h, *kept = ctx.saved_tensors
        ctx.alive.clear()
        plan, dtype, alpha = ctx.plan, ctx.dtype, 1.0 / (1.0 - ctx.dropout)
        members = unflatten([(has_weight, False, n, f) for has_weight, _, n, f in ctx.counts], kept, base=False)
        wants_x, learns = ctx.needs_input_grad[0], any(ctx.needs_input_grad[7:])
        dh, dx, back = torch.zeros_like(h), None, []
        for (has_weight, has_bias, _, _), m, grad, own, span in zip(ctx.counts, members, grads, plan.own, plan.spans):
            back += [None] * (has_weight + has_bias) + ([] if has_weight else [grad])
            start = len(back)
            back += [None] * (len(m.a) + len(m.b))
            if grad is None:
                continue
            dy = grad.reshape(grad.shape[0], -1, grad.shape[-1]).to(dtype)
            if wants_x and m.weight is not None:
                part = dy @ m.weight.to(dtype)
                dx = part if dx is None else dx.add_(part)
            torch.baddbmm(dh[:, span], _taken(_lying(m, dtype), own), dy.mT, beta=0, alpha=alpha, out=dh[:, span])
            if learns:
                whole = _put_back(h[:, span] @ dy, own, sum(b.shape[1] for b in m.b)).mul_(alpha)
                pieces = whole.split([b.shape[1] for b in m.b])
                back[start + len(m.a) :] = [p.t().to(b.dtype).contiguous() for p, b in zip(pieces, m.b)]
        dh.mul_(plan.strength.unsqueeze(2))
        mask = drop_mask(x3, ctx.dropout, ctx.seed) if ctx.dropout else None
        stacked = stack([a for m in members for a in m.a], dtype)
        if wants_x:
            own_dx = dh.mT @ _taken(stacked, plan.index)
            own_dx = own_dx if mask is None else own_dx.mul_(mask)
            dx = own_dx if dx is None else dx.add_(own_dx)
        if learns:
            da = _put_back(dh @ (x3 if mask is None else x3 * mask), plan.index, stacked.shape[0])
            _place(back, ctx.counts, members, grads, da)
        return (None if dx is None else dx.view(ctx.x_shape).to(ctx.x_dtype), None, None, None, None, None, None, *back)


def _put_back(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """The reverse of `_taken`: (batch, R, n) added up into (count, n)."""
    whole = rows.new_zeros(count, rows.shape[-1])
    return whole.index_add_(0, index.flatten(), rows.reshape(-1, rows.shape[-1]))


def _place(back: list[Any], counts: Any, members: list[Member], grads: Any, da: Tensor) -> None:
    """Put the gradients of every A to their places among forward's arguments."""
    place, row = 0, 0
    for (has_weight, has_bias, _, _), m, grad in zip(counts, members, grads):
        place += has_weight + has_bias + (not has_weight)
        for a in m.a:
            back[place] = None if grad is None else da[row : row + a.shape[0]].to(a.dtype)
            place, row = place + 1, row + a.shape[0]
        place += len(m.b)
