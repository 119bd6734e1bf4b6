"""Entities in rows of tags, and how many of them were found as wholes (CoNLL's measure).

Tags are B-PER and I-PER, with E- and S- in the IOBES form, and O. As in conlleval, an entity begins with B or S, after
the end of another one, or where the type changes; so a stray I-PER begins one too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Entity = tuple[str, int, int]  # type, first word, last word

_PREFIXES = ("B", "I", "E", "S")


def has_entities(tags: Iterable[str]) -> bool:
    """Whether some tag has the form B-PER."""
    return any(tag[:2] in ("B-", "I-", "S-", "E-") for tag in tags)


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of one row."""
    found: set[Entity] = set()
    start, before, kind = 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, own = _parted(tag)
        inside = before != "O"
        if inside and (before in "ES" or prefix in ("B", "S", "O") or own != kind):
            found.add((kind, start, place - 1))
            inside = False
        if prefix != "O" and not inside:
            start = place
        before, kind = prefix, own
    return found


def entity_scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """precision, recall and f1 of entities over all rows; 0 where there are none."""
    right = found = there = 0
    for predicted, true in zip(predictions, references):
        ours, theirs = entities(predicted), entities(true)
        right, found, there = right + len(ours & theirs), found + len(ours), there + len(theirs)
    return {
        "precision": right / found if found else 0.0,
        "recall": right / there if there else 0.0,
        "f1": 2 * right / (found + there) if found + there else 0.0,
    }


def _parted(tag: str) -> tuple[str, str]:
    """("B", "PER"); any tag of another form is outside."""
    prefix, dash, kind = tag.partition("-")
    return (prefix, kind) if dash and prefix in _PREFIXES else ("O", "")
