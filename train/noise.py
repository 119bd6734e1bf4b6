"""Noise that is not white: pyramids of it, and noise that the model is shown but not asked for.

Each sample is treated alone and from a generator of its own, so that a batch changes nothing.
"""

from __future__ import annotations

import torch

from train.randomness import Draws


def pyramid(noise: torch.Tensor, generator: torch.Generator, iterations: int, discount: float) -> torch.Tensor:
    """Noise with coarser noise on top, so that a picture's large shapes are learned too (Whitaker, 2023).

    Each level is coarser than the last by a random factor from 2 to 4 and weaker by `discount`; the sum is brought back
    to unit variance. Levels, factors and the first level (as fine as the noise itself) are those of kohya's scripts.

    Args:
        noise: (channels, height, width).
        generator: used for factors and levels.
        iterations: levels at most; they end where one is a single point wide or high.
        discount: each level is this times the strength of the one before it.
    """
    height, width = noise.shape[-2:]
    total = noise.clone()
    for level in range(iterations):
        factor = float(torch.rand((), generator=generator)) * 2.0 + 2.0
        size = max(1, int(height / factor**level)), max(1, int(width / factor**level))
        coarse = torch.randn(1, noise.shape[0], *size, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
        total = total + discount**level * smooth[0]
        if 1 in size:
            break
    return total / total.std()


def perturbation(draws: Draws, stream: str, first: int, noise: torch.Tensor, strength: float) -> torch.Tensor:
    """What is added to the noise in the model's input only, against overfitting (Ning et al., 2023).

    Args:
        draws, stream: where it is drawn.
        first: the number of the batch's first sample, over the whole run.
        noise: (batch, channels, height, width); the result is like it.
        strength: its standard deviation.
    """
    rows = [
        torch.randn(noise.shape[1:], generator=draws.at(f"{stream}/perturbation", first + row))
        for row in range(len(noise))
    ]
    return strength * torch.stack(rows).to(noise.device)
