"""Noise with structure: what it is, and that a batch does not change it."""

from __future__ import annotations

import pytest
import torch

from train.noise import perturbation, pyramid
from train.randomness import Draws


def at(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coarse_share(noise: torch.Tensor) -> float:
    """How much of the variance is left after averaging over 8×8 blocks, times 64: 1 for white noise."""
    return float(torch.nn.functional.avg_pool2d(noise, 8).var() * 64 / noise.var())


def test_a_pyramid_has_large_shapes_and_unit_variance() -> None:
    white = torch.randn(4, 64, 64, generator=at(0))
    assert coarse_share(white) == pytest.approx(1.0, abs=0.2)
    layered = pyramid(white, at(1), 6, 0.8)
    assert float(layered.std()) == pytest.approx(1.0, abs=1e-5)
    assert coarse_share(layered) > 2.0
    assert torch.equal(layered, pyramid(white, at(1), 6, 0.8))
    assert not torch.equal(layered, pyramid(white, at(2), 6, 0.8))


def test_a_pyramid_ends_at_a_point() -> None:
    white = torch.randn(4, 8, 12, generator=at(0))
    assert torch.equal(pyramid(white, at(1), 50, 0.5), pyramid(white, at(1), 500, 0.5))
    assert white.shape == pyramid(white, at(1), 50, 0.5).shape


def test_perturbations_belong_to_samples() -> None:
    draws, noise = Draws(3), torch.zeros(4, 2, 8, 8)
    together = perturbation(draws, "instance", 8, noise, 0.1)
    apart = torch.cat([perturbation(draws, "instance", 8 + row, noise[:1], 0.1) for row in range(4)])
    assert torch.equal(together, apart)
    assert float(together.std()) == pytest.approx(0.1, rel=0.2)
    assert not torch.equal(together, perturbation(draws, "prior", 8, noise, 0.1))
