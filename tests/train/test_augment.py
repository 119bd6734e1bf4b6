"""Crops: what is cut off, what is mirrored, and the mask all the way to a latent's places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lora_diffusion import DatasetError
from train.augment import RANDOM_CROPS, crops


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def test_scaled_and_cropped_to_a_square() -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    (crop,) = crops(wide, (16, 16), center=True, generator=generator())
    assert crop.pixels.shape == (3, 16, 16) and crop.pixels.dtype == torch.float32 and crop.mask is None
    assert torch.equal(crop.pixels.amax(dim=(1, 2)), torch.tensor([1.0, -1.0, -1.0]))
    assert crop.sizes == (20, 40, 0, 8, 16, 16)  # 32×16 when scaled: 8 columns are cut off at the left
    assert len(crops(wide, (16, 16), center=False, generator=generator())) == RANDOM_CROPS
    assert len(crops(Image.new("RGB", (20, 20)), (16, 16), center=False, generator=generator())) == 1


def test_a_shape_that_fits_loses_nothing() -> None:
    (crop,) = crops(ramp(60, 40), (24, 16), center=False, generator=generator())
    assert crop.pixels.shape == (3, 16, 24) and crop.sizes == (40, 60, 0, 0, 16, 24)
    assert crop.pixels[0, 0, 0] < -0.9 and crop.pixels[0, 0, -1] > 0.9
    assert crop.pixels[1, 0, 0] < -0.9 and crop.pixels[1, -1, 0] > 0.9


def test_places_are_those_that_sizes_tell_of() -> None:
    found = crops(ramp(64, 16), (16, 16), center=False, generator=generator())
    assert len({crop.sizes for crop in found}) > 1
    for crop in found:
        left = (crop.pixels[0, 0, 0] + 1) / 2 * 63
        assert float(left) == pytest.approx(crop.sizes[3], abs=0.6)


def test_mirror_images_follow_the_crops_with_mask_and_place() -> None:
    mask = Image.new("L", (64, 16))
    mask.paste(255, (0, 0, 32, 16))
    found = crops(ramp(64, 16), (16, 16), center=False, generator=generator(), flip=True, mask=mask)
    assert len(found) == 2 * RANDOM_CROPS
    for plain, mirrored in zip(found[:RANDOM_CROPS], found[RANDOM_CROPS:]):
        assert torch.equal(plain.pixels.flip(-1), mirrored.pixels)
        assert plain.mask is not None and mirrored.mask is not None
        assert torch.equal(plain.mask.flip(-1), mirrored.mask)
        assert plain.sizes[3] + mirrored.sizes[3] == 64 - 16


def test_a_mask_goes_where_its_picture_goes() -> None:
    mask = Image.new("L", (40, 20))
    mask.paste(255, (20, 0, 40, 20))
    (crop,) = crops(ramp(40, 20), (16, 8), center=True, generator=generator(), mask=mask, unmasked_weight=0.25)
    assert crop.mask is not None and crop.mask.shape == (1, 8, 16)
    assert torch.all(crop.mask[..., :7] == 0.25) and torch.all(crop.mask[..., 9:] == 1.0)


@pytest.mark.parametrize("center", [True, False])
def test_no_crop_is_without_anything_to_learn(center: bool) -> None:
    mask = Image.new("L", (200, 16))
    mask.paste(255, (190, 4, 196, 10))
    found = crops(ramp(200, 16), (16, 16), center=center, generator=generator(), mask=mask)
    assert all(crop.mask is not None and float(crop.mask.sum()) == 36.0 for crop in found)
    assert all(crop.sizes[3] == 184 for crop in found)  # as far right as it goes
    ends = Image.new("L", (200, 16))
    for box in ((0, 3, 2, 5), (198, 3, 200, 5)):
        ends.paste(255, box)
    found = crops(ramp(200, 16), (16, 16), center=center, generator=generator(), mask=ends)
    assert all(crop.mask is not None and float(crop.mask.sum()) == 4.0 for crop in found)


def test_a_mask_that_vanishes_is_an_error() -> None:
    mask = Image.new("L", (1000, 1000))
    mask.putpixel((500, 500), 255)
    with pytest.raises(DatasetError, match="nothing of the mask is left at 8×8 pixels"):
        crops(ramp(1000, 1000), (8, 8), center=True, generator=generator(), mask=mask)
