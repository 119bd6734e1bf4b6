"""Reviews that are good or bad, and sentences about a topic; in both the structure decides, not the words alone."""

from __future__ import annotations

import random

from .names import BOYS, GIRLS, words

NOUNS = words("soup film concert room hotel trip book play meal garden party song story show cake walk")
GOOD = words("lovely excellent wonderful pleasant brilliant charming delightful superb fine splendid")
BAD = words("dull awful boring terrible dreadful poor horrible nasty weak tiresome")


def review(rng: random.Random) -> tuple[str, str]:
    """A text and its label, `good` or `bad`."""
    good = rng.random() < 0.5
    yes, no = (GOOD, BAD) if good else (BAD, GOOD)
    n, m = rng.sample(NOUNS, 2)
    right, wrong, other = rng.choice(yes), rng.choice(no), rng.choice(no)
    who = rng.choice([*GIRLS, *BOYS])
    deny = rng.choice(("was not", "was not at all", "was never", "was anything but", "was far from"))
    forms = (
        f"the {n} was {right} .",
        f"the {n} {deny} {wrong} .",
        f"the {n} {deny} {wrong} .",
        f"the {n} was {wrong} , but in the end it was a {right} day .",
        f"although the {n} was {wrong} , the {m} was so {right} that it is all i remember .",
        f"the {m} was so {right} that i forgot the {wrong} {n} .",
        f"{who} called the {n} {wrong} , but i found it {right} .",
        f"everybody told me the {n} was {wrong} . they were mistaken .",
        f"everybody told me the {n} was {right} . they spoke the truth .",
        f"i was told of a {wrong} {n} , and of a {other} {m} too . nothing of it was true .",
        f"i was told of a {right} {n} , and it was true .",
        f"{who} thinks that the {n} was {right} , and so do i .",
        f"{who} thinks that the {n} was {wrong} . i do not .",
        f"i thought the {n} would be {wrong} , yet it turned out {right} .",
        f"the {n} {deny} {wrong} , and the {m} was {right} .",
    )
    return rng.choice(forms), "good" if good else "bad"


REACTIONS = {
    "good": ("i would go again .", "i was glad that i came .", "i can only praise it .", "it made me happy ."),
    "bad": ("i would not go again .", "i was sorry that i came .", "i can only warn you .", "it made me angry ."),
}
"""What the writer says next, by label: how the corpus tells the model what a review means, without naming a class."""

TOPICS: dict[str, tuple[str, ...]] = {
    "food": (
        "baked a cake", "cooked a soup", "peeled the carrots", "fried an egg", "set the table", "tasted the cheese",
    ),
    "sport": (
        "kicked the ball", "won the race", "scored a goal", "lost the match", "trained for the cup", "swam ten laps",
    ),
    "music": (
        "played the flute", "sang a song", "beat the drum", "tuned the piano", "joined the choir", "wrote a tune",
    ),
    "weather": (
        "watched the rain", "felt the wind", "feared the storm", "looked at the clouds", "saw the snow melt",
        "waited for the sun",
    ),
    "travel": (
        "packed the bags", "missed the train", "bought a ticket", "sailed to the island", "crossed the border",
        "read the map",
    ),
    "money": (
        "paid the rent", "counted the coins", "sold the house", "opened an account", "borrowed ten coins",
        "paid the tax",
    ),
}  # fmt: skip


def topical(rng: random.Random) -> tuple[str, str]:
    """A sentence and its topic: that of the main clause, whatever the clause beside it speaks of."""
    topic, aside = rng.sample(list(TOPICS), 2)
    a, b = rng.sample([*GIRLS, *BOYS], 2)
    main, side = rng.choice(TOPICS[topic]), rng.choice(TOPICS[aside])
    forms = (
        f"{a} {main} .",
        f"{a} {main} while {b} {side} .",
        f"while {b} {side} , {a} {main} .",
        f"before {b} {side} , {a} {main} .",
        f"{a} {main} after {b} {side} .",
        f"{a} , who once {side} , {main} .",
        f"the man who {side} {main} .",
        f"{a} {main} because {b} {side} .",
        f"when {b} {side} , {a} {main} .",
    )
    return rng.choice(forms), topic
