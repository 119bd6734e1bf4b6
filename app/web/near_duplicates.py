"""Photos that show the same thing twice: copies, other sizes, other compression, a second shot of a burst.

Each picture is looked at as 16×16 pixels: the signs of the differences between neighbours, along rows and along columns
(dHash), say where it grows lighter and darker, and the colours themselves keep apart what is flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 16
MOST_SIGNS = 0.35  # share of signs that may differ; two photos of one subject differ in half of them
MOST_COLOUR = 15.0  # mean distance of the colours, of 255
_FLAT = 2.0  # smaller differences have no sign: in a plain sky they are noise


@dataclass(frozen=True, eq=False)
class Look:
    """signs: (2, 16, 15) int8 of -1, 0, 1. colours: (16, 16, 3) fp32, 0 to 255."""

    signs: np.ndarray
    colours: np.ndarray


def look_of(image: Image.Image) -> Look:
    """What a picture is compared by."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    colours = np.asarray(small, dtype=np.float32)
    grey = colours @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    steps = np.stack([np.diff(grey, axis=1), np.diff(grey, axis=0).T])
    return Look((np.sign(steps) * (np.abs(steps) > _FLAT)).astype(np.int8), colours)


def alike(one: Look, other: Look) -> bool:
    """Whether two pictures are nearly the same. Mirror images are not."""
    signs = float((one.signs != other.signs).mean())
    colour = float(np.abs(one.colours - other.colours).mean())
    return signs <= MOST_SIGNS and colour <= MOST_COLOUR


def near_duplicates(looks: Sequence[Look]) -> dict[int, int]:
    """{number of a picture: number of the first picture that it is nearly the same as}."""
    found: dict[int, int] = {}
    for number, look in enumerate(looks):
        first = next((n for n in range(number) if n not in found and alike(looks[n], look)), None)
        if first is not None:
            found[number] = first
    return found
