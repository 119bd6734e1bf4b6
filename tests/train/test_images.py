"""Photos: what is honoured, what is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_diffusion import DatasetError
from train import images
from train.images import RANDOM_CROPS, fingerprint, list_images, read_image, read_images, squares


def test_only_pictures_count(photos: Path) -> None:
    assert [path.name for path in list_images(photos)] == ["0.png", "1.png", "2.png"]


def test_no_folder_and_no_picture(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no folder"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DatasetError, match="no image in"):
        list_images(tmp_path)


def test_a_truncated_and_a_renamed_file_are_named(tmp_path: Path, photos: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "film.jpg").write_bytes(b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 100)
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "film.jpg", "empty.png"):
        with pytest.raises(DatasetError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(DatasetError, match=r"cut\.jpg"):
        read_images([photos / "0.png", tmp_path / "cut.jpg"], threads=2)


def test_too_many_pixels_and_too_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    Image.new("L", (3, 40)).save(tmp_path / "b.png")
    with pytest.raises(DatasetError, match=r"b\.png has only 3×40"):
        read_image(tmp_path / "b.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(DatasetError, match=r"a\.png has 40×40"):
        read_image(tmp_path / "a.png")


def test_a_decompression_bomb(tmp_path: Path) -> None:
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    with pytest.raises(DatasetError, match=r"bomb\.png"):
        read_image(tmp_path / "bomb.png")


def test_orientation_is_honoured(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (10, 20)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((16, 16), 65535, dtype=np.uint16)).save(path)
    else:
        Image.new(mode, (16, 16)).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (16, 16)
    if mode in ("RGBA", "LA", "I;16"):  # transparent over white; full scale is white
        assert np.asarray(image).min() == 255


def test_squares() -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    generator = torch.Generator().manual_seed(0)
    (crop,) = squares(wide, 16, center=True, generator=generator)
    assert crop.shape == (3, 16, 16) and crop.dtype == torch.float32
    assert torch.equal(crop.amax(dim=(1, 2)), torch.tensor([1.0, -1.0, -1.0]))
    assert len(squares(wide, 16, center=False, generator=generator)) == RANDOM_CROPS
    assert len(squares(Image.new("RGB", (20, 20)), 16, center=False, generator=generator)) == 1


def test_the_fingerprint_is_of_contents(photos: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other-name.png"
    copy.write_bytes((photos / "0.png").read_bytes())
    assert fingerprint([copy]) == fingerprint([photos / "0.png"]) != fingerprint([photos / "1.png"])
