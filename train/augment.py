"""From a picture to what the autoencoder sees: scaled, cropped, mirrored, and with its mask all the way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from lora_diffusion.errors import DatasetError
from train.families import Sizes
from train.images import to_tensor

RANDOM_CROPS = 4  # crops taken of a picture that is not of the bucket's shape


@dataclass(frozen=True)
class Crop:
    """A part of a picture.

    Attributes:
        pixels: (3, height, width) fp32 in [-1, 1].
        mask: (1, height, width) fp32 in [0, 1].
        sizes: what SDXL is told of it; top and left are places in the picture as it was scaled, and mirrored.
    """

    pixels: torch.Tensor
    mask: torch.Tensor | None
    sizes: Sizes


def crops(
    image: Image.Image,
    size: tuple[int, int],
    *,
    center: bool,
    generator: torch.Generator,
    flip: bool = False,
    mask: Image.Image | None = None,
    unmasked_weight: float = 0.0,
) -> list[Crop]:
    """A picture scaled so that it just covers `size`, then cropped to it.

    Args:
        image: RGB.
        size: width and height in pixels.
        center: take the one crop at the centre; else `RANDOM_CROPS` crops at places drawn from `generator`. A picture
            of the same shape always gives one.
        flip: the mirror image of each crop follows after all of them.
        mask: "L" of the picture's size. A crop that would hold nothing of it moves to its middle.
        unmasked_weight: the weight of what is black in the mask.

    Raises:
        DatasetError: nothing is left of the mask at this size.
    """
    original, (width, height) = image.size, size
    scale = max(width / image.width, height / image.height)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
        mask = None if mask is None else mask.resize(scaled, Image.Resampling.BILINEAR)
    spare_x, spare_y = image.width - width, image.height - height
    if center or (spare_x == 0 and spare_y == 0):
        places = [(spare_x // 2, spare_y // 2)]
    else:
        draws = torch.rand(RANDOM_CROPS, 2, generator=generator).tolist()
        places = [(round(x * spare_x), round(y * spare_y)) for x, y in draws]
    if mask is not None:
        places = [_on_mask(place, size, mask) for place in places]
    found = []
    for mirrored in (False, True) if flip else (False,):
        for left, top in places:
            part = image.crop((left, top, left + width, top + height))
            cover = None if mask is None else mask.crop((left, top, left + width, top + height))
            if mirrored:
                part, cover, left = ImageOps.mirror(part), cover and ImageOps.mirror(cover), spare_x - left
            sizes = (original[1], original[0], top, left, height, width)
            found.append(Crop(to_tensor(part), None if cover is None else _weights(cover, unmasked_weight), sizes))
    return found


def _on_mask(place: tuple[int, int], size: tuple[int, int], mask: Image.Image) -> tuple[int, int]:
    (left, top), (width, height) = place, size
    if mask.crop((left, top, left + width, top + height)).getbbox() is not None:
        return place
    box = mask.getbbox()
    if box is None:
        raise DatasetError(f"nothing of the mask is left at {mask.width}×{mask.height} pixels; draw more of it white")
    middle_x, middle_y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
    left = min(max(0, middle_x - width // 2), mask.width - width)
    top = min(max(0, middle_y - height // 2), mask.height - height)
    if mask.crop((left, top, left + width, top + height)).getbbox() is None:  # white only at opposite ends
        left, top = min(box[0], mask.width - width), min(_first_row(mask, box), mask.height - height)
    return left, top


def _first_row(mask: Image.Image, box: tuple[int, int, int, int]) -> int:
    """The highest white pixel of the leftmost white column."""
    column = np.asarray(mask)[:, box[0]]
    return int(np.flatnonzero(column)[0])


def _weights(mask: Image.Image, least: float) -> torch.Tensor:
    white = torch.from_numpy(np.array(mask, dtype=np.uint8))[None].to(torch.float32).div_(255.0)
    return least + (1.0 - least) * white
