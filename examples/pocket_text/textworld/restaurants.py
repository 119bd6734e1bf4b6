"""Places to eat as lists of attributes and as sentences, after the manner of the E2E data."""

from __future__ import annotations

import random

from .names import COLOURS, TOWNS, words

SIGNS = words("lion fox duck star ship crown wheel oak swan anchor bell rose")
KITCHENS = words("italian french indian chinese english greek")
PRICES = {"cheap": ("cheap", "low priced"), "moderate": ("moderately priced",), "high": ("expensive", "high priced")}
AREAS = {"riverside": "by the river", "centre": "in the centre of town", "hill": "up on the hill"}
RATINGS = {"low": ("poorly rated",), "average": ("of average quality",), "top": ("highly rated",)}


def attributes(rng: random.Random) -> dict[str, str]:
    """A name and two to five things about it."""
    found = {"name": f"the {rng.choice(COLOURS)} {rng.choice(SIGNS)}"}
    options = {
        "food": rng.choice(KITCHENS),
        "price": rng.choice(list(PRICES)),
        "area": rng.choice(list(AREAS)),
        "rating": rng.choice(list(RATINGS)),
        "family friendly": rng.choice(("yes", "no")),
        "near": f"the {rng.choice(TOWNS)} station",
    }
    chosen = set(rng.sample(list(options), rng.randint(2, 5)))
    return found | {key: value for key, value in options.items() if key in chosen}


def listed(found: dict[str, str]) -> str:
    """`name[the golden duck], food[french]`, the E2E data's own form."""
    return ", ".join(f"{key}[{value}]" for key, value in found.items())


def sentence(found: dict[str, str], rng: random.Random) -> str:
    """One way of saying it, every attribute once."""
    opening = found["name"]
    price = rng.choice(PRICES[found["price"]]) if "price" in found else ""
    kind = rng.choice(("place", "restaurant"))
    opening += f" is {'an' if price[:1] == 'e' else 'a'} {price} {kind}" if price else f" is a {kind}"
    if "food" in found:
        opening += rng.choice((f" with {found['food']} food", f" that serves {found['food']} food"))
    if "area" in found:
        opening += f" {AREAS[found['area']]}"
    if "near" in found:
        opening += f" near {found['near']}"
    closing: list[str] = []
    if "rating" in found:
        closing.append(f"it is {rng.choice(RATINGS[found['rating']])}")
    if "family friendly" in found:
        yes = found["family friendly"] == "yes"
        closing.append(rng.choice(("children are welcome", "families like it") if yes
                                  else ("children are not welcome", "it is not for families")))  # fmt: skip
    return opening + " ." + (f" {' and '.join(closing)} ." if closing else "")
