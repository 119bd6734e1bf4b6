"""The colours of the pocket world and the words for them."""

from __future__ import annotations

import numpy as np

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "orange": (244, 140, 30),
    "yellow": (250, 214, 50),
    "green": (60, 168, 72),
    "cyan": (70, 205, 215),
    "blue": (45, 90, 205),
    "purple": (130, 62, 178),
    "pink": (244, 140, 185),
    "white": (245, 245, 240),
    "black": (38, 36, 42),
}
NAMES = tuple(COLOURS)


def shade(rgb: RGB, factor: float) -> RGB:
    """`rgb` made darker (factor < 1) or lighter (factor > 1)."""
    if factor <= 1:
        return tuple(int(c * factor) for c in rgb)
    return tuple(int(c + (255 - c) * (factor - 1)) for c in rgb)


def jitter(rgb: RGB, rng: np.random.Generator, amount: float = 9.0) -> RGB:
    """`rgb` with a little noise, so that one word covers a small region of colour and not one point."""
    return tuple(int(np.clip(c + rng.uniform(-amount, amount), 0, 255)) for c in rgb)
