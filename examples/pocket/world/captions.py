"""The grammar: what is said about a scene. Much is left unsaid on purpose, so that a class keeps its variation."""

from __future__ import annotations

import numpy as np

from . import palette, places
from .creature import Creature
from .scene import Scene, Thing

PREFIXES = ("a photo of", "a picture of", "")
_EYES = {1: "one eye", 2: "two eyes", 3: "three eyes"}
_NICE_TOPS = {"nothing": ""}


def _a(words: str) -> str:
    return ("an " if words[:1] in "aeiou" else "a ") + words


def _creature_extras(c: Creature, thing: Thing, rng: np.random.Generator, keep: float) -> list[str]:
    said = []
    if rng.random() < keep:
        said.append(_EYES[c.eyes])
    if c.top != "nothing" and rng.random() < keep:
        said.append(c.top)
    if c.belly and rng.random() < max(keep, 0.6):
        said.append(_a(f"{thing.colour2} belly"))
    if c.mark != "none" and rng.random() < max(keep, 0.6):
        said.append(_a(f"{c.mark_colour} {c.mark}"))
    return said


def describe(thing: Thing, rng: np.random.Generator, *, keep: float = 0.4, colour: bool = True) -> str:
    """ "a small striped red and blue creature with three eyes and horns": the noun phrase of one thing."""
    words = []
    if thing.size and rng.random() < 0.85:
        words.append(thing.size)
    if thing.creature is not None and rng.random() < keep:
        words.append(thing.creature.body)
    if thing.pattern != "plain" and rng.random() < 0.85:
        words.append(thing.pattern)
        if colour:
            words.append(f"{thing.colour} and {thing.colour2}")
    elif colour:
        words.append(thing.colour)
    phrase = _a(" ".join([*words, thing.kind]))
    if thing.creature is not None:
        extras = _creature_extras(thing.creature, thing, rng, keep)
        if extras:
            phrase += " with " + (
                " and ".join(extras[-2:]) if len(extras) < 3 else ", ".join(extras[:-1]) + " and " + extras[-1]
            )
    return phrase


def background(place: str) -> str:
    return places.PLACES[place][0] if place in places.PLACES else f"on {_a(place)} background"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence for `scene`. Colours and background are said most of the time, the rest now and then."""
    parts = [PREFIXES[int(rng.choice(3, p=[0.6, 0.2, 0.2]))]]
    if len(scene.things) == 2:
        first, second = scene.things
        joint = " and " if rng.random() < 0.6 else " next to "
        parts.append(
            describe(first, rng, keep=0.12, colour=rng.random() < 0.9).replace("small ", "")
            + joint
            + describe(second, rng, keep=0.12, colour=rng.random() < 0.9).replace("small ", "")
        )
    else:
        thing = scene.things[0]
        parts.append(describe(thing, rng, keep=float(rng.choice((0.0, 0.35, 0.8))), colour=rng.random() < 0.88))
        if thing.side and rng.random() < 0.85:
            parts.append(thing.side)
    if rng.random() < 0.92:
        parts.append(background(scene.place))
    return " ".join(p for p in parts if p).replace("a small ", "a small ").strip()


def vocabulary() -> list[str]:
    """Every word that the grammar can say, for the tokenizer."""
    words: set[str] = set()
    for text in (*PREFIXES, *(p for p, _ in places.PLACES.values()), *palette.NAMES):
        words.update(text.split())
    return sorted(words)
