"""A stand-in for `torchvision.transforms` where there is no torchvision: what diffusers' DreamBooth script calls.

Pillow does the same work in both, so the time of a picture is the same, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class Compose:
    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, picture: Any) -> Any:
        for transform in self.transforms:
            picture = transform(picture)
        return picture


class Resize:
    """The shorter side becomes `size` pixels; nothing is cut."""

    def __init__(self, size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> None:
        self.size, self.filter = size, Image.Resampling[interpolation.name]

    def __call__(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        if min(width, height) == self.size:
            return picture
        if width <= height:
            return picture.resize((self.size, int(self.size * height / width)), self.filter)
        return picture.resize((int(self.size * width / height), self.size), self.filter)


class CenterCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        return self.cut(picture, round((picture.width - self.size) / 2), round((picture.height - self.size) / 2))

    def cut(self, picture: Image.Image, left: int, top: int) -> Image.Image:
        return picture.crop((left, top, left + self.size, top + self.size))


class RandomCrop(CenterCrop):
    def __call__(self, picture: Image.Image) -> Image.Image:
        spare = (picture.width - self.size, picture.height - self.size)
        left, top = (int(torch.randint(0, pixels + 1, ())) for pixels in spare)
        return self.cut(picture, left, top)


class ToTensor:
    """RGB to (3, height, width), fp32 in [0, 1]."""

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
        return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


class Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean, std

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return picture.clone().sub_(mean).div_(std)
