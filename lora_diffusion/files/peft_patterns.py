"""PEFT's alpha_pattern: {regular expression: value}, the first that fits a path whole or from one of its dots on.

An expression from a file can keep Python's engine busy for ever, so they are followed here, in time that grows with
their length only: names by lookup, and of the rest what real files have: `.`, `\\d`, `[…]`, `*`, `+`, `?` behind one
character, `^`, `$`, and `(…|…)` without a repeat. A dot between the words of a name stands for a dot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MAX_LENGTH = 2_000  # of all expressions that are more than names, together

_NAME = re.compile(r"\^?(?:[\w-]|\\?\.|\\[-_])+\$?")
_CHARACTER = re.compile(r"\[\^?(?:[\w.-]|\\[dw.-])+\]|\\[dw]|\\[.\-_]|[\w-]|\.")
_REPEATS = ("*", "+", "?")


class Patterns:
    """Raises ValueError, in words that go on from "alpha_pattern", for an expression that is not followed."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._names: dict[str, tuple[int, Any]] = {}
        self._whole: dict[str, tuple[int, Any]] = {}
        self._expressions: list[tuple[int, Any, _Choice]] = []
        length = 0
        for place, (pattern, value) in enumerate(values.items()):
            if _NAME.fullmatch(pattern):
                kept = self._whole if pattern.startswith("^") else self._names
                kept.setdefault(pattern.removeprefix("^").removesuffix("$").replace("\\", ""), (place, value))
                continue
            length += len(pattern)
            if length > MAX_LENGTH:
                raise ValueError(f"has more than {MAX_LENGTH:,} characters of regular expressions")
            self._expressions.append((place, value, _parsed(pattern)))

    def value_for(self, path: str, default: Any) -> Any:
        starts = [0, *(m.end() for m in re.finditer(r"\.", path))]
        found = [self._names[path[s:]] for s in starts if path[s:] in self._names]
        found += [self._whole[path]] if path in self._whole else []
        found += [(place, value) for place, value, choice in self._expressions if _fits(choice, path, starts)]
        return min(found, key=lambda pair: pair[0])[1] if found else default


_Item = tuple[Any, str]  # a character's expression, "^", "$" or a _Choice; what repeats it, or ""
_Choice = list[list[_Item]]


def _parsed(pattern: str) -> _Choice:
    choice, end = _parsed_choice(pattern, 0, 0)
    if end != len(pattern):
        raise _unfollowed(pattern)
    return choice


def _parsed_choice(pattern: str, at: int, depth: int) -> tuple[_Choice, int]:
    choice: _Choice = [[]]
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            choice.append([])
            at += 1
            continue
        item: Any
        if pattern[at] in "^$":
            item, at = pattern[at], at + 1
        elif pattern[at] == "(" and depth < 10:
            item, at = _parsed_choice(pattern, at + (3 if pattern.startswith("(?:", at) else 1), depth + 1)
            if at >= len(pattern):
                raise _unfollowed(pattern)
            at += 1
        elif (character := _CHARACTER.match(pattern, at)) is not None:
            item, at = character[0], character.end()
            _compiled(item, pattern)
        else:
            raise _unfollowed(pattern)
        repeat = pattern[at] if at < len(pattern) and pattern[at] in _REPEATS else ""
        if repeat and (isinstance(item, list) or item in ("^", "$")):
            raise _unfollowed(pattern)
        at += len(repeat)
        if repeat and at < len(pattern) and pattern[at] == "?":  # lazy: the same paths fit
            at += 1
        choice[-1].append((item, repeat))
    return choice, at


def _compiled(character: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(character)
    except re.error:
        raise _unfollowed(pattern) from None


def _unfollowed(pattern: str) -> ValueError:
    return ValueError(f"has a regular expression that is not followed: {pattern[:80]!a}")


def _fits(choice: _Choice, path: str, starts: list[int]) -> bool:
    """Sets of positions in the path are the bits of a number; every item moves them all at once."""
    fitting: dict[str, int] = {}
    ends = _moved(choice, sum(1 << start for start in starts), path, fitting)
    return bool(ends >> len(path))


def _moved(choice: _Choice, before: int, path: str, fitting: dict[str, int]) -> int:
    after = 0
    for items in choice:
        at = before
        for item, repeat in items:
            if isinstance(item, list):
                at = _moved(item, at, path, fitting)
            elif item == "^":
                at &= 1
            elif item == "$":
                at &= 1 << len(path)
            else:
                if item not in fitting:
                    one = re.compile(item)
                    fitting[item] = sum(1 << place for place, char in enumerate(path) if one.fullmatch(char))
                at = _stepped(at, fitting[item], repeat)
        after |= at
    return after


def _stepped(at: int, fitting: int, repeat: str) -> int:
    moved = (at & fitting) << 1
    if repeat == "":
        return moved
    if repeat == "?":
        return at | moved
    reached = moved
    while moved:
        moved = ((moved & fitting) << 1) & ~reached
        reached |= moved
    return reached | (at if repeat == "*" else 0)
