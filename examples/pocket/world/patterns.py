"""What covers a silhouette: one colour, or two in a pattern."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from .palette import RGB
from .pen import Pen

PATTERNS = ("plain", "striped", "spotted", "zigzag", "half")
STAR = [
    (
        math.sin(k * math.pi / 5) * (1.0 if k % 2 == 0 else 0.45),
        -math.cos(k * math.pi / 5) * (1.0 if k % 2 == 0 else 0.45),
    )
    for k in range(10)
]
HEART = [
    (16 * math.sin(t) ** 3 / 17, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17)
    for t in (2 * math.pi * k / 40 for k in range(40))
]


def cover(image: Image.Image, mask: Image.Image, at: Pen, pattern: str, first: RGB, second: RGB) -> None:
    """Paint `mask`'s silhouette on `image` in `pattern`; the pattern is laid out in the thing's own coordinates."""
    if pattern == "plain":
        image.paste(first, mask=mask)
        return
    layer = Image.new("RGB", image.size, first)
    pen = Pen(ImageDraw.Draw(layer), at.cx, at.cy, at.radius)
    if pattern == "striped":
        for k in range(-3, 4):
            pen.box(-1.3, k * 0.42 - 0.1, 1.3, k * 0.42 + 0.1, second)
    elif pattern == "spotted":
        for row in range(-3, 4):
            for column in range(-3, 4):
                x = column * 0.46 + (0.23 if row % 2 else 0.0)
                pen.ellipse(x, row * 0.4, 0.125, 0.125, second)
    elif pattern == "zigzag":
        for k in (-0.62, 0.0, 0.62):
            points = [(-1.2 + 0.3 * j, k + (0.16 if j % 2 else -0.16)) for j in range(9)]
            pen.line(points, 0.17, second)
    elif pattern == "half":
        pen.box(0.0, -1.5, 1.5, 1.5, second)
    else:
        raise ValueError(f"unknown pattern {pattern!r}; known: {', '.join(PATTERNS)}")
    image.paste(layer, mask=mask)
