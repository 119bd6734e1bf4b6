"""Pairs of a premise and a hypothesis: does the second follow from the first, yes or no?"""

from __future__ import annotations

import random

from .names import BOYS, COLOURS, GIRLS, OBJECTS, SPOTS

OPPOSITES = (
    ("taller", "shorter"), ("older", "younger"), ("faster", "slower"), ("stronger", "weaker"), ("richer", "poorer"),
)  # fmt: skip


def pair(rng: random.Random) -> tuple[str, str, str]:
    """(premise, hypothesis, label), the label `yes` or `no`."""
    a, b, c = rng.sample([*GIRLS, *BOYS], 3)
    yes = rng.random() < 0.5
    thing, spot, other_spot = rng.choice(OBJECTS), *rng.sample(SPOTS, 2)
    colour, other = rng.sample(COLOURS, 2)
    kind = rng.randrange(8)
    if kind == 0:  # a comparison and its converse
        more, less = rng.choice(OPPOSITES)
        if rng.random() < 0.5:
            more, less = less, more
        hypothesis = rng.choice(
            (f"{b} is {less} than {a} .", f"{a} is {more} than {b} .")
            if yes
            else (f"{a} is {less} than {b} .", f"{b} is {more} than {a} .")
        )
        return f"{a} is {more} than {b} .", hypothesis, _label(yes)
    if kind == 1:  # who has the thing now
        giver, taker = (a, b) if rng.random() < 0.5 else (b, a)
        premise = rng.choice((f"{giver} gave the {thing} to {taker} .", f"{taker} got the {thing} from {giver} .",
                              f"{giver} sold {taker} the {thing} ."))  # fmt: skip
        return premise, f"{taker if yes else giver} has the {thing} now .", _label(yes)
    if kind == 2:  # where somebody is after a walk
        premise = rng.choice((f"{a} left the {spot} and went to the {other_spot} .",
                              f"{a} went from the {spot} to the {other_spot} .",
                              f"{a} came to the {other_spot} from the {spot} ."))  # fmt: skip
        return premise, f"{a} is at the {other_spot if yes else spot} .", _label(yes)
    if kind == 3:  # all, none
        every = rng.random() < 0.5
        premise = f"all the {thing}s of {a} are {colour} ." if every else f"none of the {thing}s of {a} is {colour} ."
        claim = f"{a} has a {colour} {thing} ." if every == yes else f"no {thing} of {a} is {colour} ."
        return premise, claim, _label(yes)
    if kind == 4:  # which of two is of which colour
        premise = f"{a} has a {colour} {thing} and {b} has a {other} {thing} ."
        return premise, f"the {thing} of {a if yes else b} is {colour} .", _label(yes)
    if kind == 5:  # a chain of two comparisons
        more, _ = rng.choice(OPPOSITES)
        first, last = (a, c) if yes else (c, a)
        return f"{a} is {more} than {b} , and {b} is {more} than {c} .", f"{first} is {more} than {last} .", _label(yes)
    if kind == 6:  # what was denied
        premise = f"{a} did not go to the {spot} , but {b} did ."
        return premise, f"{b if yes else a} went to the {spot} .", _label(yes)
    premise = f"{a} and {b} went to the {spot} without {c} ."
    return premise, f"{rng.choice((a, b)) if yes else c} was at the {spot} .", _label(yes)


def _label(yes: bool) -> str:
    return "yes" if yes else "no"
