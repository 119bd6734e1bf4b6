"""What makes a photo bad to learn from: too small, a strip, dark, blurred. All of it is said, nothing is refused."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from train.dreambooth_data import MUCH_ENLARGED

_DARK = 35.0  # mean brightness, of 255
_SHARP = 12.0  # variance of the second differences of a sharp photo, at 256 pixels
_LONG = 1.6  # long side / short side, from which on the square leaves much out


def warnings_for(image: Image.Image, side: int) -> list[str]:
    """What is to be said of a photo that the model sees as a square of `side` pixels, in sentences."""
    said = []
    short, long = sorted(image.size)
    if side / short > MUCH_ENLARGED:
        said.append(f"it has {image.width}×{image.height} pixels, the model sees {side}×{side}: it will look blurred")
    if long / short > _LONG:
        said.append(f"{1 - short / long:.0%} of it lies outside the square: crop it yourself to choose what is seen")
    grey = ImageOps.contain(image.convert("L"), (256, 256))
    values = np.asarray(grey, dtype=np.float32)
    if values.mean() < _DARK:
        said.append("it is very dark")
    elif short >= 256 and _roughness(values) < _SHARP:
        said.append("it is blurred, or shows next to nothing")
    return said


def _roughness(grey: np.ndarray) -> float:
    """The variance of the discrete Laplacian, which is small where nothing is sharp."""
    middle = grey[1:-1, 1:-1]
    return float((4 * middle - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]).var())
