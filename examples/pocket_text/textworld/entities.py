"""Sentences whose words carry tags: persons, places and clubs, where the same word may be any of the three."""

from __future__ import annotations

import random

from .names import BOYS, GIRLS, JOBS, PEOPLE, SPOTS, TOWNS

SIDES = ("north", "south", "east", "west", "new", "old")
CLUBS = ("rovers", "singers", "bank", "college", "theatre", "press")

Tagged = list[tuple[str, str]]


def _person(rng: random.Random) -> Tagged:
    first = rng.choice([*GIRLS, *BOYS, *PEOPLE[:200]])
    if rng.random() < 0.5:
        return [(first, "B-PER")]
    return [(first, "B-PER"), (rng.choice([*TOWNS, *PEOPLE[200:400]]), "I-PER")]  # a town's name is a surname too


def _place(rng: random.Random) -> Tagged:
    town = rng.choice([*TOWNS, *PEOPLE[400:450]])  # a place may be called after a person
    return [(rng.choice(SIDES), "B-LOC"), (town, "I-LOC")] if rng.random() < 0.35 else [(town, "B-LOC")]


def _club(rng: random.Random) -> Tagged:
    town = rng.choice(TOWNS)
    if rng.random() < 0.4:
        return [("bank", "B-ORG"), ("of", "I-ORG"), (town, "I-ORG")]
    return [(town, "B-ORG"), (rng.choice(CLUBS), "I-ORG")]


FORMS = (
    "$p met $p in $l .", "the $o hired $p last year .", "$p moved from $l to $l .", "$p plays for the $o .",
    "in $l , $p wrote a letter to the $o .", "$p , a {job} from $l , joined the $o .", "the road to $l was closed .",
    "the {job} asked $p about the {spot} in $l .", "the $o moved to $l .", "$p left the $o and went to $l .",
    "$l is near $l .", "nobody in $l had heard of $p .", "a {job} of the $o bought the {spot} .",
    "the {spot} was empty .",
)  # fmt: skip


def tagged(rng: random.Random) -> Tagged:
    """Words with their tags (BIO: O, B-PER, I-PER, B-LOC, I-LOC, B-ORG, I-ORG)."""
    words: Tagged = []
    makers = {"$p": _person, "$l": _place, "$o": _club}
    for word in rng.choice(FORMS).split():
        if word in makers:
            words += makers[word](rng)
        else:
            words.append((word.replace("{job}", rng.choice(JOBS)).replace("{spot}", rng.choice(SPOTS)), "O"))
    return words
