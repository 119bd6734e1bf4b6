"""Curves over the drawings that they are about: a column for each step, panels above, pictures below."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from train.comparison import INK, PAPER, SOFT
from train.metrics import Figure

Colour = tuple[int, int, int]
Panel = tuple[str, Sequence["Curve"], tuple[str, str]]  # title, curves, what floor and ceiling are

MARGIN, GAP, LEFT, RIGHT = 28, 10, 132, 206  # pixels; LEFT holds axis labels and rows' names, RIGHT names of curves
TILE, SMALLEST, WIDEST = 160, 72, 1240  # of a picture, and of all columns together
PANEL, FINE = 190, 3  # height of a panel; curves are drawn this much larger, then made smaller
ASIDE = 8  # between the points of two curves at one step
GRID: Colour = (226, 226, 222)
MARK: Colour = (213, 94, 0)
COLOURS: tuple[Colour, ...] = (
    (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (90, 90, 90),
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A step of the sweep."""

    title: str


@dataclass(frozen=True)
class Curve:
    """Figures, one for each column; None where there is none."""

    name: str
    figures: Sequence[Figure | None]


def compose(
    heading: str,
    under: str,
    columns: Sequence[Column],
    panels: Sequence[Panel],
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    best: tuple[int, int] | None = None,
) -> Image.Image:
    """One picture.

    Args:
        heading, under: the title and a line below it.
        columns: the steps, from left to right.
        panels: above each other; curves with their intervals, floor and ceiling as dashed lines.
        rows: a name and a picture for each column.
        best: (curve, column) to be marked; its row of pictures is that of the curve, or the first.
    """
    tile = max(SMALLEST, min(TILE, WIDEST // len(columns) - GAP))
    step = max(tile + GAP, 560 // len(columns))
    centres = [MARGIN + LEFT + step * k + step / 2 for k in range(len(columns))]
    right = MARGIN + LEFT + step * len(columns)
    top = MARGIN + 66
    height = top + len(panels) * (PANEL + 70) + 34 + len(rows) * (tile + GAP) + MARGIN
    out = Image.new("RGB", (right + RIGHT + MARGIN, height), PAPER)
    draw = ImageDraw.Draw(out)
    draw.text((MARGIN, MARGIN), heading, fill=INK, font=_font(26))
    draw.text((MARGIN, MARGIN + 36), under, fill=SOFT, font=_font(14))
    for panel in panels:
        _panel(out, panel, centres, (MARGIN + LEFT, top + 42, right, top + 42 + PANEL), best)
        top += PANEL + 70
    for column, x in zip(columns, centres, strict=True):
        draw.text((x, top + 8), column.title, fill=INK, font=_font(15), anchor="ma")
    top += 34
    for number, (name, images) in enumerate(rows):
        wrapped = "\n".join(textwrap.wrap(name, 17)[:5])
        draw.multiline_text((MARGIN, top + tile / 2), wrapped, fill=SOFT, font=_font(14), anchor="lm", spacing=3)
        for k, image in enumerate(images):
            x = round(centres[k] - tile / 2)
            if best is not None and k == best[1] and (number == best[0] or len(rows) != len(panels[0][1])):
                draw.rectangle((x - 4, top - 4, x + tile + 3, top + tile + 3), fill=MARK)
            out.paste(_fit(image, tile), (x, top))
        top += tile + GAP
    if best is not None:
        x = right + 8
        draw.rectangle((x, height - MARGIN - 24, x + 14, height - MARGIN - 10), outline=MARK, width=3)
        draw.text((x + 22, height - MARGIN - 17), "best score", fill=SOFT, font=_font(14), anchor="lm")
    return out


def _panel(
    out: Image.Image, panel: Panel, centres: Sequence[float], box: tuple[int, int, int, int],
    best: tuple[int, int] | None,
) -> None:  # fmt: skip
    """Axes and curves; names of the curves and of the dashed lines at their right ends, pushed apart."""
    title, curves, (floor_name, ceiling_name) = panel
    left, top, right, bottom = box
    figures = [figure for curve in curves for figure in curve.figures if figure is not None]
    floor, ceiling = figures[0].floor, figures[0].ceiling
    ticks = nice_ticks(*_span(figures))
    low, high = ticks[0], ticks[-1]

    def y(value: float) -> float:
        return bottom - (min(high, max(low, value)) - low) / (high - low) * (bottom - top)

    draw = ImageDraw.Draw(out)
    draw.text((MARGIN, top - 38), title, fill=INK, font=_font(17))
    for tick in ticks:
        draw.line((left, y(tick), right, y(tick)), fill=GRID)
        draw.text((left - 8, y(tick)), f"{tick:g}", fill=SOFT, font=_font(13), anchor="rm")
    for x in centres:
        draw.line((x, top, x, bottom), fill=GRID)
    names: list[tuple[float, str, Colour]] = []
    for value, name in ((floor, floor_name), (ceiling, ceiling_name)):
        if value is not None and low <= value <= high:
            for x in range(left, right, 9):
                draw.line((x, y(value), min(right, x + 4), y(value)), fill=SOFT)
            names.append((y(value), f"{name} {value:.2f}", SOFT))
    _curves(out, curves, centres, box, y, best)
    for curve, colour in zip(curves, _colours(len(curves))):
        last = [figure for figure in curve.figures if figure is not None]
        if curve.name and last:
            names.append((y(last[-1].mean), curve.name, colour))
    for place, name, colour in pushed_apart(names, 17, top, bottom):
        draw.text((right + 8, place), name, fill=colour, font=_font(14), anchor="lm")


def _curves(
    out: Image.Image, curves: Sequence[Curve], centres: Sequence[float], box: tuple[int, int, int, int], y: object,
    best: tuple[int, int] | None,
) -> None:  # fmt: skip
    assert callable(y)
    left, top, right, bottom = box[0], box[1] - 8, box[2], box[3] + 8
    size = ((right - left) * FINE, (bottom - top) * FINE)
    for number, (curve, colour) in enumerate(zip(curves, _colours(len(curves)))):
        layer = Image.new("RGBA", size, (*colour, 0))
        draw = ImageDraw.Draw(layer)
        aside = (number - (len(curves) - 1) / 2) * ASIDE
        points = [
            ((x + aside - left) * FINE, figure)
            for x, figure in zip(centres, curve.figures, strict=True)
            if figure is not None
        ]

        def at(value: float) -> float:
            return (y(value) - top) * FINE

        ranges = [(x, at(f.low), at(f.high)) for x, f in points if f.low is not None and f.high is not None]
        if len(curves) == 1 and len(ranges) > 1:
            band = [(x, up) for x, _, up in ranges] + [(x, down) for x, down, _ in reversed(ranges)]
            draw.polygon(band, fill=(*colour, 34))
        else:  # bands over one another would be one
            for x, down, up in ranges:
                draw.line((x, down, x, up), fill=(*colour, 120), width=2 * FINE)
        if len(points) > 1:
            draw.line([(x, at(f.mean)) for x, f in points], fill=(*colour, 255), width=2 * FINE + 2, joint="curve")
        for k, (x, f) in enumerate(points):
            radius = 4.5 * FINE
            draw.ellipse((x - radius, at(f.mean) - radius, x + radius, at(f.mean) + radius), fill=(*colour, 255))
            if best == (number, k):
                radius = 9 * FINE
                ring = (x - radius, at(f.mean) - radius, x + radius, at(f.mean) + radius)
                draw.ellipse(ring, outline=(*MARK, 255), width=2 * FINE + 1)
        small = layer.resize((right - left, bottom - top), Image.Resampling.BOX)
        out.paste(small, (left, top), small)


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers that reach from below `low` to above `high`."""
    width = max(high - low, 1e-6) / 4
    power = 10.0 ** math.floor(math.log10(width))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= width * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * k, 10) for k in range(first, max(last, first + 1) + 1)]


def pushed_apart(
    names: Sequence[tuple[float, str, Colour]], room: float, top: float, bottom: float
) -> list[tuple[float, str, Colour]]:
    """Labels in their order with at least `room` between them, as near to their places as that allows."""
    placed = sorted(names)
    ys = [place for place, _, _ in placed]
    for k in range(1, len(ys)):
        ys[k] = max(ys[k], ys[k - 1] + room)
    limit = bottom
    for k in reversed(range(len(ys))):
        ys[k] = min(ys[k], limit)
        limit = ys[k] - room
    ys = [max(value, top + k * room) if ys and ys[0] < top else value for k, value in enumerate(ys)]
    return [(value, name, colour) for value, (_, name, colour) in zip(ys, placed)]


def _span(figures: Sequence[Figure]) -> tuple[float, float]:
    """From the lowest to the highest mean, floor and ceiling; intervals only as far as they squeeze no curve."""
    lines = [line for figure in figures for line in (figure.mean, figure.floor, figure.ceiling) if line is not None]
    low, high = min(lines), max(lines)
    room = 0.3 * max(high - low, 0.02)
    ends = [end for figure in figures for end in (figure.low, figure.high) if end is not None]
    return max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)


def _colours(count: int) -> list[Colour]:
    return [COLOURS[k % len(COLOURS)] for k in range(count)]


def _fit(image: Image.Image, tile: int) -> Image.Image:
    if image.width < tile:  # a whole factor first, so that a pixel stays a square
        factor = -(-tile // image.width)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
