"""Masks: which part of a photo is learned. White counts in full, black not at all, grey in between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lora_diffusion.errors import DatasetError
from train.images import Picture, list_images, read_picture

LEAST_WHITE = 128  # a mask whose brightest value is below this was not meant so (0 and 1 for 0 and 255, as a rule)


def find_masks(pictures: Sequence[Path], folder: Path) -> list[Path]:
    """For each picture the file in `folder` that has its name, whatever its ending.

    Raises:
        DatasetError: there is none, or there are two; two pictures would share one; a mask belongs to no picture.
    """
    masks: dict[str, Path] = {}
    for path in list_images(folder):
        if masks.setdefault(path.stem, path) != path:
            raise DatasetError(f"{masks[path.stem]} and {path} are masks of the same name; remove one")
    owners: dict[str, Path] = {}
    for picture in pictures:
        if picture.stem not in masks:
            raise DatasetError(f"{picture} has no mask; add {folder / picture.stem}.png, of the same size")
        if owners.setdefault(picture.stem, picture) != picture:
            raise DatasetError(
                f"{masks[picture.stem]} could belong to {owners[picture.stem].name} or to {picture.name}; "
                "rename one of the pictures and its mask"
            )
    for stem, mask in masks.items():
        if stem not in owners:
            raise DatasetError(f"{mask} is a mask of no picture; name it like its picture, or remove it")
    return [masks[picture.stem] for picture in pictures]


def read_mask(path: Path, picture: Path, size: tuple[int, int]) -> Image.Image:
    """A mask as "L".

    Raises:
        DatasetError: it cannot be read, is not of the picture's size, or has no white in it.
    """
    found = read_picture(path)
    if found.image.size != size:
        raise DatasetError(
            f"the mask {path} has {found.image.width}×{found.image.height} pixels, its picture {picture} "
            f"{size[0]}×{size[1]} when upright; make them the same"
        )
    if found.alpha is not None and found.alpha.getextrema()[0] < 255:
        raise DatasetError(f"the mask {path} is transparent in places; save it in black and white without transparency")
    return _checked(found.image.convert("L"), f"the mask {path}")


def alpha_mask(found: Picture, path: Path) -> Image.Image:
    """A picture's transparency as its mask: what is opaque is learned.

    Raises:
        DatasetError: it has none, or nothing of it is opaque.
    """
    if found.alpha is None:
        raise DatasetError(f"{path} has no transparency, which --alpha_mask needs; cut it out, or leave the flag out")
    return _checked(found.alpha, f"the transparency of {path}")


def _checked(mask: Image.Image, what: str) -> Image.Image:
    brightest = mask.getextrema()[1]
    if brightest < LEAST_WHITE:
        raise DatasetError(
            f"{what} leaves nothing to learn: its highest value is {brightest} of 255, and only what is white (255, "
            "opaque) is learned"
        )
    return mask
