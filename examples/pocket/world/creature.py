"""The creature: the one class with wide variation inside, for DreamBooth subjects to come from."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw

from .palette import COLOURS, RGB, shade
from .patterns import HEART, STAR, cover
from .pen import Pen, blank_mask

BODIES = ("round", "tall", "wide", "square", "pear")
TOPS = ("nothing", "round ears", "pointed ears", "horns", "antennae", "a crest")
MOUTHS = ("smile", "open", "teeth")
MARKS = ("none", "star", "heart", "dot")

# top of the head, bottom of the body, half width at eye height: where the parts attach (local units)
_FRAME = {
    "round": (-0.52, 0.72, 0.5),
    "tall": (-0.72, 0.78, 0.36),
    "wide": (-0.3, 0.68, 0.62),
    "square": (-0.5, 0.68, 0.5),
    "pear": (-0.66, 0.76, 0.34),
}


@dataclass(frozen=True)
class Creature:
    """What makes one creature itself, beside its colours and pattern."""

    body: str = "round"
    top: str = "nothing"
    eyes: int = 2
    feet: int = 2
    arms: bool = False
    mouth: str = "smile"
    belly: bool = False
    mark: str = "none"
    mark_colour: str = "white"


def _silhouette(pen: Pen, c: Creature, fill: RGB | int) -> None:
    if c.body == "round":
        pen.ellipse(0, 0.1, 0.66, 0.64, fill)
    elif c.body == "tall":
        pen.ellipse(0, 0.03, 0.48, 0.78, fill)
    elif c.body == "wide":
        pen.ellipse(0, 0.2, 0.84, 0.52, fill)
    elif c.body == "square":
        pen.box(-0.6, -0.52, 0.6, 0.7, fill, corner=0.18)
    else:
        pen.ellipse(0, -0.28, 0.42, 0.42, fill)
        pen.ellipse(0, 0.3, 0.66, 0.5, fill)


def _top(pen: Pen, c: Creature, first: RGB, second: RGB) -> None:
    head, _, half = _FRAME[c.body]
    if c.top == "round ears":
        for side in (-1, 1):
            pen.ellipse(side * half * 0.85, head + 0.06, 0.22, 0.22, first)
            pen.ellipse(side * half * 0.85, head + 0.06, 0.11, 0.11, shade(first, 0.6))
    elif c.top == "pointed ears":
        for side in (-1, 1):
            x = side * half * 0.8
            pen.polygon([(x - 0.24, head + 0.3), (x + 0.24, head + 0.3), (x + side * 0.16, head - 0.34)], first)
    elif c.top == "horns":
        for side in (-1, 1):
            x = side * half * 0.6
            pen.polygon(
                [(x - 0.12, head + 0.2), (x + 0.12, head + 0.2), (x + side * 0.2, head - 0.36)], (240, 226, 190)
            )
    elif c.top == "antennae":
        for side in (-1, 1):
            tip = (side * (half * 0.5 + 0.16), head - 0.32)
            pen.line([(side * half * 0.35, head + 0.2), tip], 0.09, (60, 52, 60))
            pen.ellipse(*tip, 0.13, 0.13, second)
    elif c.top == "a crest":
        for k in (-1, 0, 1):
            x = k * 0.22
            pen.polygon([(x - 0.14, head + 0.2), (x + 0.14, head + 0.2), (x, head - 0.34 + 0.1 * abs(k))], second)


def _face(pen: Pen, c: Creature) -> None:
    head, _, _ = _FRAME[c.body]
    y = head + 0.42
    step = {1: 0.0, 2: 0.44, 3: 0.36}[c.eyes]
    radius = {1: 0.24, 2: 0.18, 3: 0.155}[c.eyes]
    for k in range(c.eyes):
        x = (k - (c.eyes - 1) / 2) * step
        pen.ellipse(x, y, radius, radius, (252, 252, 250))
        pen.ellipse(x, y + 0.02, radius * 0.52, radius * 0.52, (24, 22, 28))
    mouth_y = y + 0.36
    if c.mouth == "smile":
        pen.arc(0, mouth_y - 0.1, 0.2, 0.15, 20, 160, 0.075, (40, 24, 30))
    elif c.mouth == "open":
        pen.ellipse(0, mouth_y, 0.13, 0.1, (60, 16, 26))
    else:
        pen.box(-0.19, mouth_y - 0.07, 0.19, mouth_y + 0.08, (40, 24, 30), corner=0.04)
        for x in (-0.1, 0.1):
            pen.box(x - 0.07, mouth_y - 0.07, x + 0.07, mouth_y + 0.02, (252, 252, 250))


def draw_creature(image: Image.Image, at: Pen, c: Creature, pattern: str, first: RGB, second: RGB) -> None:
    """Draw `c` on `image` (supersampled canvas) with its centre and radius taken from `at`."""
    pen = Pen(ImageDraw.Draw(image), at.cx, at.cy, at.radius)
    _, foot, half = _FRAME[c.body]
    dark = shade(first, 0.72)
    for k in range(c.feet):
        x = (k - (c.feet - 1) / 2) * (1.0 / max(c.feet - 1, 1)) * (half + 0.22)
        pen.ellipse(x, foot + 0.06, 0.17 if c.feet < 4 else 0.13, 0.16, dark)
    if c.arms:
        for side in (-1, 1):
            pen.line([(side * half, 0.12), (side * (half + 0.42), -0.16)], 0.17, dark)
            pen.ellipse(side * (half + 0.42), -0.16, 0.12, 0.12, dark)
    _top(pen, c, first, second)
    mask = blank_mask()
    _silhouette(Pen(ImageDraw.Draw(mask), at.cx, at.cy, at.radius), c, 255)
    cover(image, mask, at, pattern, first, second)
    if c.belly:
        pen.ellipse(0, foot - 0.36, min(half, 0.44) * 0.88, 0.32, second)
    if c.mark != "none":
        mark = COLOURS[c.mark_colour]
        y = foot - 0.2
        if c.mark == "dot":
            pen.ellipse(0, y, 0.17, 0.17, mark)
        else:
            outline = STAR if c.mark == "star" else HEART
            pen.polygon([(px * 0.25, y + py * 0.25) for px, py in outline], mark)
    _face(pen, c)
