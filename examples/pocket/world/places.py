"""The backgrounds: plain colours and ten places, each a few large flat shapes."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .palette import COLOURS, RGB, jitter
from .pen import CANVAS, SUPER

# place: (phrase, colours of things that would not be seen in front of it)
PLACES: dict[str, tuple[str, frozenset[str]]] = {
    "beach": ("on a beach", frozenset({"yellow"})),
    "forest": ("in a forest", frozenset({"green"})),
    "meadow": ("in a meadow", frozenset({"green"})),
    "snow": ("in the snow", frozenset({"white"})),
    "desert": ("in the desert", frozenset({"orange", "yellow"})),
    "night": ("at night", frozenset({"black"})),
    "sea": ("under water", frozenset({"blue", "cyan"})),
    "sunset": ("at sunset", frozenset({"orange", "purple"})),
    "city": ("in a city", frozenset({"black"})),
    "space": ("in space", frozenset({"black"})),
}
NAMES = tuple(PLACES)


def _sky(d: ImageDraw.ImageDraw, top: RGB, bottom: RGB, to: float) -> None:
    steps = 16
    for k in range(steps):
        t = k / (steps - 1)
        colour = tuple(int(a + (b - a) * t) for a, b in zip(top, bottom, strict=True))
        d.rectangle((0, CANVAS * to * k / steps, CANVAS, CANVAS * to * (k + 1) / steps + 1), fill=colour)


def draw_place(place: str, rng: np.random.Generator) -> Image.Image:
    """The empty scene, a (CANVAS, CANVAS) RGB picture. `place` is a name of PLACES or a colour."""
    if place in COLOURS:
        return Image.new("RGB", (CANVAS, CANVAS), jitter(COLOURS[place], rng))
    image = Image.new("RGB", (CANVAS, CANVAS))
    d = ImageDraw.Draw(image)
    s = SUPER
    horizon = int(rng.integers(34, 42)) * s
    w = CANVAS

    def ground(colour: RGB) -> None:
        d.rectangle((0, horizon, w, w), fill=jitter(colour, rng, 6))

    if place == "beach":
        _sky(d, (120, 196, 240), (196, 228, 244), 1)
        d.rectangle((0, horizon - 9 * s, w, horizon + 2 * s), fill=(50, 130, 190))
        ground((240, 216, 150))
        x = int(rng.integers(6, 58)) * s
        d.ellipse((x - 6 * s, 3 * s, x + 6 * s, 15 * s), fill=(255, 244, 170))
    elif place == "forest":
        d.rectangle((0, 0, w, w), fill=(120, 168, 128))
        ground((66, 104, 56))
        for x in range(int(rng.integers(-4, 4)), 68, 11):
            d.rectangle(((x - 1) * s, 20 * s, (x + 2) * s, horizon + 3 * s), fill=(92, 66, 44))
            d.ellipse(((x - 7) * s, 3 * s, (x + 8) * s, 28 * s), fill=(34, 92, 50))
    elif place == "meadow":
        _sky(d, (128, 200, 244), (200, 232, 248), 1)
        ground((122, 196, 84))
        for _ in range(9):
            x, y = rng.integers(0, 64) * s, rng.integers(44, 63) * s
            d.ellipse((x - s, y - s, x + s, y + s), fill=(250, 240, 120))
    elif place == "snow":
        d.rectangle((0, 0, w, w), fill=(176, 194, 214))
        ground((240, 244, 250))
        for _ in range(26):
            x, y = rng.integers(0, 64) * s, rng.integers(0, 40) * s
            d.ellipse((x - s, y - s, x + s, y + s), fill=(250, 252, 255))
    elif place == "desert":
        _sky(d, (244, 208, 140), (250, 230, 180), 1)
        ground((222, 164, 88))
        x = int(rng.integers(-10, 50))
        d.pieslice(((x - 26) * s, horizon - 9 * s, (x + 26) * s, horizon + 9 * s), 180, 360, fill=(206, 146, 74))
    elif place == "night":
        _sky(d, (14, 18, 52), (40, 48, 96), 1)
        ground((24, 44, 44))
        for _ in range(14):
            x, y = rng.integers(0, 64) * s, rng.integers(0, 34) * s
            d.ellipse((x - 2, y - 2, x + 3, y + 3), fill=(246, 246, 214))
        x = int(rng.integers(8, 56))
        d.ellipse(((x - 5) * s, 4 * s, (x + 5) * s, 14 * s), fill=(246, 240, 200))
    elif place == "sea":
        _sky(d, (60, 156, 214), (14, 70, 140), 1)
        d.rectangle((0, 57 * s, w, w), fill=(190, 176, 128))
        for _ in range(9):
            x, y, r = rng.integers(2, 62) * s, rng.integers(2, 52) * s, int(rng.integers(4, 9))
            d.ellipse((x - r, y - r, x + r, y + r), fill=(170, 222, 246))
    elif place == "sunset":
        _sky(d, (120, 60, 130), (250, 150, 70), horizon / w)
        x = int(rng.integers(12, 52)) * s
        d.ellipse((x - 9 * s, horizon - 9 * s, x + 9 * s, horizon + 9 * s), fill=(255, 226, 110))
        ground((70, 44, 72))
    elif place == "city":
        d.rectangle((0, 0, w, w), fill=(186, 202, 220))
        x = -int(rng.integers(0, 8))
        while x < 64:
            width, height = int(rng.integers(8, 14)), int(rng.integers(16, 36))
            tone = int(rng.integers(96, 140))
            d.rectangle((x * s, horizon - height * s, (x + width - 1) * s, horizon), fill=(tone, tone, tone + 12))
            for wy in range(horizon // s - height + 3, horizon // s - 3, 6):
                for wx in range(x + 2, x + width - 3, 4):
                    d.rectangle((wx * s, wy * s, (wx + 2) * s - 1, (wy + 3) * s), fill=(246, 226, 140))
            x += width
        ground((84, 84, 90))
    elif place == "space":
        d.rectangle((0, 0, w, w), fill=(12, 8, 26))
        for _ in range(34):
            x, y, r = rng.integers(0, 64) * s, rng.integers(0, 64) * s, int(rng.integers(1, 4))
            d.ellipse((x - r, y - r, x + r, y + r), fill=(236, 236, 250))
        x, y = int(rng.choice((9, 54))), int(rng.integers(8, 18))
        d.ellipse(((x - 7) * s, (y - 7) * s, (x + 7) * s, (y + 7) * s), fill=(196, 120, 84))
        d.ellipse(((x - 5) * s, (y - 6) * s, (x + 2) * s, (y + 1) * s), fill=(220, 150, 110))
    else:
        raise ValueError(f"unknown place {place!r}; known: {', '.join((*NAMES, *COLOURS))}")
    return image
