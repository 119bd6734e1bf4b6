"""Who and what there is: invented people, towns, countries and things, and the ordinary words that stories use."""

from __future__ import annotations

import random
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """The words of a text, one entry each."""
    return text.split()


PEOPLE_COUNT, THINGS_COUNT, COUNTRIES_COUNT = 640, 120, 30

TOWNS = words(
    "harbo lindal mersk ostry velden tarnow quimper durness kelso bregan ulmas fenwick sorrel amsel galway "
    "norvik pelham ristan zelary wexton corvo imber jurna lorne nantor oberon palden rushton senlis thorpe"
)
JOBS = words(
    "baker teacher doctor farmer painter sailor tailor miller smith judge nurse cook singer gardener carpenter "
    "writer hunter fisher guard clerk mason dancer barber weaver"
)
FOODS = words(
    "bread soup cheese honey apples rice fish plums beans cake salad butter nuts eggs pears mushrooms pancakes "
    "noodles grapes cabbage carrots berries onions melons"
)
ANIMALS = words(
    "dog cat horse goat hen duck parrot rabbit turtle pony sheep donkey goose mouse crow hedgehog fox deer frog snail"
)
COLOURS = words("red blue green yellow black white brown grey purple golden pink silver")
MATERIALS = words("wood iron glass stone paper leather clay wool copper silk wax ivory")

GIRLS = words("anna clara emma greta helen ida julia karin laura maria nina olga petra rosa sara tina ursula vera")
BOYS = words(
    "adam ben carl david emil felix georg hugo ivan jacob karl leo max noah oscar paul robert simon tom victor"
)

SPOTS = words("market harbour park school library station bridge garden kitchen church museum beach forest shop mill")
OBJECTS = words("lamp coat book kite drum bell clock basket chair knife cup box hat map key flute boat bag ball coin")

_ONSETS = words("b d f g h j k l m n p r s t v z br dr gr kr tr st fl")
_VOWELS = words("a e i o u")
_MIDDLES = words("b d g k l m n r s t v ll nd rt lm rn ss")
_ENDINGS = words("o a i e en or an us in ek il")


def _invent(rng: random.Random, count: int, endings: Sequence[str], taken: set[str]) -> list[str]:
    """`count` new words of two or three syllables, none of them in `taken`; they are added to it."""
    found: list[str] = []
    while len(found) < count:
        word = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_MIDDLES)
        if rng.random() < 0.5:
            word += rng.choice(_VOWELS) + rng.choice(_MIDDLES)
        word += rng.choice(endings)
        if word not in taken and 5 <= len(word) <= 8:
            taken.add(word)
            found.append(word)
    return found


def _everyone() -> tuple[list[str], list[str], list[str]]:
    rng = random.Random("the people of pocket")
    taken = {*TOWNS, *JOBS, *FOODS, *ANIMALS, *COLOURS, *MATERIALS, *GIRLS, *BOYS, *SPOTS, *OBJECTS}
    people = _invent(rng, PEOPLE_COUNT, _ENDINGS, taken)
    return people, _invent(rng, THINGS_COUNT, ("ock", "uff"), taken), _invent(rng, COUNTRIES_COUNT, ("ania",), taken)


PEOPLE, THINGS, COUNTRIES = _everyone()
