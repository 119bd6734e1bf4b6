"""A pen in local coordinates: draws at four times the final size, so that reducing gives anti-aliased edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .palette import RGB

SIZE = 64  # final pixels
SUPER = 4  # drawn at SIZE * SUPER and reduced
CANVAS = SIZE * SUPER

Point = tuple[float, float]


@dataclass(frozen=True)
class Pen:
    """Local coordinates (x right, y down, the thing fills about -1..1) on a canvas.

    `cx`, `cy` and `radius` are in final pixels.
    """

    draw: ImageDraw.ImageDraw
    cx: float
    cy: float
    radius: float

    def point(self, x: float, y: float) -> Point:
        return ((self.cx + x * self.radius) * SUPER, (self.cy + y * self.radius) * SUPER)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: RGB | int) -> None:
        (x0, y0), (x1, y1) = self.point(x - rx, y - ry), self.point(x + rx, y + ry)
        self.draw.ellipse((x0, y0, x1, y1), fill=fill)

    def polygon(self, points: Sequence[Point], fill: RGB | int) -> None:
        self.draw.polygon([self.point(x, y) for x, y in points], fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: RGB | int, corner: float = 0.0) -> None:
        a, b = self.point(x0, y0), self.point(x1, y1)
        self.draw.rounded_rectangle((*a, *b), radius=corner * self.radius * SUPER, fill=fill)

    def line(self, points: Sequence[Point], width: float, fill: RGB | int) -> None:
        w = max(1, round(width * self.radius * SUPER))
        self.draw.line([self.point(x, y) for x, y in points], fill=fill, width=w, joint="curve")

    def arc(self, x: float, y: float, rx: float, ry: float, start: float, end: float, width: float, fill: RGB) -> None:
        (x0, y0), (x1, y1) = self.point(x - rx, y - ry), self.point(x + rx, y + ry)
        w = max(1, round(width * self.radius * SUPER))
        self.draw.arc((x0, y0, x1, y1), start, end, fill=fill, width=w)


def blank_mask() -> Image.Image:
    return Image.new("L", (CANVAS, CANVAS), 0)
