"""Latents, computed once: the autoencoder runs before training and then leaves memory.

What the encoder gives is a distribution, and training on one fixed sample of it loses detail. So its mean and standard
deviation are kept (twice the memory of next to nothing: 128 KiB for a 512×512 picture) and a fresh sample is drawn each
time a picture comes up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from train.augment import Crop
from train.families import Sizes
from train.randomness import Draws

ENCODE_BATCH = 4


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Attributes:
        latents, noise: (channels, height, width) in fp32.
        timestep: from 0 to below the number that was asked for.
        caption: what is said of the picture.
        sizes: what SDXL is told of the picture: (original height, original width, top, left, height, width) in pixels.
        mask: (1, height, width) fp32, how much each place of the latents counts; None where all count alike.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timestep: int
    caption: str
    sizes: Sizes
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class View:
    """One crop of a picture, encoded: mean and std of (channels, height, width), fp32 on the CPU; the rest as in
    `Sample`."""

    mean: torch.Tensor
    std: torch.Tensor
    sizes: Sizes
    mask: torch.Tensor | None = None


class Order:
    """Which picture comes at which position of an endless pass, where pictures of different shapes never share a step.

    The samples of one optimizer step (`group` of them) all come from one bucket. In a round of as many steps as there
    are pictures, each bucket has as many steps as it has pictures, in shuffled order; inside a bucket, pictures are
    shuffled anew in every pass. So each picture comes up equally often, whatever its bucket, and how a step is split
    into batches makes no difference.

    Args:
        buckets: for each picture, what it can share a batch with.
        group: samples in one optimizer step.
        stream: the name under which the order is drawn.
    """

    def __init__(self, buckets: Sequence[tuple[int, ...]], group: int, stream: str) -> None:
        shapes = sorted(set(buckets))
        self._members = [[number for number, one in enumerate(buckets) if one == shape] for shape in shapes]
        # One bucket draws under the plain name: buckets that are not needed change nothing.
        self._streams = [stream] if len(shapes) == 1 else [f"{stream}/{shape}" for shape in shapes]
        self._labels = [label for label, members in enumerate(self._members) for _ in members]
        self._group, self._stream = group, stream

    def at(self, draws: Draws, position: int) -> tuple[int, int]:
        """The picture at a position, and how often it was taken before."""
        label, place = (0, position) if len(self._members) == 1 else self._bucket_at(draws, position)
        members = self._members[label]
        picture = members[draws.shuffled(self._streams[label], place, len(members))]
        return picture, place // len(members)

    def _bucket_at(self, draws: Draws, position: int) -> tuple[int, int]:
        """The bucket at a position, and how many samples were taken from it before."""
        step, row = divmod(position, self._group)
        turn, slot = divmod(step, len(self._labels))
        shuffled = torch.randperm(len(self._labels), generator=draws.at(f"{self._stream}/buckets", turn)).tolist()
        labels = [self._labels[number] for number in shuffled[: slot + 1]]
        label = labels[-1]
        steps_before = turn * len(self._members[label]) + labels.count(label) - 1
        return label, steps_before * self._group + row


class LatentBank:
    """The encoded pictures of one folder.

    Args:
        pictures: the views of each picture; with `flipped`, the second half mirrors the first.
        texts: for each picture, what may be said of it.
        scaling: the factor that brings latents to the UNet's scale (`vae.config.scaling_factor`).
        stream: the name under which this bank draws.
        group: samples in one optimizer step; see `Order`.
        flipped: mirror images are drawn as often as pictures.
        dropout: the share of samples of which nothing is said.
    """

    def __init__(
        self,
        pictures: list[list[View]],
        texts: Sequence[Sequence[str]],
        scaling: float,
        stream: str,
        *,
        group: int = 1,
        flipped: bool = False,
        dropout: float = 0.0,
    ) -> None:
        self.pictures, self.texts, self.scaling, self.stream = pictures, texts, scaling, stream
        self.flipped, self.dropout = flipped, dropout
        self.order = Order([tuple(views[0].mean.shape[1:]) for views in pictures], group, stream)

    def __len__(self) -> int:
        return len(self.pictures)

    def draw(self, draws: Draws, position: int, timesteps: int, noise_offset: float = 0.0) -> Sample:
        """The sample at `position` of an endless shuffled pass over the pictures.

        It follows from the seed and `position` alone, so accumulating two batches of one is the same as a batch of two.
        """
        picture, turn = self.order.at(draws, position)
        view = self._view(draws, position, picture, turn)
        caption = self._caption(draws, position, picture)
        generator = draws.at(f"{self.stream}/sample", position)
        latents = (view.mean + view.std * torch.randn(view.mean.shape, generator=generator)) * self.scaling
        noise = torch.randn(view.mean.shape, generator=generator)
        timestep = int(torch.randint(timesteps, (1,), generator=generator))
        if noise_offset:
            noise = noise + noise_offset * torch.randn(view.mean.shape[0], 1, 1, generator=generator)
        return Sample(latents, noise, timestep, caption, view.sizes, view.mask)

    def _view(self, draws: Draws, position: int, picture: int, turn: int) -> View:
        views = self.pictures[picture]
        if not self.flipped:
            return views[turn % len(views)]
        half = len(views) // 2
        mirrored = _chance(draws.at(f"{self.stream}/flip", position)) < 0.5
        return views[turn % half + (half if mirrored else 0)]

    def _caption(self, draws: Draws, position: int, picture: int) -> str:
        if self.dropout and _chance(draws.at(f"{self.stream}/caption dropout", position)) < self.dropout:
            return ""
        texts = self.texts[picture]
        if len(texts) == 1:
            return texts[0]
        return texts[int(torch.randint(len(texts), (1,), generator=draws.at(f"{self.stream}/caption", position)))]


@torch.no_grad()
def encode(
    vae: Any, pictures: Iterable[Sequence[Crop]], *, on_picture: Callable[[int], None] | None = None
) -> list[list[View]]:
    """Encode the crops of each picture with the autoencoder.

    Crops are taken in as they come, so that no more than one picture and one batch are in memory. The encoder runs in
    fp32, because half precision costs visible detail (or, with SDXL's kin, gives NaN); afterwards it has its own
    precision again, with the same bits.

    Args:
        vae: an `AutoencoderKL`, on the device where it is to run.
        pictures: for each picture its crops; crops of one picture are of one size.
        on_picture: called with the number of pictures that are done.
    """
    dtype = vae.dtype
    if dtype != torch.float32:
        vae.to(torch.float32)
    done: list[list[View]] = []
    batch: list[tuple[int, Crop]] = []
    for number, crops in enumerate(pictures):
        done.append([])
        for crop in crops:
            if len(batch) == ENCODE_BATCH or (batch and batch[0][1].pixels.shape != crop.pixels.shape):
                _encode_batch(vae, batch, done, on_picture)
                batch = []
            batch.append((number, crop))
    if batch:
        _encode_batch(vae, batch, done, on_picture)
    if dtype != torch.float32:
        vae.to(dtype)
    return done


def _encode_batch(
    vae: Any, batch: list[tuple[int, Crop]], done: list[list[View]], on_picture: Callable[[int], None] | None
) -> None:
    posterior = vae.encode(torch.stack([crop.pixels for _, crop in batch]).to(vae.device)).latent_dist
    for (number, crop), mean, std in zip(batch, posterior.mean.cpu(), posterior.std.cpu()):
        mask = None if crop.mask is None else functional.adaptive_avg_pool2d(crop.mask, mean.shape[1:])
        done[number].append(View(mean.contiguous().clone(), std.contiguous().clone(), crop.sizes, mask))
    if on_picture is not None:
        on_picture(batch[-1][0] + 1)


def _chance(generator: torch.Generator) -> float:
    """Uniform in [0, 1)."""
    return float(torch.rand(1, generator=generator))
