"""Photos on their way from a page to a training: checked before they are decoded, kept without metadata, shown as the
model will see them.

    uploads/<id>/001-dog.png           a photo, upright; what training reads
    uploads/<id>/001-dog.txt           its caption, if it has one
    uploads/<id>/previews/001-dog.png  the square in its middle, at the model's size
"""

from __future__ import annotations

import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from app.web.limits import MIB, Limits
from app.web.near_duplicates import look_of, near_duplicates
from app.web.photo_quality import warnings_for
from app.web.places import Workspace, inside, suggested_name
from lora_diffusion.errors import ConfigError, DatasetError
from lora_diffusion.text import printable
from train.augment import crops
from train.captions import MAX_CAPTION_BYTES, read_captions
from train.images import FORMATS, OTHER_SUFFIXES, Picture, list_images, read_picture

FEW = 3
LONGEST_CAPTION = 1000  # characters; CLIP reads 77 tokens
KEPT_SIDE = 2048  # a photo's shorter side is kept up to this, and up to four times what the model sees
LONGEST_SHAPE = 10  # long side / short side: brought to the model's size, a longer strip would fill the memory
PREVIEWS = "previews"


@dataclass(frozen=True)
class Photo:
    """A photo as it is kept.

    Attributes:
        path: the file that training reads; preview: the square as the model will see it.
        name: what it was called when it came, as plain text.
        width, height: in pixels, upright, as it came.
        caption: empty where it has none.
        warnings: sentences.
    """

    path: Path
    preview: Path
    name: str
    width: int
    height: int
    caption: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PhotoReport:
    """What became of the files of one upload.

    Attributes:
        kept: in the order in which they came.
        refused: (name, why and what to do).
        warnings: of all together, and of files that are not used.
        folder: for `instance_data_dir`; None where nothing was kept.
    """

    kept: list[Photo]
    refused: list[tuple[str, str]]
    warnings: list[str]
    folder: Path | None = None


def check_photos(
    paths: Sequence[str | Path], side: int, limits: Limits, workspace: Workspace | None = None
) -> PhotoReport:
    """Take in the photos of one upload, and the captions among them (`dog.txt` beside `dog.jpg`).

    Size, kind and number of pixels are looked at before anything is decoded. What is kept is the picture alone: turned
    upright as its EXIF says, without place, time and camera.

    Args:
        paths: files, as the page got them.
        side: of the square that the model is trained on, in pixels.
        workspace: a folder is made in its `uploads`; by default in the system's place for temporary files.

    Raises:
        ConfigError: `side` is out of range.
    """
    if not 8 <= side <= limits.side:
        raise ConfigError(f"the model's side is {side} pixels; give 8 to {limits.side}")
    files = [Path(path) for path in paths]
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    pictures = [file for file in files if file.suffix.lower() != ".txt"]
    folder = _new_folder(workspace)
    kept: list[Photo] = []
    refused: list[tuple[str, str]] = []
    looks, stems = [], []
    for file in pictures:
        name = _shown(file)
        if len(kept) == limits.images:
            refused.append((name, f"more than {limits.images} photos; leave some out"))
            continue
        try:
            picture = _read(file, limits)
        except DatasetError as problem:
            refused.append((name, str(problem)))
            continue
        photo, square = _keep(picture, file, folder, len(kept) + 1, side)
        kept.append(photo)
        looks.append(look_of(square))
        stems.append(file.stem)
    for number, first in near_duplicates(looks).items():
        said = f"it is nearly the same as {kept[first].name}: leave one of them out"
        kept[number] = replace(kept[number], warnings=(*kept[number].warnings, said))
    remarks = _take_captions(texts, stems, kept)
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
        return PhotoReport([], refused, [*remarks, "there is no photo yet: add 3 to 20 of your subject"])
    return PhotoReport(kept, refused, [*_of_all(kept), *remarks], folder)


def write_captions(folder: Path, captions: Mapping[str, str]) -> None:
    """Set captions of kept photos, by the names of their files (`001-dog.png`). An empty one takes the caption away.

    Raises:
        ConfigError: there is no such photo, or a caption is too long; nothing is written then.
    """
    photos = {path.name: path for path in list_images(folder)}
    texts = {}
    for name, caption in captions.items():
        if name not in photos:
            raise ConfigError(f"there is no photo {printable(str(name), 40)!a} here; add it first")
        text = " ".join("".join(char if char.isprintable() else " " for char in caption).split())
        if len(text) > LONGEST_CAPTION:
            raise ConfigError(f"the caption of {name} has {len(text):,} characters; at most {LONGEST_CAPTION:,} fit")
        texts[photos[name].with_suffix(".txt")] = text
    for file, text in texts.items():
        if text:
            file.write_text(text + "\n", encoding="utf-8")
        else:
            file.unlink(missing_ok=True)


def upload_folder(workspace: Workspace, upload: str) -> Path:
    """The folder of an upload by its id. Raises ConfigError where there is none."""
    folder = inside(workspace.uploads, upload)
    if not folder.is_dir():
        raise ConfigError("these photos are no longer here; add them again")
    return folder


def _new_folder(workspace: Workspace | None) -> Path:
    """A folder whose name nobody can guess: on a Space, photos are a visitor's own."""
    if workspace is None:
        folder = Path(tempfile.mkdtemp(prefix="photos-"))
    else:
        folder = workspace.uploads / secrets.token_hex(16)
    (folder / PREVIEWS).mkdir(parents=True)
    return folder


def _read(file: Path, limits: Limits) -> Picture:
    """The picture. Raises DatasetError whose text goes on from the file's name."""
    _check_file(file, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on large pictures: the limit here is lower
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
    except Exception:  # `read_picture` says why
        width = height = 0
    if width * height > limits.pixels:
        raise DatasetError(f"{width}×{height} pixels, more than {limits.pixels:,}; make it smaller")
    if max(width, height) > LONGEST_SHAPE * min(width, height):
        raise DatasetError(f"{width}×{height} pixels, a strip of which the model would see next to nothing; crop it")
    try:
        picture = read_picture(file)
    except DatasetError as problem:
        said = str(problem).replace("replace it or take it out of the folder", "leave it out")
        raise DatasetError(_without_path(said, file).removeprefix("it ")) from None
    return replace(picture, remarks=tuple(_without_path(remark, file) for remark in picture.remarks))


def _check_file(file: Path, limits: Limits) -> None:
    """Raises DatasetError for what is not worth opening."""
    try:
        facts = file.lstat()
    except (OSError, ValueError):
        raise DatasetError("the file cannot be opened; add it again") from None
    if not stat.S_ISREG(facts.st_mode):
        raise DatasetError("a link or a folder, not a file; add the photo itself")
    if facts.st_size > limits.image_bytes:
        raise DatasetError(f"{facts.st_size / MIB:,.1f} MB, more than {limits.image_bytes / MIB:g} MB; make it smaller")
    if facts.st_size == 0:
        raise DatasetError("the file is empty; add it again")
    if file.suffix.lower() in OTHER_SUFFIXES:
        raise DatasetError(f"files that end in {file.suffix.lower()} cannot be read; save it as JPEG or PNG")


def _keep(picture: Picture, file: Path, folder: Path, number: int, side: int) -> tuple[Photo, Image.Image]:
    """Write a photo and its preview; returns it and the square."""
    image, name = picture.image, f"{number:03d}-{suggested_name(file.stem[:40], 'photo')}.png"
    (square,) = crops(image, (side, side), center=True, generator=torch.Generator())
    pixels = square.pixels.add(1.0).mul(127.5).round().to(torch.uint8).permute(1, 2, 0)
    preview = Image.fromarray(pixels.numpy())
    path, small = folder / name, folder / PREVIEWS / name
    preview.save(small)
    _shrunk(_with_alpha(picture), max(KEPT_SIDE, 4 * side)).save(path, compress_level=1)
    said = (*picture.remarks, *warnings_for(image, side))
    return Photo(path, small, _shown(file), image.width, image.height, "", said), preview


def _with_alpha(picture: Picture) -> Image.Image:
    """The picture with its transparency, which masks are made from; over white it is `picture.image` again."""
    if picture.alpha is None:
        return picture.image
    over_white = np.asarray(picture.image, dtype=np.float32)
    alpha = np.asarray(picture.alpha, dtype=np.float32)[..., None] / 255.0
    colours = np.where(alpha > 0, 255.0 - (255.0 - over_white) / np.maximum(alpha, 1 / 255), 255.0)
    image = Image.fromarray(colours.round().clip(0, 255).astype(np.uint8))
    image.putalpha(picture.alpha)
    return image


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    scale = side / min(image.size)
    if scale >= 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _take_captions(texts: Sequence[Path], stems: Sequence[str], kept: list[Photo]) -> list[str]:
    """Put each caption beside its photo; returns what is to be said of those that cannot be used."""
    remarks = []
    for file in texts:
        owners = [number for number, stem in enumerate(stems) if stem == file.stem]
        if not owners:
            remarks.append(f"{_shown(file)} is not used: no photo has its name")
        for number in owners:
            target = kept[number].path.with_suffix(".txt")
            try:
                _check_text(file)
                shutil.copyfile(file, target)
                (caption,) = read_captions([kept[number].path])
                text = printable(caption.text, LONGEST_CAPTION)
            except (DatasetError, OSError) as problem:
                target.unlink(missing_ok=True)
                said = str(problem) if isinstance(problem, DatasetError) else "it cannot be opened"
                remarks.append(
                    f"{_shown(file)} is not used: {_without_path(said, target).partition(', or give --')[0]}"
                )
                continue
            target.write_text(text + "\n", encoding="utf-8")
            kept[number] = replace(kept[number], caption=text)
    with_caption = sum(bool(photo.caption) for photo in kept)
    if 0 < with_caption < len(kept):
        remarks.append(f"{len(kept) - with_caption} of {len(kept)} photos have no caption: the prompt stands in for it")
    return remarks


def _check_text(file: Path) -> None:
    facts = file.lstat()
    if not stat.S_ISREG(facts.st_mode):
        raise DatasetError("a link or a folder, not a file")
    if facts.st_size > MAX_CAPTION_BYTES:
        raise DatasetError(f"it has {facts.st_size:,} bytes, which is no caption")


def _of_all(kept: Sequence[Photo]) -> list[str]:
    if len(kept) >= FEW:
        return []
    what = "1 photo is" if len(kept) == 1 else f"{len(kept)} photos are"
    return [f"{what} few: with 3 to 20, from several sides and in front of several backgrounds, it learns the subject"]


def _shown(file: Path) -> str:
    """A file's name as plain text."""
    return printable(file.name, 80) or "a file without a name"


def _without_path(text: str, file: Path) -> str:
    """A message about a file without where the server keeps it, and without its name, which stands beside it."""
    for path in (str(file), file.name):
        text = text.replace(path, "it")
    return printable(text, 300)
