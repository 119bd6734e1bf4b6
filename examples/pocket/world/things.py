"""The other things: a silhouette that a pattern covers, and a few fixed details."""

from __future__ import annotations

from PIL import Image, ImageDraw

from .palette import RGB, shade
from .patterns import HEART, STAR, cover
from .pen import Pen, blank_mask

VARIANTS = {  # how many forms a thing comes in
    "cup": 6, "house": 2, "car": 2, "flower": 2, "fish": 2, "tree": 2, "star": 1, "heart": 1, "mushroom": 1,
}  # fmt: skip
KINDS = tuple(VARIANTS)


def _cup(pen: Pen, v: int, fill: RGB | int) -> None:
    width, height = ((0.52, 0.6), (0.4, 0.8), (0.66, 0.48))[v // 2]
    taper = 0.12
    pen.polygon([(-width, -height), (width, -height), (width - taper, height), (-width + taper, height)], fill)


def _cup_before(pen: Pen, v: int, first: RGB) -> None:
    width = (0.52, 0.4, 0.66)[v // 2]
    side = -1 if v % 2 else 1
    pen.arc(side * width * 0.98, -0.05, 0.32, 0.3, 0, 360, 0.14, shade(first, 0.75))


def _cup_after(pen: Pen, v: int, first: RGB) -> None:
    width, height = ((0.52, 0.6), (0.4, 0.8), (0.66, 0.48))[v // 2]
    pen.ellipse(0, -height, width, 0.13, shade(first, 0.6))


def _house(pen: Pen, v: int, fill: RGB | int) -> None:
    pen.box(-0.66, -0.1, 0.66, 0.8, fill)


def _house_after(pen: Pen, v: int, first: RGB) -> None:
    roof = (120, 62, 48) if v == 0 else (70, 74, 92)
    pen.polygon([(-0.86, -0.06), (0.86, -0.06), (0, -0.86)], roof)
    pen.box(-0.14, 0.34, 0.16, 0.8, (92, 60, 40))
    for x in (-0.42, 0.42):
        pen.box(x - 0.14, 0.1, x + 0.14, 0.36, (190, 226, 244))


def _car(pen: Pen, v: int, fill: RGB | int) -> None:
    pen.box(-0.95, -0.05, 0.95, 0.45, fill, corner=0.14)
    roof = (
        [(-0.55, 0.0), (-0.36, -0.46), (0.36, -0.46), (0.58, 0.0)]
        if v == 0
        else [(-0.8, 0.0), (-0.76, -0.5), (0.4, -0.5), (0.6, 0.0)]
    )
    pen.polygon(roof, fill)


def _car_after(pen: Pen, v: int, first: RGB) -> None:
    pen.polygon([(-0.4, -0.04), (-0.28, -0.36), (-0.05, -0.36), (-0.05, -0.04)], (196, 228, 244))
    pen.polygon([(0.06, -0.04), (0.06, -0.36), (0.27, -0.36), (0.42, -0.04)], (196, 228, 244))
    for x in (-0.54, 0.54):
        pen.ellipse(x, 0.46, 0.23, 0.23, (34, 32, 38))
        pen.ellipse(x, 0.46, 0.1, 0.1, (190, 190, 196))


def _flower_before(pen: Pen, v: int, first: RGB) -> None:
    pen.line([(0, -0.1), (0, 0.95)], 0.12, (52, 132, 58))
    pen.ellipse(0.24, 0.62, 0.22, 0.11, (52, 132, 58))


def _flower(pen: Pen, v: int, fill: RGB | int) -> None:
    petals = ((0, -0.42), (0.4, -0.13), (0.25, 0.34), (-0.25, 0.34), (-0.4, -0.13))
    if v == 1:
        petals = ((0.36, 0.0), (-0.36, 0.0), (0.0, 0.36), (0.0, -0.36))
    for x, y in petals:
        pen.ellipse(x, y - 0.3, 0.3, 0.3, fill)


def _flower_after(pen: Pen, v: int, first: RGB) -> None:
    pen.ellipse(0, -0.3, 0.21, 0.21, (130, 82, 30))


def _fish(pen: Pen, v: int, fill: RGB | int) -> None:
    side = 1 if v == 0 else -1
    pen.ellipse(side * 0.14, 0, 0.68, 0.46, fill)
    pen.polygon([(side * -0.38, 0.0), (side * -0.95, -0.44), (side * -0.95, 0.44)], fill)


def _fish_after(pen: Pen, v: int, first: RGB) -> None:
    side = 1 if v == 0 else -1
    pen.ellipse(side * 0.48, -0.12, 0.13, 0.13, (252, 252, 250))
    pen.ellipse(side * 0.5, -0.12, 0.065, 0.065, (24, 22, 28))


def _tree_before(pen: Pen, v: int, first: RGB) -> None:
    pen.box(-0.13, 0.2, 0.13, 0.95, (112, 74, 44))


def _tree(pen: Pen, v: int, fill: RGB | int) -> None:
    if v == 0:
        pen.ellipse(0, -0.26, 0.66, 0.6, fill)
    else:
        pen.polygon([(-0.66, 0.5), (0.66, 0.5), (0, -0.9)], fill)


def _star(pen: Pen, v: int, fill: RGB | int) -> None:
    pen.polygon([(x * 0.95, y * 0.95) for x, y in STAR], fill)


def _heart(pen: Pen, v: int, fill: RGB | int) -> None:
    pen.polygon([(x * 0.9, y * 0.9) for x, y in HEART], fill)


def _mushroom_before(pen: Pen, v: int, first: RGB) -> None:
    pen.box(-0.22, 0.0, 0.22, 0.85, (238, 226, 204), corner=0.1)


def _mushroom(pen: Pen, v: int, fill: RGB | int) -> None:
    pen.draw.pieslice((*pen.point(-0.8, -0.75), *pen.point(0.8, 0.85)), 180, 360, fill=fill)


_SHAPE = {
    "cup": _cup, "house": _house, "car": _car, "flower": _flower, "fish": _fish,
    "tree": _tree, "star": _star, "heart": _heart, "mushroom": _mushroom,
}  # fmt: skip
_BEFORE = {"cup": _cup_before, "flower": _flower_before, "tree": _tree_before, "mushroom": _mushroom_before}
_AFTER = {"cup": _cup_after, "house": _house_after, "car": _car_after, "flower": _flower_after, "fish": _fish_after}


def draw_thing(image: Image.Image, at: Pen, kind: str, variant: int, pattern: str, first: RGB, second: RGB) -> None:
    """Draw a `kind` (any but the creature) on `image` with its centre and radius taken from `at`."""
    pen = Pen(ImageDraw.Draw(image), at.cx, at.cy, at.radius)
    if kind in _BEFORE:
        _BEFORE[kind](pen, variant, first)
    mask = blank_mask()
    _SHAPE[kind](Pen(ImageDraw.Draw(mask), at.cx, at.cy, at.radius), variant, 255)
    cover(image, mask, at, pattern, first, second)
    if kind in _AFTER:
        _AFTER[kind](pen, variant, first)
