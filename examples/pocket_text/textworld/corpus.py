"""The corpus: documents drawn from all of it, as many as are asked for, the same ones for the same seed.

What lies in the labelled data (`labelled.py`) as validation or test never appears here: the corpus is drawn from texts
of another seed, and a text that is in the data is drawn again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from .entities import tagged
from .facts import Teller
from .inference import pair
from .opinions import REACTIONS, review, topical
from .passages import passage
from .restaurants import attributes, listed, sentence
from .stories import story


@dataclass(frozen=True)
class Document:
    """A text, and the word in it that is worth being asked for ("" where none is)."""

    text: str
    answer: str = ""


SHARES: dict[str, float] = {
    "fact": 0.76, "story": 0.05, "review": 0.05, "topic": 0.03, "pair": 0.05, "tags": 0.02, "passage": 0.02,
    "restaurant": 0.02,
}  # fmt: skip
"""How many documents are of which kind."""


class Corpus:
    """Documents of one seed.

    Args:
        seed: two corpora of one seed are the same, of different seeds independent.
        held_out: texts that must not appear (validation and test rows, joined as `labelled.keys` does).
    """

    def __init__(self, seed: int | str, held_out: frozenset[str] = frozenset()) -> None:
        self.seed = seed
        self._rng = random.Random(f"corpus {seed}")
        self._held_out = held_out
        self.teller = Teller()
        self._kinds, self._weights = list(SHARES), list(SHARES.values())

    def __iter__(self) -> Iterator[Document]:
        while True:
            yield self.draw(self._rng.choices(self._kinds, self._weights)[0])

    def take(self, count: int) -> list[Document]:
        return [self.draw(kind) for kind in self._rng.choices(self._kinds, self._weights, k=count)]

    def draw(self, kind: str) -> Document:
        """One document of a kind."""
        rng = self._rng
        if kind == "fact":
            return Document(*self.teller.tell(rng))
        if kind == "story":
            return Document(story(rng))
        while True:
            key, document = getattr(self, f"_{kind}")(rng)
            if key not in self._held_out:
                return document

    def _review(self, rng: random.Random) -> tuple[str, Document]:
        text, label = review(rng)
        reaction = rng.choice(REACTIONS[label])
        return text, Document(f"{text} {reaction}")

    def _topic(self, rng: random.Random) -> tuple[str, Document]:
        text, label = topical(rng)
        return text, Document(f"{text} this is about {label} .", label) if rng.random() < 0.3 else Document(text)

    def _pair(self, rng: random.Random) -> tuple[str, Document]:
        premise, hypothesis, label = pair(rng)
        key = f"{premise} {hypothesis}"
        if label == "yes" and rng.random() < 0.5:
            return key, Document(f"{premise} so {hypothesis}")
        return key, Document(f"{premise} is it true that {hypothesis[:-2]} ? {label} .", label)

    def _tags(self, rng: random.Random) -> tuple[str, Document]:
        text = " ".join(word for word, _ in tagged(rng))
        return text, Document(text)

    def _passage(self, rng: random.Random) -> tuple[str, Document]:
        context, question, answer, _ = passage(rng)
        key = f"{context} {question}"
        return key, Document(f"{context} {question} {answer} ." if rng.random() < 0.6 else context)

    def _restaurant(self, rng: random.Random) -> tuple[str, Document]:
        found = attributes(rng)
        text = sentence(found, rng)
        told = ", ".join(f"{key} {value}" for key, value in list(found.items())[1:])
        return listed(found), Document(f"{text}" if rng.random() < 0.6 else f"{found['name']} : {told} . {text}")
