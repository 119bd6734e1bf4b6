"""The arithmetic of adapted linear layers that read one x: one autograd node for all of them.

    y_m = W_m·x + b_m + Σ_i f_mi · B_mi · A_mi · dropout(x)        for each layer m of the group (Hu et al. 2021, eq. 3)

What it does that a layer written with autograd's own operations does not: x is read once by the stacked A of the whole
group, the low-rank term is accumulated into the base layer's product, all of dx into one tensor, and what is kept for
backward is one reference to x and the rank-wide product h = A·xᵀ. The factors are cast to x's dtype, never x to
theirs; their gradients come back in their own dtype. Dropout is drawn again from its seed in backward.

Shapes: x (…, in), y (…, out), A (r, in), B (out, r), h (Σr, rows): lying on its side, because matrix products of a few
wide rows are up to four times as fast on a CPU as those of a few long columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Member(NamedTuple):
    """One layer of a group.

    weight, bias: the base layer's, (out, in) and (out,); or, where another implementation computes the base layer
        (a quantised one, a subclass), `base`: its output (…, out).
    a, b: the factors of its active terms; factors: what multiplies each B·A (the adapter's scale times its weight).
    """

    weight: Tensor | None
    bias: Tensor | None
    base: Tensor | None
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    factors: tuple[float, ...]


class Shared(NamedTuple):
    """What holds for the whole group: dropout's probability (0 is none) and, for batches whose rows use different
    adapters, `rows`, (batch, Σr): what multiplies each column of h in each row, in place of the factors.
    `alive` is emptied when backward has been through, after which outputs that nobody took are of no use."""

    dropout: float
    rows: Tensor | None
    alive: list[bool]


def run_group(x: Tensor, members: list[Member], shared: Shared) -> tuple[Tensor, ...]:
    """The outputs of all members, (…, out) each, in x's dtype or, under autocast, in autocast's."""
    dtype = compute_dtype(x)
    counts = tuple((m.weight is not None, m.bias is not None, len(m.a), m.factors) for m in members)
    seed = new_seed() if shared.dropout else 0
    flat = [t for m in members for t in (m.weight, m.bias, m.base, *m.a, *m.b) if t is not None]
    if not torch.is_grad_enabled():
        return _forward(x, dtype, counts, shared, seed, flat)[0]
    return _Group.apply(x, dtype, counts, shared, seed, *flat)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes on x here: autocast's where it is on, else x's own."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _forward(
    x: Tensor, dtype: torch.dtype, counts: tuple, shared: Shared, seed: int, flat: Any
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(outputs, x as two-dimensional and in the computing dtype, h)."""
    x2 = x.to(dtype).reshape(-1, x.shape[-1])
    members = unflatten(counts, flat)
    source = x2 * drop_mask(x2, shared.dropout, seed) if shared.dropout else x2
    h = stack([a for m in members for a in m.a], dtype) @ source.t()
    if shared.rows is not None:
        _scale_rows(h, shared.rows)
    outputs, start = [], 0
    for m in members:
        width = sum(a.shape[0] for a in m.a)
        part = h[start : start + width].t()
        start += width
        if m.base is not None:
            y = m.base.reshape(-1, m.base.shape[-1])
            if width and y.dtype == dtype:
                y = torch.addmm(y, part, _factored(m, shared, dtype).t(), alpha=_alpha(m, shared))
            elif width:
                y = y + (_alpha(m, shared) * (part @ _factored(m, shared, dtype).t())).to(y.dtype)
            outputs.append(y.view(m.base.shape))
            continue
        assert m.weight is not None, "a member has a weight where it has no base output"
        y = F.linear(x2, m.weight.to(dtype), None if m.bias is None else m.bias.to(dtype))
        if width:
            y.addmm_(part, _factored(m, shared, dtype).t(), alpha=_alpha(m, shared))
        outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
    return tuple(outputs), x2, h


class _Group(torch.autograd.Function):
    """`_forward` with its derivative written out."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, counts: tuple, shared: Shared, seed: int, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, x2, h = _forward(x, dtype, counts, shared, seed, flat)
        ctx.set_materialize_grads(False)
        ctx.counts, ctx.shared, ctx.seed, ctx.dtype = counts, shared, seed, dtype
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        kept = [t for m in unflatten(counts, flat) for t in (m.weight, *m.a, *m.b) if t is not None]
        ctx.save_for_backward(x2, h, *kept)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x2, h, *kept = ctx.saved_tensors
        ctx.shared.alive.clear()
        counts, shared, dtype = ctx.counts, ctx.shared, ctx.dtype
        members = unflatten([(has_weight, False, n, f) for has_weight, _, n, f in counts], kept, base=False)
        needed, learns = ctx.needs_input_grad, any(ctx.needs_input_grad[5:])
        dh = torch.zeros_like(h) if any(g is None for g in grads) else torch.empty_like(h)
        dx: Tensor | None = None
        db: list[list[Tensor | None]] = []
        start = 0
        for m, grad in zip(members, grads):
            width = sum(a.shape[0] for a in m.a)
            span = slice(start, start + width)
            start += width
            if grad is None:
                db.append([None] * len(m.b))
                continue
            dy = grad.reshape(-1, grad.shape[-1]).to(dtype)
            if needed[0] and m.weight is not None:
                w = m.weight.to(dtype)
                dx = dy @ w if dx is None else dx.addmm_(dy, w)
            if width:
                dh[span].addmm_(_factored(m, shared, dtype).t(), dy.t(), beta=0, alpha=_alpha(m, shared))
                db.append(_grad_b(dy, h[span], m, shared) if learns else [None] * len(m.b))
            else:
                db.append([])
        if shared.rows is not None:
            _scale_rows(dh, shared.rows)
        stacked = stack([a for m in members for a in m.a], dtype)
        mask = drop_mask(x2, shared.dropout, ctx.seed) if shared.dropout else None
        if needed[0]:
            if mask is not None:
                back = (dh.t() @ stacked).mul_(mask)
                dx = back if dx is None else dx.add_(back)
            else:
                dx = dh.t() @ stacked if dx is None else dx.addmm_(dh.t(), stacked)
        da = dh @ (x2 if mask is None else x2 * mask) if learns else None
        return _grads(ctx, grads, members, dx, da, db)


def _grads(
    ctx: Any, grads: Any, members: list[Member], dx: Tensor | None, da: Tensor | None, db: Any
) -> tuple[Any, ...]:
    """Backward's answer in the order of forward's arguments."""
    out: list[Tensor | None] = []
    start = 0
    for (has_weight, has_bias, _, _), m, grad, own in zip(ctx.counts, members, grads, db):
        out += [None] * (has_weight + has_bias)  # a base layer that learns goes another way: `LoraLinear.is_plain_on`
        if not has_weight:
            out.append(grad)
        for a in m.a:
            out.append(None if grad is None or da is None else da[start : start + a.shape[0]].to(a.dtype))
            start += a.shape[0]
        out += own
    back = None if dx is None else dx.view(ctx.x_shape).to(ctx.x_dtype)
    return (back, None, None, None, None, *out)


def unflatten(counts: Any, flat: Any, base: bool = True) -> list[Member]:
    """Members again, from the flat tensors that autograd wants. base=False: the outputs of other base layers were not
    kept."""
    tensors, members = iter(flat), []
    for has_weight, has_bias, terms, factors in counts:
        weight = next(tensors) if has_weight else None
        bias = next(tensors) if has_bias else None
        given = next(tensors) if base and not has_weight else None
        a = tuple([next(tensors) for _ in range(terms)])
        b = tuple([next(tensors) for _ in range(terms)])
        members.append(Member(weight, bias, given, a, b, factors))
    return members


def stack(factors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """All A of a group on top of each other, (Σr, in)."""
    return (factors[0] if len(factors) == 1 else torch.cat(factors)).to(dtype)


def _factored(m: Member, shared: Shared, dtype: torch.dtype) -> Tensor:
    """All B of one member side by side, (out, Σr), times their factors unless `_alpha` or the rows carry those."""
    if len(m.b) == 1:
        return m.b[0].to(dtype)
    if shared.rows is not None or len(set(m.factors)) == 1:
        return torch.cat(m.b, dim=1).to(dtype)
    return torch.cat([b * f for b, f in zip(m.b, m.factors)], dim=1).to(dtype)


def _alpha(m: Member, shared: Shared) -> float:
    scale = 1.0 / (1.0 - shared.dropout)
    return scale * m.factors[0] if shared.rows is None and len(set(m.factors)) == 1 else scale


def _grad_b(dy: Tensor, h: Tensor, m: Member, shared: Shared) -> list[Tensor | None]:
    """The gradients of one member's B, each in its own dtype."""
    scale = 1.0 / (1.0 - shared.dropout)
    pieces = (h @ dy).split([b.shape[1] for b in m.b])
    factors = m.factors if shared.rows is None else [1.0] * len(m.b)
    return [piece.t().to(b.dtype).contiguous().mul_(scale * f) for piece, b, f in zip(pieces, m.b, factors)]


def _scale_rows(h: Tensor, rows: Tensor) -> None:
    """Multiply h (Σr, batch · tokens) in place by rows (batch, Σr)."""
    h.view(h.shape[0], rows.shape[0], -1).mul_(rows.t()[:, :, None])


def new_seed() -> int:
    """From the CPU's global generator, whose state checkpointing restores: a recomputed forward drops the same."""
    return int(torch.randint(2**62, ()))


def drop_mask(x: Tensor, probability: float, seed: int) -> Tensor:
    """Which elements of x stay, as bool. Sixteen random bits decide for each element; a quarter of the draws."""
    count = x.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=x.device)
    bits.random_(-(2**63), None, generator=torch.Generator(x.device).manual_seed(seed))
    threshold = round(probability * 65536) - 32768
    return (bits.view(torch.int16)[:count] >= threshold).view(x.shape)
