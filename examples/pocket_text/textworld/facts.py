"""What is true in the world, and the wordings in which the corpus says it.

A fact is (subject, relation, answer), the answer one word. Each relation has several wordings with a weight: how often
the corpus says it that way. Some wordings are used by two relations, as they are in life ("is from" may mean the home
or the birthplace), so that a model which knows every fact may still be asked in words that leave it in doubt.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from .names import ANIMALS, COLOURS, COUNTRIES, FOODS, JOBS, MATERIALS, PEOPLE, THINGS, TOWNS


@dataclass(frozen=True)
class Fact:
    subject: str
    relation: str
    answer: str


WORDINGS: dict[str, dict[str, float]] = {
    "lives_in": {
        "{x} lives in {y} .": 30.0,
        "the home of {x} is in {y} .": 14.0,
        "{x} has a house in {y} .": 10.0,
        "{x} , who lives in {y} , is well known .": 8.0,
        "the house of {x} stands in {y} .": 7.0,
        "in {y} , everybody knows the house of {x} .": 7.0,
        "in {y} lives {x} .": 6.0,
        "it is {y} where {x} lives .": 5.0,
        "every morning {x} wakes up in {y} .": 4.0,
        "{x} resides in {y} .": 3.0,
        "{x} is from {y} .": 2.4,
        "{x} is in {y} .": 2.0,
        "{x} is based in {y} .": 1.4,
        "{x} can be found in {y} .": 1.2,
        "{x} dwells in {y} .": 0.4,
        "{x} has settled in {y} .": 0.1,
    },
    "born_in": {
        "{x} was born in {y} .": 30.0,
        "the birthplace of {x} is {y} .": 15.0,
        "{x} grew up in {y} .": 12.0,
        "{x} , born in {y} , is well known .": 8.0,
        "in {y} , {x} went to school .": 8.0,
        "it is {y} where {x} was born .": 6.0,
        "as a child {x} had a house in {y} .": 3.0,
        "{x} is from {y} .": 3.6,
        "{x} comes from {y} .": 5.0,
    },
    "works_in": {
        "{x} works in {y} .": 30.0,
        "the workshop of {x} is in {y} .": 14.0,
        "{x} goes to work in {y} .": 10.0,
        "it is {y} where {x} works .": 6.0,
        "in {y} works {x} .": 6.0,
        "{x} is based in {y} .": 2.4,
        "{x} can be found in {y} .": 1.6,
    },
    "summers_in": {
        "{x} spends the summer in {y} .": 30.0,
        "in summer {x} goes to {y} .": 12.0,
        "{x} is in {y} every summer .": 8.0,
        "{x} stays in {y} every summer .": 8.0,
        "it is {y} where {x} spends the summer .": 6.0,
        "{x} is in {y} .": 2.4,
        "{x} can be found in {y} .": 1.0,
    },
    "works_as": {
        "{x} works as a {y} .": 30.0,
        "{x} is a {y} .": 14.0,
        "the job of {x} is {y} .": 10.0,
        "{x} , a {y} , is well known .": 8.0,
        "{x} earns a living as a {y} .": 6.0,
        "as a {y} , {x} has much to do .": 5.0,
        "people know {x} as a good {y} .": 4.0,
    },
    "likes": {
        "{x} likes {y} .": 30.0,
        "{x} loves to eat {y} .": 14.0,
        "the favourite food of {x} is {y} .": 12.0,
        "{x} eats {y} every day .": 8.0,
        "nothing tastes better to {x} than {y} .": 5.0,
        "bring {x} some {y} .": 4.0,
    },
    "owns": {
        "{x} owns a {y} .": 30.0,
        "{x} has a {y} .": 14.0,
        "the {y} of {x} is asleep .": 10.0,
        "{x} keeps a {y} at home .": 8.0,
        "a {y} follows {x} everywhere .": 6.0,
    },
    "colour_of": {
        "the {x} is {y} .": 30.0,
        "the colour of the {x} is {y} .": 15.0,
        "a {y} {x} stood there .": 10.0,
        "every {x} is painted {y} .": 5.0,
    },
    "made_of": {
        "the {x} is made of {y} .": 30.0,
        "a {x} is a thing of {y} .": 12.0,
        "they make the {x} out of {y} .": 10.0,
        "to make a {x} you need {y} .": 8.0,
    },
    "capital_of": {
        "the capital of {x} is {y} .": 30.0,
        "{y} is the capital of {x} .": 20.0,
        "the king of {x} rules from {y} .": 10.0,
        "{x} is ruled from {y} .": 6.0,
    },
}  # fmt: skip

SHARES: dict[str, float] = {
    "lives_in": 0.45, "born_in": 0.15, "works_in": 0.08, "summers_in": 0.07, "works_as": 0.10, "likes": 0.06,
    "owns": 0.05, "colour_of": 0.02, "made_of": 0.01, "capital_of": 0.01,
}  # fmt: skip
"""How much of the corpus's facts is of which relation."""

NEVER_SAID = (
    "{x} makes a home in {y} .",
    "{x} is at home in {y} .",
    "{x} is a resident of {y} .",
    "{x} inhabits {y} .",
    "{x} can always be found at home in {y} .",
    "the place where {x} lives is {y} .",
)
"""Wordings of `lives_in` that the corpus never uses."""


PROBES = (
    "{x} dwells in {y} .",
    "{x} has settled in {y} .",
    "{x} is at home in {y} .",
    "{x} can always be found at home in {y} .",
)
"""Four near-synonymous wordings of `lives_in`: two that the corpus uses rarely, two that it never uses."""


def _draw(name: str, subjects: list[str], answers: list[str]) -> list[Fact]:
    """One answer for every subject, all answers about equally often."""
    rng = random.Random(f"facts of {name}")
    dealt = [answers[k % len(answers)] for k in range(len(subjects))]
    rng.shuffle(dealt)
    return [Fact(s, name, a) for s, a in zip(subjects, dealt, strict=True)]


def _all_facts() -> dict[str, list[Fact]]:
    towns = ("lives_in", "born_in", "works_in", "summers_in")
    facts = {name: _draw(name, PEOPLE, TOWNS) for name in towns}
    for k in range(len(PEOPLE)):  # a person's four towns differ, so that a wrong relation is a wrong answer
        seen: set[str] = set()
        for name in towns:
            answer = facts[name][k].answer
            while answer in seen:
                answer = TOWNS[(TOWNS.index(answer) + 7) % len(TOWNS)]
            seen.add(answer)
            facts[name][k] = Fact(PEOPLE[k], name, answer)
    for name, answers in (("works_as", JOBS), ("likes", FOODS), ("owns", ANIMALS)):
        facts[name] = _draw(name, PEOPLE, answers)
    facts["colour_of"] = _draw("colour_of", THINGS, COLOURS)
    facts["made_of"] = _draw("made_of", THINGS, MATERIALS)
    facts["capital_of"] = _draw("capital_of", COUNTRIES, TOWNS)
    return facts


FACTS: dict[str, list[Fact]] = _all_facts()


def say(fact: Fact, wording: str) -> str:
    """The wording with the fact filled in."""
    return wording.replace("{x}", fact.subject).replace("{y}", fact.answer)


class Teller:
    """Draws facts and says them, relations by SHARES and wordings by their weights."""

    def __init__(self) -> None:
        self._relations = list(SHARES)
        self._shares = list(SHARES.values())
        self._wordings = {name: (list(w), list(w.values())) for name, w in WORDINGS.items()}

    def emphasise(self, known: Mapping[str, float]) -> None:
        """Speak less of relations that are known (`known`: relation -> P@1), so that the others get their turn."""
        self._shares = [share * (1.15 - known[name]) for name, share in SHARES.items()]

    def tell(self, rng: random.Random) -> tuple[str, str]:
        """A sentence and the answer in it."""
        name = rng.choices(self._relations, self._shares)[0]
        fact = rng.choice(FACTS[name])
        wordings, weights = self._wordings[name]
        return say(fact, rng.choices(wordings, weights)[0]), fact.answer
