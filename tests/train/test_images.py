"""Photos: what is honoured, what is refused by name."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_diffusion import DatasetError
from train import images
from train.images import fingerprint, list_images, other_pictures, read_image, read_images, read_picture


def test_only_pictures_count(photos: Path) -> None:
    assert [path.name for path in list_images(photos)] == ["0.png", "1.png", "2.png"]
    assert other_pictures(photos) == []


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


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """Its header is enough: what follows would not even decode."""
    path = tmp_path / "bomb.png"
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", b"rubbish") + _chunk(b"IEND", b""))
    with pytest.raises(DatasetError, match=r"bomb\.png has far more pixels than the limit of 100,000,000; make it"):
        read_image(path)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_an_animation_gives_its_first_frame_and_says_so(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "dance.gif", save_all=True, append_images=frames[1:])
    found = read_picture(tmp_path / "dance.gif")
    assert found.image.getpixel((3, 3)) == (255, 0, 0)
    assert found.remarks == (f"{tmp_path / 'dance.gif'} holds several pictures (GIF); the first one is used",)
    frames[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "phone.jpg").remarks == ()
    frames[0].save(tmp_path / "still.gif")
    assert read_picture(tmp_path / "still.gif").remarks == ()


def test_what_could_run_another_program_is_no_picture(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"a\.png cannot be read as an image: it is no PNG, JPEG"):
        read_image(tmp_path / "a.png")


def test_damaged_files_are_always_a_dataset_error(tmp_path: Path) -> None:
    """A byte anywhere may be wrong: then it is an error that names the file, or the picture is read all the same."""
    draws = np.random.default_rng(1)
    picture = Image.fromarray(draws.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    refused = 0
    for kind in ("png", "jpg", "webp", "bmp", "tif", "gif"):
        picture.save(tmp_path / f"whole.{kind}")
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        path = tmp_path / f"spoiled.{kind}"
        for _ in range(60):
            spoiled = bytearray(whole[: draws.integers(1, len(whole) + 1)])
            spoiled[draws.integers(0, min(len(spoiled), 200))] = draws.integers(0, 256)
            path.write_bytes(spoiled)
            try:
                read_picture(path)
            except DatasetError as problem:
                assert str(path) in str(problem) and "\n" not in str(problem)
                refused += 1
    assert refused > 200


def test_orientation_is_honoured_and_nothing_else_a_camera_wrote_is_kept(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10))
    picture.paste((255, 255, 255), (0, 0, 20, 5))  # the upper half, which a quarter turn brings to the right
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010E] = "taken at home"
    picture.save(tmp_path / "a.jpg", exif=exif, comment=b"mine", quality=95)
    found = read_image(tmp_path / "a.jpg")
    assert found.size == (10, 20) and found.info == {} and not dict(found.getexif())
    assert np.asarray(found)[:, 6:].min() > 240 and np.asarray(found)[:, :4].max() < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK", "I;16", "F"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I;16", "F") else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((16, 16), 65535, dtype=np.uint16)).save(path)
    elif mode == "F":
        Image.fromarray(np.full((16, 16), 1.0, dtype=np.float32)).save(path)
    else:
        Image.new(mode, (16, 16)).save(path)
    found = read_picture(path)
    assert found.image.mode == "RGB" and found.image.size == (16, 16)
    if mode in ("RGBA", "LA", "I;16", "F"):  # transparent over white; full scale is white
        assert np.asarray(found.image).min() == 255
    assert (found.alpha is not None) == (mode in ("RGBA", "LA"))


def test_cmyk_and_dark_16_bit_keep_their_colours(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    red = np.asarray(read_image(tmp_path / "red.jpg")).reshape(-1, 3).mean(axis=0)
    assert red[0] > 240 and red[1:].max() < 15
    Image.fromarray(np.full((16, 16), 200, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(read_image(tmp_path / "dark.png")).max() == 0  # 200 of 65,535


def test_kinds_that_are_not_read_are_listed(tmp_path: Path) -> None:
    for name in ("b.HEIC", "a.mp4", "c.md", "d.png"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in other_pictures(tmp_path)] == ["a.mp4", "b.HEIC"]


def test_the_fingerprint_is_of_contents(photos: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other-name.png"
    copy.write_bytes((photos / "0.png").read_bytes())
    assert fingerprint([copy]) == fingerprint([photos / "0.png"]) != fingerprint([photos / "1.png"])


def test_a_strip_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4000, 8)).save(tmp_path / "strip.png")
    with pytest.raises(DatasetError, match="strip of 4000×8 pixels; crop it"):
        read_image(tmp_path / "strip.png")
