"""Masks: found by name, of their picture's size, with something white in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_diffusion import DatasetError
from train.images import read_picture
from train.masks import alpha_mask, find_masks, read_mask


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    folder = tmp_path / "masks"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (32, 24), 255).save(folder / name)
    return folder


def test_found_by_name_whatever_the_ending(masks: Path) -> None:
    pictures = [Path("b.jpg"), Path("a.webp")]
    assert find_masks(pictures, masks) == [masks / "b.png", masks / "a.png"]


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        (["a.png", "b.png", "c.png"], r"c\.png has no mask; add .*c\.png"),
        (["a.png"], r"b\.png is a mask of no picture"),
        (["a.png", "a.jpg", "b.png"], r"a\.png could belong to a\.png or to a\.jpg"),
    ],
)
def test_missing_shared_and_without_a_picture(masks: Path, pictures: list[str], said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        find_masks([Path(name) for name in pictures], masks)


def test_two_of_one_name(masks: Path) -> None:
    Image.new("L", (32, 24)).save(masks / "a.bmp")
    with pytest.raises(DatasetError, match=r"a\.bmp and .*a\.png are masks of the same name"):
        find_masks([Path("a.png"), Path("b.png")], masks)


def test_another_size_black_and_transparent(masks: Path) -> None:
    picture = Path("a.jpg")
    assert read_mask(masks / "a.png", picture, (32, 24)).getextrema() == (255, 255)
    with pytest.raises(DatasetError, match=r"a\.png has 32×24 pixels, its picture a\.jpg 24×32 when upright"):
        read_mask(masks / "a.png", picture, (24, 32))
    Image.new("L", (32, 24), 1).save(masks / "a.png")
    with pytest.raises(DatasetError, match=r"a\.png leaves nothing to learn: its highest value is 1 of 255"):
        read_mask(masks / "a.png", picture, (32, 24))
    Image.new("RGBA", (32, 24), (255, 255, 255, 0)).save(masks / "a.png")
    with pytest.raises(DatasetError, match=r"a\.png is transparent in places"):
        read_mask(masks / "a.png", picture, (32, 24))
    (masks / "a.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"a\.png cannot be read"):
        read_mask(masks / "a.png", picture, (32, 24))


def test_transparency_as_a_mask(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 4), dtype=np.uint8)
    pixels[4:8, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    found = alpha_mask(read_picture(tmp_path / "cut.png"), tmp_path / "cut.png")
    assert np.array_equal(np.asarray(found), pixels[..., 3])
    Image.fromarray(pixels[..., :3]).save(tmp_path / "whole.png")
    with pytest.raises(DatasetError, match=r"whole\.png has no transparency, which --alpha_mask needs"):
        alpha_mask(read_picture(tmp_path / "whole.png"), tmp_path / "whole.png")
    Image.fromarray(np.zeros_like(pixels)).save(tmp_path / "gone.png")
    with pytest.raises(DatasetError, match=r"transparency of .*gone\.png leaves nothing to learn"):
        alpha_mask(read_picture(tmp_path / "gone.png"), tmp_path / "gone.png")
