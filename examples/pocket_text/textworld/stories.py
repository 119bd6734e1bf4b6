"""Stories of a few sentences about people with ordinary names; what happens first decides what can happen next."""

from __future__ import annotations

import random

from .names import BOYS, COLOURS, FOODS, GIRLS, OBJECTS, SPOTS

GLAD = ("happy", "glad", "pleased", "cheerful")
SAD = ("sad", "angry", "tired", "worried")


def two_people(rng: random.Random) -> tuple[str, str, str, str]:
    """Two names and the pronoun of each ("she", "he")."""
    a, b = rng.sample([*GIRLS, *BOYS], 2)
    return a, b, ("she" if a in GIRLS else "he"), ("she" if b in GIRLS else "he")


def lost_and_found(rng: random.Random) -> list[str]:
    a, b, pa, pb = two_people(rng)
    thing, colour, spot = rng.choice(OBJECTS), rng.choice(COLOURS), rng.choice(SPOTS)
    start = [
        f"{a} had a {colour} {thing} .",
        f"one day {pa} lost the {thing} near the {spot} .",
        f"{a} was {rng.choice(SAD)} .",
    ]
    if rng.random() < 0.6:
        return [
            *start,
            f"{b} went to the {spot} and found the {colour} {thing} .",
            f"{pb} gave it back to {a} .",
            f"now {a} is {rng.choice(GLAD)} again .",
        ]
    return [
        *start,
        f"{b} went to the {spot} but did not find the {thing} .",
        f"{a} is still {rng.choice(SAD)} , and {pa} has no {thing} .",
    ]


def shopping(rng: random.Random) -> list[str]:
    a, b, pa, pb = two_people(rng)
    food, coins = rng.choice(FOODS), rng.choice(("one", "two", "three", "four", "five"))
    start = [f"{a} went to the market to buy {food} .", f"the {food} cost {coins} coins ."]
    if rng.random() < 0.5:
        return [
            *start,
            f"{a} had enough money , so {pa} bought the {food} .",
            f"at home {pa} cooked for {b} .",
            f"{b} said that the {food} tasted good .",
        ]
    return [
        *start,
        f"{a} did not have enough money , so {pa} went home without {food} .",
        f"{b} was hungry , but {pb} did not complain .",
    ]


def weather(rng: random.Random) -> list[str]:
    a, b, pa, _ = two_people(rng)
    spot = rng.choice(("park", "beach", "forest", "garden", "bridge"))
    if rng.random() < 0.5:
        return [
            f"it rained all day , and {a} stayed at home .",
            f"{pa} read a book and drank hot tea .",
            f"{b} came by with a wet coat .",
            "they sat by the fire and talked .",
        ]
    return [
        f"the sun was shining , so {a} and {b} walked to the {spot} .",
        "they played with a ball until the evening .",
        f"then {a} was tired , and they went home .",
    ]


def gift(rng: random.Random) -> list[str]:
    a, b, pa, pb = two_people(rng)
    thing, colour = rng.choice(OBJECTS), rng.choice(COLOURS)
    other = rng.choice([o for o in OBJECTS if o != thing])
    wanted = rng.random() < 0.6
    return [
        f"it was the birthday of {b} .",
        f"{pb} wanted a {colour} {thing} .",
        f"{a} gave {b} a box .",
        f"in the box was a {colour} {thing} ." if wanted else f"in the box was a {other} .",
        f"{b} was {rng.choice(GLAD if wanted else SAD)} and thanked {a} ."
        if wanted
        else f"{b} was {rng.choice(SAD)} , but {pb} thanked {a} .",
        f"{a} knows what {b} wants ." if wanted else f"{pa} did not know what {b} wanted .",
    ]


def race(rng: random.Random) -> list[str]:
    a, b, pa, pb = two_people(rng)
    spot = rng.choice(SPOTS)
    win, lose, pw, pl = (a, b, pa, pb) if rng.random() < 0.5 else (b, a, pb, pa)
    return [
        f"{a} and {b} ran to the {spot} .",
        f"{win} was faster than {lose} , so {pw} won the race .",
        f"{lose} came second , but {pl} was not {rng.choice(SAD)} .",
        f"everybody shook hands with {win} .",
    ]


def lesson(rng: random.Random) -> list[str]:
    a, b, pa, pb = two_people(rng)
    skill = rng.choice(("swim", "sing", "cook", "dance", "paint", "read", "sail", "ride"))
    return [
        f"{a} could not {skill} .",
        f"{b} could {skill} very well , so {pa} asked {b} for help .",
        f"every day {pb} showed {a} how to {skill} .",
        f"after a week {a} could {skill} too .",
    ]


STORIES = (lost_and_found, shopping, weather, gift, race, lesson)


def story(rng: random.Random) -> str:
    """One story, its sentences in a row."""
    return " ".join(rng.choice(STORIES)(rng))
