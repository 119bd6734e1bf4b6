"""Latents, computed once: the autoencoder runs before training and then leaves memory.

What the encoder gives is a distribution, and training on one fixed sample of it loses detail. So its mean and standard
deviation are kept (twice the memory of next to nothing: 128 KiB for a 512×512 picture) and a fresh sample is drawn each
time a picture comes up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from train.randomness import Draws

ENCODE_BATCH = 4


@dataclass(frozen=True)
class Sample:
    """One training sample: latents and noise of shape (channels, height, width) in fp32, a timestep, and what is said
    of the picture."""

    latents: torch.Tensor
    noise: torch.Tensor
    timestep: int
    caption: str


class LatentBank:
    """The encoded pictures of one folder.

    Args:
        means, stds: for each picture, (crops, channels, height, width) in fp32 on the CPU.
        captions: what is said of each picture.
        scaling: the factor that brings latents to the UNet's scale (`vae.config.scaling_factor`).
        stream: the name under which this bank draws.
    """

    def __init__(
        self, means: list[torch.Tensor], stds: list[torch.Tensor], captions: list[str], scaling: float, stream: str
    ) -> None:
        self.means, self.stds, self.captions, self.scaling, self.stream = means, stds, captions, scaling, stream

    def __len__(self) -> int:
        return len(self.means)

    def draw(self, draws: Draws, position: int, timesteps: int, noise_offset: float = 0.0) -> Sample:
        """The sample at `position` of an endless shuffled pass over the pictures.

        It follows from the seed and `position` alone, so accumulating two batches of one is the same as a batch of two.
        """
        picture = draws.shuffled(self.stream, position, len(self))
        crop = position // len(self) % len(self.means[picture])
        mean, std = self.means[picture][crop], self.stds[picture][crop]
        generator = draws.at(f"{self.stream}/sample", position)
        latents = (mean + std * torch.randn(mean.shape, generator=generator)) * self.scaling
        noise = torch.randn(mean.shape, generator=generator)
        timestep = int(torch.randint(timesteps, (1,), generator=generator))
        if noise_offset:
            noise = noise + noise_offset * torch.randn(mean.shape[0], 1, 1, generator=generator)
        return Sample(latents, noise, timestep, self.captions[picture])


@torch.no_grad()
def encode(
    vae: Any,
    pictures: Sequence[Sequence[torch.Tensor]],
    captions: list[str],
    stream: str,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentBank:
    """Encode pictures with the autoencoder.

    The encoder runs in fp32, because half precision costs visible detail (or, with SDXL's kin, gives NaN); afterwards
    it has its own precision again, with the same bits.

    Args:
        vae: an `AutoencoderKL`, on the device where it is to run.
        pictures: for each picture its crops, (3, side, side) in [-1, 1].
        captions, stream: see `LatentBank`.
        on_progress: called with (pictures done, pictures in all).
    """
    dtype = vae.dtype
    if dtype != torch.float32:
        vae.to(torch.float32)
    means, stds = [], []
    flat = [crop for crops in pictures for crop in crops]
    for start in range(0, len(flat), ENCODE_BATCH):
        batch = torch.stack(list(flat[start : start + ENCODE_BATCH])).to(vae.device)
        posterior = vae.encode(batch).latent_dist
        means.extend(posterior.mean.cpu().contiguous())
        stds.extend(posterior.std.cpu().contiguous())
        if on_progress is not None:
            on_progress(min(start + ENCODE_BATCH, len(flat)), len(flat))
    if dtype != torch.float32:
        vae.to(dtype)
    counts = [len(crops) for crops in pictures]
    scaling = float(vae.config.scaling_factor)
    return LatentBank(_regroup(means, counts), _regroup(stds, counts), captions, scaling, stream)


def _regroup(flat: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
    groups, start = [], 0
    for count in counts:
        groups.append(torch.stack(flat[start : start + count]))
        start += count
    return groups
