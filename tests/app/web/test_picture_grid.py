"""Grids of pictures: what each place asks for, and the one PNG."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.web.picture_grid import Axis, parse_axis
from app.web.pictures import Pictures, Request, Stopped
from app.web.places import Workspace
from lora_diffusion.errors import ConfigError
from tests.app.web.drawing import LIMITS, model, pictures, request_, shelf
from train.pictures import read_settings

__all__ = ["model", "pictures", "request_", "shelf"]  # fixtures


@pytest.mark.parametrize(
    ("kind", "text", "values"),
    [
        ("weight", "0, 0.5,1", (0.0, 0.5, 1.0)),
        ("weight", "0..1/5", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("seed", "3..6", (3, 4, 5, 6)),
        ("seed", "7, 9", (7, 9)),
        ("checkpoint", "", ()),
        ("adapter", "rex, runs/zorp", ("rex", "runs/zorp")),
        ("prompt", "a dog, big\n\n a cat ", ("a dog, big", "a cat")),
        ("steps", "2,4", (2, 4)),
    ],
)
def test_axes_as_they_are_typed(kind: str, text: str, values: object) -> None:
    assert parse_axis(kind, text) == Axis(kind, values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("colour", "red", "choose from weight"),
        ("weight", "a", "no number"),
        ("weight", "nan", "no number"),
        ("seed", "1.5", "no whole number"),
        ("seed", "1..1000000000", "first..last"),
        ("weight", "1..0/3", "first..last"),
        ("weight", "0..1/100000000", "first..last"),
        ("prompt", "x" * 30_000, "too long"),
        ("seed", "9" * 5000, "no whole number"),
    ],
)
def test_axes_that_cannot_be_read(kind: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_axis(kind, text)
    assert len(str(caught.value)) < 300


def tile(path: Path, x: int, y: int, labels: int, beside: int) -> Image.Image:
    """One place of a grid of 32-pixel pictures, which stand there three times as large."""
    with Image.open(path) as image:
        left, top = 16 + beside + x * 104, 16 + labels + y * 104
        return image.convert("RGB").crop((left, top, left + 96, top + 96)).resize((32, 32), Image.Resampling.NEAREST)


def test_every_place_holds_its_own_picture(pictures: Pictures, request_: Request) -> None:
    asked = replace(request_, adapters=[("rex", 1.0)])
    path = pictures.grid(asked, parse_axis("weight", "0,0.5,1"), parse_axis("seed", "1,2"))
    labels = 24 + 17 + 8
    for y, seed in enumerate((1, 2)):
        for x, weight in enumerate((0.0, 0.5, 1.0)):
            [one] = pictures.draw(replace(request_, seed=seed, adapters=[("rex", weight)])).paths
            with Image.open(one) as image:
                drawn = list(image.convert("RGB").tobytes())
            seen = list(tile(path, x, y, labels, 150).tobytes())
            assert max(abs(a - b) for a, b in zip(drawn, seen)) <= 12
    told = read_settings(path)
    assert told["grid"]["x"] == {"kind": "weight", "values": ["weight 0", "weight 0.5", "weight 1"]}
    assert pictures.settings_of(path).seed == 7
    assert pictures.grid(asked, parse_axis("weight", "0,0.5,1"), parse_axis("seed", "1,2")) == path


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (("checkpoint", ""), ("weight", "0,1")),
        (("adapter", "rex,ink,zorp@10"), ("prompt", "a dog\na cat <lora:zorp:0.5>")),
        (("weight", "0,1"), ("adapter", "rex,ink")),
        (("steps", "1,2"), ("guidance", "1,5")),
        (("prompt", "a dog"), None),
    ],
)
def test_grids_over_everything(pictures: Pictures, request_: Request, x: Any, y: Any) -> None:
    asked = request_ if "adapter" in (x[0], (y or x)[0]) else replace(request_, prompt="a dog <lora:zorp:1>")
    told: list[tuple[int, int]] = []
    y_axis = None if y is None else parse_axis(*y)
    path = pictures.grid(asked, parse_axis(*x), y_axis, on_progress=lambda *step: told.append(step))
    assert path.name.startswith("grid_") and told[-1][0] == told[-1][1]


def test_a_stopped_grid_has_empty_places(pictures: Pictures, request_: Request) -> None:
    told: list[int] = []
    path = pictures.grid(
        request_, parse_axis("seed", "1..4"), on_progress=lambda step, _: told.append(step),
        should_stop=lambda: len(told) >= 5,
    )  # fmt: skip
    assert len(set(tile(path, 3, 0, 49, 0).tobytes())) <= 3 < len(set(tile(path, 0, 0, 49, 0).tobytes()))
    with pytest.raises(Stopped):
        pictures.grid(request_, parse_axis("seed", "1..4"), should_stop=lambda: True)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (("seed", "1..10"), None, "at most 9"),
        (("seed", "1..4"), ("steps", "1,2,3"), "4 times 3 are 12 pictures"),
        (("seed", ""), None, "no values for seed"),
        (("seed", "1,1"), None, "twice"),
        (("seed", "1,2"), ("seed", "3,4"), "both directions"),
        (("weight", "0,1"), None, "needs an adapter"),
        (("checkpoint", ""), None, "needs a run"),
        (("checkpoint", "10"), ("adapter", "rex"), "choose one of them"),
        (("adapter", "nobody"), None, "no adapter"),
        (("weight", "99"), ("adapter", "rex"), "from -10 to 10"),
        (("steps", "1000"), None, "steps 1000"),
        (("guidance", "-1"), None, "guidance"),
    ],
)
def test_grids_that_cannot_be_drawn(
    pictures: Pictures,
    request_: Request,
    x: Any,
    y: Any,
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        pictures.grid(request_, parse_axis(*x), None if y is None else parse_axis(*y))


def test_a_run_without_checkpoints_or_with_another_step(pictures: Pictures, request_: Request) -> None:
    with pytest.raises(ConfigError, match="has no checkpoints"):
        pictures.grid(replace(request_, adapters=[("rex", 1.0)]), Axis("checkpoint"))
    with pytest.raises(ConfigError, match="it has 10, 20"):
        pictures.grid(replace(request_, adapters=[("zorp", 1.0)]), Axis("checkpoint", (11,)))
    with pytest.raises(ConfigError, match="no number"):
        pictures.grid(request_, Axis("seed", ("x",)))


def test_a_large_grid_shrinks(shelf: Path, request_: Request) -> None:
    small = Pictures(Workspace(shelf), replace(LIMITS, pixels=60_000), device="cpu")
    path = small.grid(request_, parse_axis("seed", "1..3"), parse_axis("steps", "1,2"))
    with Image.open(path) as image:
        assert image.width * image.height < 150_000
