"""A mixed batch's arithmetic: values against the plain formula, derivatives against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_diffusion.layers.gathered import run_gathered
from lora_diffusion.layers.kernel import Member
from lora_diffusion.layers.rows import Gather

RANKS = (2, 3)  # of the two adapters; rows 0 and 2 use the first, row 1 the second, row 3 none
INDEX = torch.tensor([[0, 1, 0], [2, 3, 4], [0, 1, 0], [0, 0, 0]])
STRENGTH = torch.tensor([[0.5, 0.5, 0], [2, 2, 2], [-1, -1, 0], [0, 0, 0]])


def inputs(outs: tuple[int, ...], tokens: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float64) -> Any:
    """x, and for each layer of the group its weight, bias, both adapters' A and B."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x = draw(4, *tokens, 5)
    layers = [(draw(out, 5), draw(out), [draw(r, 5) for r in RANKS], [draw(out, r) for r in RANKS]) for out in outs]
    return x, layers


def run(x: Tensor, layers: Any, dropout: float = 0.0) -> tuple[Tensor, ...]:
    members = [Member(w, bias, None, tuple(a), tuple(b), (1.0, 1.0)) for w, bias, a, b in layers]
    return run_gathered(x, members, [Gather(INDEX, STRENGTH)] * len(members), dropout, [], x.dtype)


def formula(x: Tensor, layers: Any) -> list[Tensor]:
    results = []
    for w, bias, a, b in layers:
        y = x @ w.T + bias
        for row, (which, strength) in enumerate(((0, 0.5), (1, 2.0), (0, -1.0), (None, 0.0))):
            if which is not None:
                y[row] = y[row] + strength * (x[row] @ a[which].T @ b[which].T)
        results.append(y)
    return results


@pytest.mark.parametrize("tokens", [(), (3,), (2, 3)])
@pytest.mark.parametrize("grad", [False, True])
def test_values(tokens: tuple[int, ...], grad: bool) -> None:
    x, layers = inputs((4, 6), tokens)
    with torch.set_grad_enabled(grad):
        for got, wanted in zip(run(x, layers), formula(x, layers), strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_derivatives(dropout: float) -> None:
    x, layers = inputs((4, 3))
    factors = [t for _, _, a, b in layers for t in (*a, *b)]
    for t in (x, *factors):
        t.requires_grad_(True)

    def outputs(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)  # the same elements are dropped every time
        given = [(w, c, factors[4 * k : 4 * k + 2], factors[4 * k + 2 : 4 * k + 4]) for k, (w, c, *_) in
                 enumerate(layers)]  # fmt: skip
        return run(x, given, dropout)

    assert torch.autograd.gradcheck(outputs, (x, *factors))


def test_an_output_that_nobody_uses() -> None:
    x, layers = inputs((4, 3))
    factors = [t.requires_grad_(True) for _, _, a, b in layers for t in (*a, *b)]
    run(x.requires_grad_(True), layers)[1].sum().backward()
    assert [t.grad is None for t in factors] == [True] * 4 + [False] * 4
    wanted = [t.detach().clone().requires_grad_(True) for t in factors]
    again = x.detach().clone().requires_grad_(True)
    formula(again, [(*layers[1][:2], wanted[4:6], wanted[6:])])[0].sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    for got, t in zip(factors[4:], wanted[4:], strict=True):
        torch.testing.assert_close(got.grad, t.grad)


def test_half_precision_with_masters_in_single() -> None:
    x, layers = inputs((4,), dtype=torch.bfloat16)
    (w, bias, a, b), *_ = layers
    masters = [[t.float().requires_grad_(True) for t in ts] for ts in (a, b)]
    (y,) = run(x, [(w, bias, *masters)])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, formula(x.float(), [(w.float(), bias.float(), *masters)])[0].bfloat16(), rtol=2e-2,
                               atol=0.2)  # fmt: skip
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for ts in masters for t in ts)
