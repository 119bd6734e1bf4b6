"""Short passages with questions; the answer is a span of the passage."""

from __future__ import annotations

import random

from .names import BOYS, COLOURS, FOODS, GIRLS, JOBS, OBJECTS, SPOTS, TOWNS, words

DAYS = words("monday tuesday wednesday thursday friday saturday sunday")


def passage(rng: random.Random) -> tuple[str, str, str, int]:
    """(context, question, answer, the answer's first character in the context)."""
    people = rng.sample([*GIRLS, *BOYS], 3)
    claims: list[tuple[str, str, str, str]] = []  # before the answer, the answer, after it, the question
    for who in people:
        town, job, food, day = rng.choice(TOWNS), rng.choice(JOBS), rng.choice(FOODS), rng.choice(DAYS)
        thing = f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}"
        spot = f"the {rng.choice(('old', 'new', 'small', 'big'))} {rng.choice(SPOTS)}"
        claims += rng.sample(
            [
                (f"{who} lives in ", town, " .", f"where does {who} live ?"),
                (f"{who} works as a ", job, " .", f"what is the job of {who} ?"),
                (f"{who} wants to eat ", food, " .", f"what does {who} want to eat ?"),
                (f"{who} bought a ", thing, " .", f"what did {who} buy ?"),
                (f"{who} was born on a ", day, " .", f"on which day was {who} born ?"),
                (f"{who} is waiting at ", spot, " .", f"where is {who} waiting ?"),
            ],
            2,
        )
    rng.shuffle(claims)
    asked = rng.randrange(len(claims))
    context, start = "", 0
    for k, (before, answer, after, _) in enumerate(claims):
        context += (" " if context else "") + before
        if k == asked:
            start = len(context)
        context += answer + after
    return context, claims[asked][3], claims[asked][1], start
