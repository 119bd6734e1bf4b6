"""Photos from disk: which files count, and how they are read.

Pillow only. What a camera wrote into the file is honoured (EXIF orientation) or dropped (all other metadata); whatever
cannot be used is an error that names the file, never a picture less.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from lora_diffusion.errors import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# What Pillow is let decode. Not all it knows: EPS, for one, runs another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF")
# Files that somebody may take for photos that are used. Nothing here reads them, and the run says so.
OTHER_SUFFIXES = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw",
    ".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm",
)  # fmt: skip
MAX_PIXELS = 100_000_000  # 10,000 × 10,000: 300 MB as RGB
MIN_SIDE = 8
MAX_SHAPE = 32  # longer side to shorter: a strip grows by its square when it is scaled to cover a picture


@dataclass(frozen=True)
class Picture:
    """One picture as it is used.

    Attributes:
        image: RGB, upright, transparent parts over white.
        alpha: "L", what is opaque (255) and what is not; None for a picture without transparency.
        remarks: what a user should hear of it, each a sentence that names the file.
    """

    image: Image.Image
    alpha: Image.Image | None = None
    remarks: tuple[str, ...] = ()


def list_images(folder: str | Path) -> list[Path]:
    """The pictures in a folder, sorted by name. Hidden files and files of other kinds (captions) do not count.

    Raises:
        DatasetError: there is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {folder}; give the folder that holds the photos")
    found = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not found:
        raise DatasetError(f"there is no image in {folder}; it needs files that end in {', '.join(SUFFIXES)}")
    return found


def other_pictures(folder: str | Path) -> list[Path]:
    """Photos and videos in a folder that are of a kind which is not read, sorted by name."""
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in OTHER_SUFFIXES and path.is_file())


def read_image(path: Path) -> Image.Image:
    """One picture as RGB, upright, transparent parts over white; of an animation the first frame.

    Raises:
        DatasetError: the file is no picture, is cut off, or is too large or too small to be meant.
    """
    return read_picture(path).image


def read_picture(path: Path) -> Picture:
    """One picture with its transparency. Raises what `read_image` raises."""
    return read_pictures([path])[0]


def read_images(paths: Sequence[Path], threads: int = 0) -> list[Image.Image]:
    """Several pictures, in order, by `threads` threads at once (0 or 1: one after the other)."""
    return [picture.image for picture in read_pictures(paths, threads)]


def read_pictures(paths: Sequence[Path], threads: int = 0) -> list[Picture]:
    """Like `read_images`, with their transparency."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on damaged EXIF blocks and large pictures
        if threads <= 1:
            return [_read(path) for path in paths]
        with ThreadPoolExecutor(max_workers=threads) as pool:
            return list(pool.map(_read, paths))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB picture as a (3, height, width) fp32 tensor in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def fingerprint(paths: Sequence[Path]) -> str:
    """A hash over the contents of files in order; their names do not count."""
    total = hashlib.sha256()
    for path in paths:
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _read(path: Path) -> Picture:
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DatasetError(
                    f"{path} has {width}×{height} pixels, more than the limit of {MAX_PIXELS:,}; make it smaller"
                )
            if min(width, height) < MIN_SIDE:
                raise DatasetError(f"{path} has only {width}×{height} pixels; it cannot be trained on")
            if max(width, height) > MAX_SHAPE * min(width, height):
                raise DatasetError(f"{path} is a strip of {width}×{height} pixels; crop it to what it shows")
            remarks: tuple[str, ...] = ()
            # The second picture of an MPO is a camera's preview or depth map, not an animation.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                remarks = (f"{path} holds several pictures ({image.format}); the first one is used",)
            image.load()  # here a file that is cut off shows itself
            rgb, alpha = _to_rgb(ImageOps.exif_transpose(image))
            return Picture(rgb, alpha, remarks)
    except DatasetError:
        raise
    except Image.DecompressionBombError:
        raise DatasetError(f"{path} has far more pixels than the limit of {MAX_PIXELS:,}; make it smaller") from None
    except UnidentifiedImageError:
        raise DatasetError(
            f"{path} cannot be read as an image: it is no PNG, JPEG, WebP, BMP, TIFF or GIF, whatever its name says; "
            "replace it or take it out of the folder"
        ) from None
    except Exception as problem:  # a decoder raises whatever a damaged file leads it to
        said = " ".join(str(problem).split()) or type(problem).__name__
        raise DatasetError(
            f"{path} cannot be read as an image ({said}); replace it or take it out of the folder"
        ) from problem


def _to_rgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_8_bit(image)
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return _without_metadata(image.convert("RGB")), None
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB"), _without_metadata(image.getchannel("A"))


def _to_8_bit(image: Image.Image) -> Image.Image:
    levels = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    highest = levels.max()
    if image.mode.startswith("I;16") or highest > 255:
        top = 65535.0
    else:
        top = 1.0 if image.mode == "F" and highest <= 1 else 255.0
    return Image.fromarray((levels / top * 255).clip(0, 255).astype(np.uint8))


def _without_metadata(image: Image.Image) -> Image.Image:
    image.info = {}
    return image
