"""Photos from disk: which files count, how they are read, how they become a square tensor.

Pillow only. What a camera wrote into the file is honoured (EXIF orientation) or dropped (all other metadata); whatever
cannot be used is an error that names the file, never a picture less.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from lora_diffusion.errors import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 100_000_000  # 10,000 × 10,000: 300 MB as RGB
MIN_SIDE = 8
RANDOM_CROPS = 4  # crops taken of a picture that is not square


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


def read_image(path: Path) -> Image.Image:
    """One picture as RGB, upright, transparent parts over white; of an animation the first frame.

    Raises:
        DatasetError: the file is no picture, is cut off, or is too large or too small to be meant.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on damaged EXIF blocks and large pictures
            with Image.open(path) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise DatasetError(
                        f"{path} has {width}×{height} pixels, more than the limit of {MAX_PIXELS:,}; make it smaller"
                    )
                if min(width, height) < MIN_SIDE:
                    raise DatasetError(f"{path} has only {width}×{height} pixels; it cannot be trained on")
                return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise DatasetError(f"{path} has far more pixels than the limit of {MAX_PIXELS:,}; make it smaller") from None
    except (OSError, SyntaxError, ValueError, EOFError) as problem:
        raise DatasetError(
            f"{path} cannot be read as an image ({problem}); replace it or take it out of the folder"
        ) from problem


def read_images(paths: Sequence[Path], threads: int = 0) -> list[Image.Image]:
    """Several pictures, in order, by `threads` threads at once (0 or 1: one after the other)."""
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        return list(pool.map(read_image, paths))


def squares(image: Image.Image, side: int, *, center: bool, generator: torch.Generator) -> list[torch.Tensor]:
    """A picture scaled so that its shorter side is `side` pixels, then cropped to a square.

    Args:
        image: RGB.
        side: in pixels.
        center: take the one crop at the centre; else `RANDOM_CROPS` crops at places drawn from `generator`. A square
            picture always gives one.

    Returns:
        Tensors of shape (3, side, side), fp32 in [-1, 1].
    """
    width, height = image.size
    scale = side / min(width, height)
    scaled_size = (max(side, round(width * scale)), max(side, round(height * scale)))
    if scaled_size != image.size:
        image = image.resize(scaled_size, Image.Resampling.LANCZOS)
    spare_x, spare_y = image.width - side, image.height - side
    if center or (spare_x == 0 and spare_y == 0):
        places = [(spare_x // 2, spare_y // 2)]
    else:
        draws = torch.rand(RANDOM_CROPS, 2, generator=generator).tolist()
        places = [(round(x * spare_x), round(y * spare_y)) for x, y in draws]
    return [to_tensor(image.crop((x, y, x + side, y + side))) for x, y in places]


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


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()  # here a file that is cut off shows itself
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        levels = np.asarray(image, dtype=np.float64)
        top = 65535.0 if levels.max() > 255 else 255.0
        image = Image.fromarray((levels / top * 255).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
