"""Pictures of the lecture's comparisons, drawn as the sweeps' are: points over a logarithm, bars, heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from train.comparison import INK, PAPER, SOFT
from train.sweep_picture import COLOURS, GRID, nice_ticks, pushed_apart

MARGIN, LEFT, TOP, RIGHT, BOTTOM = 28, 62, 100, 290, 66
WIDTH, HEIGHT = 720, 430


@dataclass(frozen=True)
class Point:
    """x is drawn on a logarithm; half: of the interval around y. Points of a family have one colour."""

    name: str
    family: str
    x: float
    y: float
    half: float = 0.0


@dataclass(frozen=True)
class Bar:
    """A bar of a group, half: of the interval at its end."""

    name: str
    y: float
    half: float = 0.0


@dataclass(frozen=True)
class Map:
    """A heat map: rows[i][j] from 0 to 1; names of the axes."""

    title: str
    rows: Sequence[Sequence[float]]
    down: str
    right: str


def scatter(heading: str, under: str, points: Sequence[Point], *, x: str, y: str) -> Image.Image:
    """Points with their intervals, percentages; names at the right, joined to their points."""
    out, draw = _page(heading, under, MARGIN + LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM)
    left, right, top, bottom = MARGIN + LEFT, MARGIN + LEFT + WIDTH, TOP, TOP + HEIGHT
    low, high = min(p.y - p.half for p in points), min(100.0, max(p.y + p.half for p in points))
    at = _vertical(draw, nice_ticks(low, high), (left, top, right, bottom), y)
    first = math.floor(math.log10(min(p.x for p in points)))
    last = max(math.ceil(math.log10(max(p.x for p in points))), first + 1)

    def along(value: float) -> float:
        return left + (math.log10(value) - first) / (last - first) * WIDTH

    for power in range(first, last + 1):
        draw.line((along(10**power), top, along(10**power), bottom), fill=GRID)
        draw.text((along(10**power), bottom + 8), f"{10**power:,}", fill=SOFT, font=_font(13), anchor="ma")
    draw.text((left + WIDTH / 2, bottom + 32), x, fill=SOFT, font=_font(14), anchor="ma")
    families = list(dict.fromkeys(p.family for p in points))
    colours = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(families)}
    for point in points:
        a, b, colour = along(point.x), at(point.y), colours[point.family]
        draw.line((a, at(point.y - point.half), a, at(min(100.0, point.y + point.half))), fill=colour, width=2)
        draw.ellipse((a - 5, b - 5, a + 5, b + 5), fill=colour)
    by_height = sorted(points, key=lambda p: (at(p.y), p.name))
    places = pushed_apart(
        [(at(p.y), f"{p.name}\0{n}", colours[p.family]) for n, p in enumerate(by_height)], 18, top, bottom
    )
    for place, name, colour in places:
        title, _, number = name.partition("\0")
        point = by_height[int(number)]
        draw.line((along(point.x) + 6, at(point.y), right, at(point.y), right + 14, place), fill=_pale(colour))
        draw.text((right + 18, place), title, fill=colour, font=_font(14), anchor="lm")
    return out


def bars(heading: str, under: str, groups: Sequence[tuple[str, Sequence[Bar]]], *, y: str) -> Image.Image:
    """Groups of bars beside each other, from 0 to 100."""
    wide = 190
    out, draw = _page(heading, under, max(MARGIN * 2 + LEFT + wide * len(groups), 820), TOP + HEIGHT + BOTTOM)
    left, top, bottom = MARGIN + LEFT, TOP + 26, TOP + HEIGHT
    at = _vertical(draw, [0, 20, 40, 60, 80, 100], (left, top, left + wide * len(groups), bottom), y)
    names = list(dict.fromkeys(bar.name for _, group in groups for bar in group))
    colours = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)}
    for number, (title, group) in enumerate(groups):
        middle = left + wide * (number + 0.5)
        for k, bar in enumerate(group):
            a = middle + (k - len(group) / 2) * 52
            draw.rectangle((a + 3, at(bar.y), a + 49, bottom), fill=colours[bar.name])
            if bar.half:
                ends = (a + 26, at(min(100, bar.y - bar.half)), a + 26, at(min(100, bar.y + bar.half)))
                draw.line(ends, fill=INK, width=2)
            draw.text(
                (a + 26, at(min(100, bar.y + bar.half)) - 4), f"{bar.y:.1f}", fill=INK, font=_font(13), anchor="mb"
            )
        draw.text((middle, bottom + 10), title, fill=INK, font=_font(13), anchor="ma")
    for k, name in enumerate(names):
        draw.rectangle((left + 150 * k, bottom + 40, left + 150 * k + 14, bottom + 54), fill=colours[name])
        draw.text((left + 150 * k + 20, bottom + 47), name, fill=SOFT, font=_font(14), anchor="lm")
    return out


def heat_maps(heading: str, under: str, maps: Sequence[Sequence[Map]], *, size: int = 250) -> Image.Image:
    """Rows of heat maps of one size, with the scale from 0 (light) to 1 (dark) at the right."""
    step_x, step_y = size + 74, size + 88
    width = MARGIN * 2 + 30 + step_x * max(len(row) for row in maps) + 50
    out, draw = _page(heading, under, width, TOP + step_y * len(maps) + 10)
    for number, row in enumerate(maps):
        for k, one in enumerate(row):
            x, y = MARGIN + 30 + k * step_x, TOP + 34 + number * step_y
            pixels = Image.new("RGB", (len(one.rows[0]), len(one.rows)))
            pixels.putdata([_shade(value) for line in one.rows for value in line])
            out.paste(pixels.resize((size, size), Image.Resampling.NEAREST), (x, y))
            draw.text((x, y - 8), one.title, fill=INK, font=_font(14), anchor="lb")
            draw.text(
                (x + size / 2, y + size + 6),
                f"{one.right}: 1 to {len(one.rows[0])}",
                fill=SOFT,
                font=_font(12),
                anchor="ma",
            )
            _upright(out, (x - 20, y + size // 2), f"{one.down}: 1 to {len(one.rows)}")
    x, y = width - MARGIN - 44, TOP + 34
    for line in range(size):
        draw.line((x, y + line, x + 16, y + line), fill=_shade(1 - line / (size - 1)))
    for value in (0, 0.5, 1):
        draw.text((x + 20, y + size * (1 - value)), f"{value:g}", fill=SOFT, font=_font(12), anchor="lm")
    return out


def _page(heading: str, under: str, width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    out = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(out)
    draw.text((MARGIN, 18), heading, fill=INK, font=_font(24))
    draw.text((MARGIN, 48), under, fill=SOFT, font=_font(13))
    return out, draw


def _vertical(draw: ImageDraw.ImageDraw, ticks: Sequence[float], box: tuple[float, float, float, float], name: str):  # type: ignore[no-untyped-def]
    """Lines across at the ticks; returns from a value to its height."""
    left, top, right, bottom = box

    def at(value: float) -> float:
        return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    for tick in ticks:
        draw.line((left, at(tick), right, at(tick)), fill=GRID)
        draw.text((left - 8, at(tick)), f"{tick:g}", fill=SOFT, font=_font(13), anchor="rm")
    draw.text((left - 34, top - 8), name, fill=SOFT, font=_font(13), anchor="lb")
    return at


def _upright(out: Image.Image, middle: tuple[int, int], text: str) -> None:
    tile = Image.new("RGB", (200, 18), PAPER)
    ImageDraw.Draw(tile).text((100, 9), text, fill=SOFT, font=_font(12), anchor="mm")
    turned = tile.rotate(90, expand=True)
    out.paste(turned, (middle[0] - 9, middle[1] - 100))


def _shade(value: float) -> tuple[int, int, int]:
    """0 is nearly the paper, 1 a dark blue."""
    value = min(1.0, max(0.0, value))
    return tuple(round(a + (b - a) * value) for a, b in zip((245, 246, 240), (8, 48, 107)))  # type: ignore[return-value]


def _pale(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple((c + 2 * p) // 3 for c, p in zip(colour, PAPER))  # type: ignore[return-value]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
