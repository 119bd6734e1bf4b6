"""What a prompt asks for, in the words of pocket's judge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# What prompts call the places; plain backgrounds are "on a red background".
_PLACES = {
    "beach": "beach", "forest": "forest", "meadow": "meadow", "snow": "snow", "desert": "desert", "night": "night",
    "under water": "sea", "sunset": "sunset", "city": "city", "in space": "space",
}  # fmt: skip
_BACKGROUND = re.compile(r"on an? (\w+) background")
_MARKS = ("star", "heart")  # kinds that may also be a creature's mark
_NEXT = re.compile(r" (?:and|next to) (?=an? )")  # "red and blue" is one thing, "… and a blue house" is another


def asked(prompt: str, heads: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """`{attribute: value}` of what the judge can look for: how many and which things, colours, size, side, place.

    Args:
        prompt: in the pocket model's manner, such as "a photo of a big red cup on the left at night".
        heads: the judge's attributes and their values.

    Returns:
        Only what the prompt says; empty where it says nothing that the judge knows.
    """
    text = " ".join(prompt.lower().split())
    found: dict[str, str] = {}
    background = _BACKGROUND.search(text)
    if background and background[1] in heads["place"]:
        found["place"] = background[1]
        text = text.replace(background[0], "")
    else:
        place = next((place for phrase, place in _PLACES.items() if re.search(rf"\b{phrase}\b", text)), None)
        if place is not None:
            found["place"] = place
    first, *rest = _NEXT.split(text)
    kind = _kind(first, heads)
    if kind is None:
        return found
    parts = _MARKS if " with " in first else ()  # "with horns and a red heart" is one thing still
    beside = [(thing, its) for thing in rest if (its := _kind(thing, heads)) is not None and its not in parts]
    found |= {"count": str(min(2, 1 + len(beside))), "kind": kind}
    found |= _looks(first, text if not beside else "", heads)
    if beside:
        thing, found["kind_b"] = beside[0]
        colours = _colours(thing, heads)
        if len(colours) == 1:
            found["colour_b"] = colours[0]
    return found


def _kind(thing: str, heads: Mapping[str, Sequence[str]]) -> str | None:
    return next((word for word in thing.split() if word in heads["kind"]), None)


def _looks(thing: str, text: str, heads: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Colour, and of a thing that is alone (`text` is the whole prompt then) also pattern, size and side."""
    found: dict[str, str] = {}
    colours = _colours(thing, heads)
    if colours:
        found["colour"] = colours[0]
    if not text:
        return found
    if len(colours) == 2:
        found["colour2"] = colours[1]
    words = thing.split()
    found |= {name: word for name in ("pattern", "size") for word in words if word in heads[name]}
    side = next((side for side in heads["side"] if side and side in text), None)
    if side is not None:
        found["side"] = side
    return found


def _colours(thing: str, heads: Mapping[str, Sequence[str]]) -> list[str]:
    """The colours in front of the thing itself: those behind "with" are of a part of it."""
    return [word for word in thing.partition(" with ")[0].split() if word in heads["colour"]][:2]
