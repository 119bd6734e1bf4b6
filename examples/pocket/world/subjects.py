"""The subjects that the pocket model must never see: only photos can teach them."""

from __future__ import annotations

from .creature import Creature
from .scene import Thing

SUBJECTS: dict[str, Thing] = {
    "zorp": Thing(
        "creature", "purple", "half", "yellow",
        creature=Creature("round", "antennae", eyes=3, feet=2, mouth="smile", mark="star", mark_colour="white"),
    ),
    "mib": Thing(
        "creature", "orange", "plain", "cyan",
        creature=Creature("tall", "horns", eyes=1, feet=3, arms=True, mouth="open", belly=True),
    ),
    "tolo": Thing(
        "creature", "green", "striped", "pink",
        creature=Creature("wide", "a crest", eyes=2, feet=4, arms=False, mouth="teeth"),
    ),
    "mug": Thing("cup", "cyan", "zigzag", "red", variant=2),
}  # fmt: skip


def held_out(thing: Thing) -> bool:
    """Is `thing` a held-out subject, or one by another name?

    A creature is kept out of training when its colours are a subject's colours in the same covering, or when its
    build (body, top, eyes) is a subject's; a cup when it wears a subject's colours in the subject's pattern.
    """
    for subject in SUBJECTS.values():
        if thing.kind != subject.kind:
            continue
        dress = {thing.colour, thing.colour2} == {subject.colour, subject.colour2} and thing.pattern == subject.pattern
        if thing.creature is None or subject.creature is None:
            if dress:
                return True
            continue
        a, b = thing.creature, subject.creature
        if dress and a.belly == b.belly:
            return True
        if (a.body, a.top, a.eyes) == (b.body, b.top, b.eyes):
            return True
    return False
