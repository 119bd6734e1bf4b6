"""Photos that come in: what is kept is the picture, what cannot be used says why, what the model will see is shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from app.web import uploads
from app.web.limits import Limits
from app.web.near_duplicates import alike, look_of, near_duplicates
from app.web.places import Workspace
from app.web.uploads import check_photos, upload_folder, write_captions
from lora_diffusion.errors import ConfigError
from train.augment import crops
from train.captions import read_captions
from train.images import list_images, read_image, read_picture, to_tensor

REAL = Path(__file__).parents[3].parent / "shared" / "data" / "dreambooth"
LIMITS = Limits()


def noise(seed: int, width: int = 96, height: int = 96) -> Image.Image:
    """A picture of coloured blocks, each seed another one."""
    blocks = np.random.default_rng(seed).integers(40, 255, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "app")


@pytest.fixture
def five(tmp_path: Path) -> list[Path]:
    paths = []
    for number in range(5):
        paths.append(tmp_path / f"dog {number}.jpg")
        noise(number).save(paths[-1], quality=95)
    return paths


class TestKept:
    def test_five_photos(self, five: list[Path], workspace: Workspace) -> None:
        report = check_photos(five, 64, LIMITS, workspace)
        assert (report.refused, report.warnings) == ([], [])
        assert [photo.name for photo in report.kept] == [f"dog {n}.jpg" for n in range(5)]
        assert all(photo.warnings == () and photo.caption == "" for photo in report.kept)
        assert report.folder is not None and report.folder.parent == workspace.uploads
        assert list_images(report.folder) == [photo.path for photo in report.kept]
        for photo, source in zip(report.kept, five):
            assert np.array_equal(np.asarray(Image.open(photo.path)), np.asarray(Image.open(source)))

    def test_the_preview_is_what_training_sees(self, workspace: Workspace, tmp_path: Path) -> None:
        noise(1, 150, 90).save(tmp_path / "wide.png")
        (photo,) = check_photos([tmp_path / "wide.png"], 64, LIMITS, workspace).kept
        (square,) = crops(read_image(photo.path), (64, 64), center=True, generator=torch.Generator())
        assert torch.equal(to_tensor(Image.open(photo.preview)), square.pixels)
        assert any("40% of it lies outside the square" in one for one in photo.warnings)

    def test_upright_and_without_metadata(self, workspace: Workspace, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = 6, "SECRETCAMERA"
        exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)  # where it was taken
        noise(1, 90, 60).save(tmp_path / "a.jpg", exif=exif, comment=b"SECRETCOMMENT")
        report = check_photos([tmp_path / "a.jpg"], 64, LIMITS, workspace)
        (photo,) = report.kept
        assert (photo.width, photo.height) == (60, 90) == Image.open(photo.path).size
        assert report.folder is not None
        for file in (file for file in report.folder.rglob("*") if file.is_file()):
            content = file.read_bytes()
            assert not any(word in content for word in (b"SECRET", b"eXIf", b"tEXt", b"Exif"))

    def test_transparency_stays(self, workspace: Workspace, tmp_path: Path) -> None:
        image = noise(1).convert("RGBA")
        image.putalpha(Image.fromarray(np.tile(np.arange(0, 192, 2, dtype=np.uint8), (96, 1))))
        image.save(tmp_path / "a.png")
        (photo,) = check_photos([tmp_path / "a.png"], 64, LIMITS, workspace).kept
        kept, given = read_picture(photo.path), read_picture(tmp_path / "a.png")
        assert kept.alpha is not None and kept.alpha.tobytes() == given.alpha.tobytes()  # type: ignore[union-attr]
        far = np.abs(np.asarray(kept.image, dtype=int) - np.asarray(given.image, dtype=int)).max()
        assert far <= 1

    def test_large_photos_are_kept_smaller(
        self, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(uploads, "KEPT_SIDE", 100)
        noise(1, 600, 400).save(tmp_path / "a.png")
        (small,) = check_photos([tmp_path / "a.png"], 16, LIMITS, workspace).kept
        (large,) = check_photos([tmp_path / "a.png"], 64, LIMITS, workspace).kept
        assert Image.open(small.path).size == (150, 100) and (small.width, small.height) == (600, 400)
        assert Image.open(large.path).size == (384, 256)

    def test_names_become_safe(self, workspace: Workspace, tmp_path: Path) -> None:
        for name in ("größe & <b>.png", "..png", "-rf.png", "a" * 200 + ".png"):
            noise(len(name)).save(tmp_path / name, "PNG")
        report = check_photos(sorted(path for path in tmp_path.iterdir() if path.is_file()), 64, LIMITS, workspace)
        assert len(report.kept) + len(report.refused) == 4 and len(report.kept) >= 3
        for photo in report.kept:
            assert photo.path.name.isascii() and photo.path.resolve().parent == report.folder
            assert all(char.isalnum() or char in "-_." for char in photo.path.name)


class TestWarnings:
    def test_few(self, five: list[Path], workspace: Workspace) -> None:
        assert "2 photos are few" in check_photos(five[:2], 64, LIMITS, workspace).warnings[0]
        assert check_photos(five[:3], 64, LIMITS, workspace).warnings == []
        empty = check_photos([], 64, LIMITS, workspace)
        assert empty.folder is None and "no photo yet" in empty.warnings[0]
        assert len(list(workspace.uploads.iterdir())) == 2

    def test_small(self, five: list[Path], workspace: Workspace) -> None:
        report = check_photos(five, 512, LIMITS, workspace)
        assert all("96×96 pixels, the model sees 512×512" in photo.warnings[0] for photo in report.kept)
        assert all(not photo.warnings for photo in check_photos(five, 96, LIMITS, workspace).kept)

    def test_near_duplicates(self, five: list[Path], workspace: Workspace, tmp_path: Path) -> None:
        noise(1, 60, 60).save(tmp_path / "again.jpg", quality=40)
        report = check_photos([*five, tmp_path / "again.jpg"], 64, LIMITS, workspace)
        assert report.kept[-1].warnings == ("it is nearly the same as dog 1.jpg: leave one of them out",)
        assert all(not photo.warnings for photo in report.kept[:-1])

    def test_dark_and_blurred(self, workspace: Workspace, tmp_path: Path) -> None:
        noise(1, 300, 300).point(lambda value: value // 8).save(tmp_path / "dark.png")
        noise(1, 300, 300).filter(ImageFilter.GaussianBlur(12)).save(tmp_path / "blurred.png")
        report = check_photos([tmp_path / "dark.png", tmp_path / "blurred.png"], 64, LIMITS, workspace)
        assert list(report.kept[0].warnings) == ["it is very dark"]
        assert "it is blurred" in report.kept[1].warnings[0]

    @pytest.mark.skipif(not REAL.is_dir(), reason="the real photos are not here")
    def test_real_photos_need_none(self, workspace: Workspace) -> None:
        paths = sorted(REAL.glob("*/*.jpg"))
        report = check_photos(paths[::5], 512, LIMITS, workspace)
        assert [photo.warnings for photo in report.kept] == [()] * len(paths[::5]) and report.warnings == []


class TestNearDuplicates:
    @pytest.mark.skipif(not REAL.is_dir(), reason="the real photos are not here")
    def test_real_photos(self) -> None:
        images = [read_image(path) for path in sorted(REAL.glob("*/*.jpg"))]
        looks = [look_of(image) for image in images]
        assert near_duplicates(looks) == {}
        for image, look in zip(images, looks):
            width, height = image.size
            assert alike(look, look_of(image.resize((width // 3, height // 3))))
            assert alike(look, look_of(image.crop((width // 40, height // 40, width, height))))

    def test_plain_pictures_differ_by_colour(self) -> None:
        colours = [(200, 40, 40), (40, 40, 200), (201, 41, 40)]
        assert near_duplicates([look_of(Image.new("RGB", (40, 40), colour)) for colour in colours]) == {2: 0}

    def test_the_first_of_a_burst_is_named(self) -> None:
        burst = [look_of(noise(1)), look_of(noise(2)), look_of(noise(1)), look_of(noise(1))]
        assert near_duplicates(burst) == {2: 0, 3: 0}


class TestCaptions:
    def test_texts_beside_photos(self, five: list[Path], workspace: Workspace) -> None:
        for path in five:
            path.with_suffix(".txt").write_text(f"sks dog,\n on {path.stem}")
        report = check_photos([*five, *(path.with_suffix(".txt") for path in five)], 64, LIMITS, workspace)
        assert report.warnings == [] and report.refused == []
        assert [photo.caption for photo in report.kept] == [f"sks dog, on dog {n}" for n in range(5)]
        assert [one.text for one in read_captions([photo.path for photo in report.kept])] == [
            photo.caption for photo in report.kept
        ]

    def test_what_cannot_be_used_is_said(self, five: list[Path], workspace: Workspace, tmp_path: Path) -> None:
        texts = {"dog 0": b"a dog", "dog 1": b"\xff\xfe", "dog 2": b"x" * 70_000, "dog 3": b"  \n", "cat": b"a cat"}
        for stem, content in texts.items():
            (tmp_path / f"{stem}.txt").write_bytes(content)
        files = [tmp_path / f"{stem}.txt" for stem in texts]
        report = check_photos([*five, *files], 64, LIMITS, workspace)
        assert [photo.caption for photo in report.kept] == ["a dog", "", "", "", ""]
        said = "\n".join(report.warnings)
        for words in ("dog 1.txt is not used", "UTF-8", "70,000 bytes", "empty caption", "no photo has its name"):
            assert words in said
        assert "4 of 5 photos have no caption" in said
        assert str(tmp_path) not in said and "--" not in said

    def test_editing(self, five: list[Path], workspace: Workspace) -> None:
        report = check_photos(five, 64, LIMITS, workspace)
        assert report.folder is not None
        names = [photo.path.name for photo in report.kept]
        write_captions(report.folder, {names[0]: " a dog\x00\n<b>here</b> ", names[1]: "b"})
        write_captions(report.folder, {names[1]: ""})
        assert report.kept[0].path.with_suffix(".txt").read_text() == "a dog <b>here</b>\n"
        assert not report.kept[1].path.with_suffix(".txt").exists()

    @pytest.mark.parametrize("name", ["../../outside.png", "/etc/passwd", "nothing.png", "a\0b", ""])
    def test_editing_something_else(self, name: str, five: list[Path], workspace: Workspace) -> None:
        report = check_photos(five, 64, LIMITS, workspace)
        assert report.folder is not None
        with pytest.raises(ConfigError, match="there is no photo"):
            write_captions(report.folder, {report.kept[0].path.name: "first", name: "second"})
        assert list(workspace.root.rglob("*.txt")) == []

    def test_a_long_caption(self, five: list[Path], workspace: Workspace) -> None:
        report = check_photos(five, 64, LIMITS, workspace)
        assert report.folder is not None
        with pytest.raises(ConfigError, match="2,000 characters"):
            write_captions(report.folder, {report.kept[0].path.name: "x" * 2000})


class TestRefused:
    def test_limits(self, five: list[Path], workspace: Workspace, tmp_path: Path) -> None:
        small = dataclasses.replace(LIMITS, images=2, image_bytes=100_000, pixels=10_000)
        noise(9, 120, 120).save(tmp_path / "many pixels.png")
        Image.effect_noise((400, 400), 90).save(tmp_path / "many bytes.png")
        report = check_photos(
            [tmp_path / "many pixels.png", tmp_path / "many bytes.png", *five], 64, small, workspace
        )  # fmt: skip
        said = dict(report.refused)
        assert "120×120 pixels, more than 10,000" in said["many pixels.png"]
        assert "MB" in said["many bytes.png"]
        assert "more than 2 photos" in said["dog 2.jpg"] and len(said) == 5 and len(report.kept) == 2

    def test_nothing_is_decoded_before_the_limits(
        self, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def decoded(path: Path) -> None:
            raise AssertionError("it was decoded")

        monkeypatch.setattr(uploads, "read_picture", decoded)
        noise(9, 120, 120).save(tmp_path / "a.png")
        report = check_photos([tmp_path / "a.png"], 64, dataclasses.replace(LIMITS, pixels=14_399), workspace)
        assert len(report.refused) == 1

    def test_no_path_of_the_server_is_told(self, workspace: Workspace, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_text("nothing of the kind")
        (tmp_path / "b.heic").write_bytes(b"x")
        report = check_photos([tmp_path / "a.jpg", tmp_path / "b.heic", tmp_path / "gone.png"], 64, LIMITS, workspace)
        said = dict(report.refused)
        assert "cannot be read as an image" in said["a.jpg"] and "JPEG or PNG" in said["b.heic"]
        assert "cannot be opened" in said["gone.png"]
        assert str(tmp_path) not in str(report)

    def test_the_side(self, workspace: Workspace) -> None:
        with pytest.raises(ConfigError, match="give 8 to 2048"):
            check_photos([], 1_000_000, LIMITS, workspace)


def test_uploads_are_found_by_their_id_only(five: list[Path], workspace: Workspace) -> None:
    report = check_photos(five, 64, LIMITS, workspace)
    assert report.folder is not None and upload_folder(workspace, report.folder.name) == report.folder
    for id in ("..", "../runs", "/etc", "0" * 32, "a\0"):
        with pytest.raises(ConfigError):
            upload_folder(workspace, id)
