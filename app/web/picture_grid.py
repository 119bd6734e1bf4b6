"""A grid of pictures over one or two settings of a request: what each place asks for, and all in one PNG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

from app.web.adapter_names import AdapterNames
from app.web.limits import Limits
from app.web.picture_settings import MAX_SEED, Request
from app.web.prompt_syntax import MAX_WEIGHT, Weight
from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable
from train.comparison import INK, PAPER, SOFT

KINDS = ("weight", "seed", "checkpoint", "adapter", "prompt", "steps", "guidance")
MOST_CHECKPOINTS = 8  # that an axis takes where it names none
MAX_AXIS = 20_000  # characters
GAP, MARGIN, SIDE, LINE = 8, 16, 150, 17  # pixels; SIDE: of a row's label
EMPTY = (232, 232, 228)


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it goes through.

    Attributes:
        kind: one of `KINDS`. "weight" is that of the first adapter, "checkpoint" steps of its run (none given: all of
            them, thinned), "adapter" comes in its place.
        values: numbers, or texts for "adapter" and "prompt".
    """

    kind: str
    values: tuple[float | int | str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One place: what it asks for, and the labels of its column and row."""

    request: Request
    x: str
    y: str


def parse_axis(kind: str, text: str) -> Axis:
    """An axis as it is typed: values with commas between them, prompts one a line.

    "0..1/5" is five numbers from 0 to 1, "3..6" the whole numbers from 3 to 6.

    Raises:
        ConfigError: another kind, or values that are no such numbers.
    """
    if kind not in KINDS:
        raise ConfigError(f"{printable(str(kind), 30)!a} is nothing that a grid can go over; choose from "
                          f"{', '.join(KINDS)}")  # fmt: skip
    if not isinstance(text, str) or len(text) > MAX_AXIS:
        raise ConfigError(f"the values of {kind} are too long; at most {MAX_AXIS:,} characters")
    if kind == "prompt":
        return Axis(kind, tuple(line.strip() for line in text.split("\n") if line.strip()))
    words = [word.strip() for word in text.replace("\n", ",").split(",") if word.strip()]
    if kind == "adapter":
        return Axis(kind, tuple(words))
    values: list[float | int | str] = []
    for word in words:
        values += _numbers(kind, word)
    return Axis(kind, tuple(values))


def cells_of(
    request: Request, x_axis: Axis, y_axis: Axis | None, names: AdapterNames, owner: str | None, limits: Limits
) -> list[list[Cell]]:
    """The requests of all places, rows of columns, from a request whose prompt has no tags.

    Raises:
        ConfigError: an axis without values or with one twice, two of a kind, an axis that the request has no adapter
            for, or more places than the limits allow.
    """
    axes = [x_axis] if y_axis is None else [x_axis, y_axis]
    if len({axis.kind for axis in axes}) < len(axes):
        raise ConfigError(f"both directions go over {x_axis.kind}; choose another for one of them")
    if {axis.kind for axis in axes} == {"adapter", "checkpoint"}:
        raise ConfigError("adapter and checkpoint both say which adapter is used; choose one of them")
    named = next((axis.values[0] for axis in axes if axis.kind == "adapter" and axis.values), None)
    if isinstance(named, str) and not request.adapters:
        request = replace(request, adapters=[(named, 1.0)])
    rows = [(request, "")] if y_axis is None else _steps(request, y_axis, names, owner)
    columns = len(_steps(request, x_axis, names, owner))
    if columns * len(rows) > limits.grid:
        raise ConfigError(
            f"{columns} times {len(rows)} are {columns * len(rows)} pictures; a grid has at most {limits.grid}"
        )
    return [[Cell(cell, x, y) for cell, x in _steps(row, x_axis, names, owner)] for row, y in rows]


def compose_grid(
    cells: Sequence[Sequence[Cell]], drawn: Mapping[tuple[int, int], Image.Image], x_axis: Axis, y_axis: Axis | None,
    most_pixels: int,
) -> Image.Image:  # fmt: skip
    """One picture of all places, labels above and beside; a place without a picture stays empty.

    Places shrink where the whole would have more pixels than allowed.
    """
    width, height = next(iter(drawn.values())).size
    factor = max(1, math.ceil(96 / width))  # small ones grow, so that labels fit
    width, height = width * factor, height * factor
    beside = SIDE if y_axis is not None else 0
    wide = max(10, width // 8)
    labels = [textwrap.wrap(printable(cell.x, 160), wide)[:4] or [""] for cell in cells[0]]
    above = 24 + LINE * max(map(len, labels)) + GAP
    columns, rows = len(cells[0]), len(cells)
    share = math.sqrt(most_pixels / max(1, (columns * (width + GAP) + beside) * (rows * (height + GAP) + above)))
    if share < 1:
        width, height = max(16, int(width * share)), max(16, int(height * share))
    size = (2 * MARGIN + beside + columns * (width + GAP) - GAP, 2 * MARGIN + above + rows * (height + GAP) - GAP)
    out = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(out)
    head, small = ImageFont.load_default(15), ImageFont.load_default(13)
    title = x_axis.kind if y_axis is None else f"{x_axis.kind} across, {y_axis.kind} down"
    draw.text((MARGIN, MARGIN), title, fill=INK, font=head)
    for x, lines in enumerate(labels):
        place = (MARGIN + beside + x * (width + GAP), MARGIN + 24)
        draw.multiline_text(place, "\n".join(lines), fill=SOFT, font=small, spacing=3)
    for y, row in enumerate(cells):
        top = MARGIN + above + y * (height + GAP)
        if y_axis is not None:
            said = "\n".join(textwrap.wrap(printable(row[0].y, 160), 20)[:6])
            draw.multiline_text((MARGIN, top + height / 2), said, fill=SOFT, font=small, anchor="lm", spacing=3)
        for x in range(columns):
            left = MARGIN + beside + x * (width + GAP)
            if (y, x) not in drawn:
                draw.rectangle((left, top, left + width - 1, top + height - 1), fill=EMPTY)
                continue
            picture = drawn[y, x].convert("RGB")
            grown = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
            out.paste(grown.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    return out


def _steps(request: Request, axis: Axis, names: AdapterNames, owner: str | None) -> list[tuple[Request, str]]:
    """The request at each value of an axis, with the value's label."""
    values = axis.values or (_all_checkpoints(request, names, owner) if axis.kind == "checkpoint" else ())
    if axis.kind not in KINDS:
        raise ConfigError(f"{printable(str(axis.kind), 30)!a} is nothing that a grid can go over; choose from "
                          f"{', '.join(KINDS)}")  # fmt: skip
    if not values:
        raise ConfigError(f"the grid has no values for {axis.kind}; give some, with commas between them")
    if len(set(values)) < len(values):
        raise ConfigError(f"the grid has a value of {axis.kind} twice; give each once")
    return [(_changed(request, axis.kind, value), _label(axis.kind, value)) for value in values]


def _changed(request: Request, kind: str, value: float | int | str) -> Request:
    if kind in ("prompt", "adapter") and not isinstance(value, str):
        raise ConfigError(f"{value!r} is no text for {kind}")
    if kind in ("weight", "guidance", "seed", "steps", "checkpoint") and isinstance(value, str):
        raise ConfigError(f"{printable(value, 30)!a} is no number for {kind}")
    if kind == "prompt":
        return replace(request, prompt=str(value))
    if kind == "seed":
        return replace(request, seed=value)  # type: ignore[arg-type]
    if kind == "steps":
        return replace(request, steps=value)  # type: ignore[arg-type]
    if kind == "guidance":
        return replace(request, guidance=value)  # type: ignore[arg-type]
    if kind == "weight":
        return _weighted(request, value)
    adapters = list(request.adapters)
    name, weight = adapters[0] if adapters else ("", 1.0)
    if kind == "adapter":
        return replace(request, adapters=[(str(value), weight), *adapters[1:]])
    if not name:
        raise ConfigError("a grid over checkpoints needs a run: choose its adapter first")
    return replace(request, adapters=[(f"{_run(name)}@{value:g}", weight), *adapters[1:]])


def _weighted(request: Request, value: object) -> Request:
    if not request.adapters:
        raise ConfigError("a grid over weights needs an adapter: choose one")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_WEIGHT:
        raise ConfigError(f"weight {value}: give numbers from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    (name, _), *rest = request.adapters
    weight: Weight = float(value)
    return replace(request, adapters=[(name, weight), *rest])


def _all_checkpoints(request: Request, names: AdapterNames, owner: str | None) -> tuple[int, ...]:
    if not request.adapters:
        raise ConfigError("a grid over checkpoints needs a run: choose its adapter first")
    run = _run(request.adapters[0][0])
    steps = list(names.checkpoints(run, owner))
    if not steps:
        raise ConfigError(f"{printable(run, 64)!a} has no checkpoints; choose the adapter of a run that still has them")
    count = min(len(steps), MOST_CHECKPOINTS)
    return tuple(steps[round(k * (len(steps) - 1) / max(1, count - 1))] for k in range(count))


def _run(name: str) -> str:
    return name.rpartition("@")[0] or name


def _label(kind: str, value: float | int | str) -> str:
    if kind == "checkpoint":
        return f"step {value:g}"
    return value if isinstance(value, str) else f"{kind} {value}" if kind == "seed" else f"{kind} {value:g}"


def _numbers(kind: str, word: str) -> list[float | int | str]:
    first, dots, rest = word.partition("..")
    whole = kind in ("seed", "checkpoint", "steps")
    low = _number(kind, first, whole)
    if not dots:
        return [low]
    last, slash, parts = rest.partition("/")
    high = _number(kind, last, whole)
    count = int(_number(kind, parts, True)) if slash else int(high - low) + 1
    if not 2 <= count <= 1000 or high <= low or (not slash and not float(high - low).is_integer()):
        raise ConfigError(f"{printable(word, 40)!a}: write first..last, or first..last/how many, such as 0..1/5")
    values = [low + (high - low) * k / (count - 1) for k in range(count)]
    return [round(value) if whole else round(value, 6) for value in values]


def _number(kind: str, text: str, whole: bool) -> float | int:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or abs(value) > MAX_SEED:
        raise ConfigError(f"{printable(text, 30)!a} is no {'whole ' if whole else ''}number for {kind}")
    return value
