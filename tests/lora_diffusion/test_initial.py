"""Initial factors: distributions and determinism."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lora_diffusion as ld
from lora_diffusion.initial import initial_factors


def test_default_is_kaiming_uniform_for_a_and_zero_for_b() -> None:
    torch.manual_seed(0)
    a, b = initial_factors((8, 400), (5, 8), True)
    torch.manual_seed(0)
    assert torch.equal(a, nn.init.kaiming_uniform_(torch.empty(8, 400), a=math.sqrt(5)))
    assert not b.any()


def test_gaussian_has_deviation_one_over_r() -> None:
    a, b = initial_factors((16, 4000), (5, 16), "gaussian", torch.Generator().manual_seed(0))
    assert float(a.std()) == pytest.approx(1 / 16, rel=0.01)
    assert not b.any()


def test_false_fills_both() -> None:
    a, b = initial_factors((4, 8), (5, 4), False)
    assert a.any()
    assert b.any()


def test_follows_the_global_seed_or_the_generator(toy: nn.Module) -> None:
    def values(generator: torch.Generator | None = None) -> list[torch.Tensor]:
        ld.add_adapter(toy, ld.LoraConfig(r=2), generator=generator)
        out = [parameter.detach().clone() for parameter in ld.adapter_parameters(toy)["model"]]
        ld.unload(toy)
        return out

    torch.manual_seed(5)
    first = values()
    torch.manual_seed(5)
    again = values()
    other = values()
    drawn, redrawn = (values(torch.Generator().manual_seed(9)) for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, drawn, redrawn))
    assert not torch.equal(first[0], other[0])
