"""A scene is what a picture shows; `sample_scene` draws one at random, `render` draws it with a brush."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from . import palette, places, things
from .creature import BODIES, MARKS, MOUTHS, TOPS, Creature, draw_creature
from .patterns import PATTERNS
from .pen import SIZE, Pen

KINDS = ("creature", *things.KINDS)
KIND_WEIGHTS = np.array([0.36, 0.14, 0.07, 0.07, 0.07, 0.07, 0.06, 0.06, 0.05, 0.05])
SIZES = {"small": 12.5, "": 17.0, "big": 21.5}  # radius in pixels
SIDES = {"on the left": 19.0, "": 32.0, "on the right": 45.0}  # centre in pixels


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str
    pattern: str = "plain"
    colour2: str = "white"
    size: str = ""
    side: str = ""
    variant: int = 0
    creature: Creature | None = None


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    place: str  # a name of places.PLACES or a colour


def _pick(rng: np.random.Generator, options, weights=None):
    return options[int(rng.choice(len(options), p=weights))]


def sample_creature(rng: np.random.Generator) -> Creature:
    mark = _pick(rng, MARKS, [0.7, 0.1, 0.1, 0.1])
    return Creature(
        body=_pick(rng, BODIES),
        top=_pick(rng, TOPS),
        eyes=int(rng.integers(1, 4)),
        feet=_pick(rng, (0, 2, 3, 4), [0.1, 0.5, 0.2, 0.2]),
        arms=bool(rng.random() < 0.4),
        mouth=_pick(rng, MOUTHS),
        belly=bool(mark == "none" and rng.random() < 0.35),
        mark=mark,
        mark_colour=_pick(rng, palette.NAMES),
    )


def sample_thing(rng: np.random.Generator, place: str, kind: str | None = None) -> Thing:
    kind = kind or _pick(rng, KINDS, KIND_WEIGHTS)
    hidden = places.PLACES[place][1] if place in places.PLACES else {place}
    colour = _pick(rng, [c for c in palette.NAMES if c not in hidden])
    second = _pick(rng, [c for c in palette.NAMES if c != colour])
    creature = sample_creature(rng) if kind == "creature" else None
    pattern = "plain"
    if rng.random() < (0.4 if kind in ("creature", "cup") else 0.25) and not (creature and creature.belly):
        pattern = _pick(rng, PATTERNS[1:])
    if creature and creature.mark != "none":
        while creature.mark_colour in (colour, second):
            creature = replace(creature, mark_colour=_pick(rng, palette.NAMES))
    return Thing(
        kind=kind,
        colour=colour,
        pattern=pattern,
        colour2=second,
        size=_pick(rng, tuple(SIZES), [0.18, 0.64, 0.18]),
        side=_pick(rng, tuple(SIDES), [0.15, 0.7, 0.15]),
        variant=int(rng.integers(things.VARIANTS[kind])) if kind in things.VARIANTS else 0,
        creature=creature,
    )


def sample_scene(
    rng: np.random.Generator, *, two: float = 0.2, forbidden: Callable[[Thing], bool] = lambda thing: False
) -> Scene:
    """A random scene of one thing, or with probability `two` of two side by side.

    `forbidden` keeps the held-out subjects out: a thing for which it is true is drawn again.
    """
    place = _pick(rng, places.NAMES) if rng.random() < 0.6 else _pick(rng, palette.NAMES)

    def fresh(kind: str | None = None) -> Thing:
        while forbidden(thing := sample_thing(rng, place, kind)):
            pass
        return thing

    if rng.random() >= two:
        return Scene((fresh(),), place)
    left, right = fresh(), fresh()
    return Scene(
        (replace(left, size="small", side="on the left"), replace(right, size="small", side="on the right")), place
    )


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw `scene` as a SIZE × SIZE RGB picture; `rng` moves things a little and places the scenery."""
    image = places.draw_place(scene.place, rng)
    couple = len(scene.things) == 2
    for thing in scene.things:
        radius = SIZES[thing.size] * rng.uniform(0.95, 1.05) * (1.12 if couple else 1.0)
        x = SIDES[thing.side]
        if couple:
            x = 17.5 if thing.side == "on the left" else 46.5
        x = float(np.clip(x + rng.uniform(-2.5, 2.5), radius * 0.85, SIZE - radius * 0.85))
        y = 35.0 + rng.uniform(-2.5, 2.5) + (17.0 - radius) * 0.35
        at = Pen(ImageDraw.Draw(image), x, y, radius)
        first = palette.jitter(palette.COLOURS[thing.colour], rng)
        second = palette.jitter(palette.COLOURS[thing.colour2], rng)
        if thing.creature is not None:
            draw_creature(image, at, thing.creature, thing.pattern, first, second)
        else:
            things.draw_thing(image, at, thing.kind, thing.variant, thing.pattern, first, second)
    return image.reduce(image.width // SIZE)
