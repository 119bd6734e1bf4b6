"""What came of loading an adapter (which layers, at what rank and strength, what was left out) and of saving one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .text import printable


@dataclass
class ComponentReport:
    """matched: module paths in the model; unmatched: {path in the adapter: why}; ranks, alphas, scales: {value: layers}
    of those that match. A layer's update is scale · B·A; alpha is scale · rank."""

    matched: list[str] = field(default_factory=list)
    unmatched: dict[str, str] = field(default_factory=dict)
    ranks: Counter[int] = field(default_factory=Counter)
    alphas: Counter[float] = field(default_factory=Counter)
    scales: Counter[float] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return len(self.matched) + len(self.unmatched)


@dataclass
class LoadReport:
    """The result of `load_adapter`; `str(report)` is for people.

    name: of the adapter in the target; path and dialect: of the file, None for an adapter that came from memory.
    metadata: what its maker put into the file (for ours: base model, prompt, steps …).
    made_for: the base's name as the file gives it. base: {component: whether that is the base in hand: "same",
        "other weights", "other architecture" or "unknown"}, by fingerprint (see `fingerprint.py`).
    methods: {component: kinds of methods other than low rank}.
    tokens: words that it brought; refused_tokens: {word: why not}. trigger_words: what to put into a prompt.
    intact: whether the tensors are those of the hash in the file; None where there is no hash.
    """

    name: str
    path: str | None
    dialect: str | None
    components: dict[str, ComponentReport] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    made_for: str | None = None
    base: dict[str, str] = field(default_factory=dict)
    methods: dict[str, list[str]] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    refused_tokens: dict[str, str] = field(default_factory=dict)
    trigger_words: list[str] = field(default_factory=list)
    intact: bool | None = None

    @property
    def matched(self) -> int:
        return sum(len(part.matched) for part in self.components.values())

    @property
    def unmatched(self) -> int:
        return sum(len(part.unmatched) for part in self.components.values())

    @property
    def complete(self) -> bool:
        return self.unmatched == 0 and not self.refused_tokens

    def __str__(self) -> str:
        origin = f" from {self.path}" if self.path else ""
        dialect = f" ({self.dialect})" if self.dialect else ""
        lines = [f"adapter {self.name!r}{origin}{dialect}: {self.matched} of {self.matched + self.unmatched} layers"]
        for component, part in self.components.items():
            strength = ""
            if part.matched:
                strength = f", rank {_values(part.ranks)}, alpha {_values(part.alphas)}, scale {_values(part.scales)}"
            lines.append(f"  {component}: {len(part.matched)} of {part.total} layers{strength}")
            for reason, count in Counter(part.unmatched.values()).most_common(3):
                first = next(path for path, why in part.unmatched.items() if why == reason)
                lines.append(f"    left out {count}, such as {first}: {reason}")
        lines += [f"  {component}: {', '.join(kinds)}" for component, kinds in self.methods.items()]
        lines += [f"  word {printable(word)}" for word in self.tokens]
        lines += [f"  left out the word {printable(word)}: {reason}" for word, reason in self.refused_tokens.items()]
        lines += [f"  {line}" for line in (self._base(), self._prompt(), self._hash()) if line]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _base(self) -> str:
        """One line on the base model, empty where nothing is known of it."""
        wrong = {c: verdict for c, verdict in self.base.items() if verdict not in ("same", "unknown")}
        name = f"made for {printable(self.made_for)}" if self.made_for else ""
        if wrong:
            differs = ", ".join(f"{component} has {verdict}" for component, verdict in wrong.items())
            return f"{name or 'made for another base'}; here the {differs}"
        if "same" in self.base.values():
            return f"{name}, which is the base in hand" if name else "made for the base in hand"
        return name

    def _prompt(self) -> str:
        return f"in the prompt: {', '.join(map(printable, self.trigger_words))}" if self.trigger_words else ""

    def _hash(self) -> str:
        return {True: "hash intact", False: "the tensors are NOT those of the hash in the file", None: ""}[self.intact]


@dataclass
class SaveReport:
    """The result of `save_adapter`; `str(report)` is for people.

    layers: how many were written. without_effect: those of them, as "component.path", whose update is still zero.
    """

    path: str
    format: str
    layers: int
    without_effect: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        line = f"{self.path} ({self.format}): {self.layers} layers"
        idle = len(self.without_effect)
        if not idle:
            return line
        which = "all of them" if idle == self.layers else f"{idle} of them, such as {self.without_effect[0]},"
        return f"{line}; {which} learned nothing: their update is zero, and they do what the base does"


def _values(counts: Counter[Any]) -> str:
    """ "4", or "4 (×120) and 8 (×8)"."""
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    common = [f"{value:g} (×{count})" for value, count in counts.most_common(3)]
    return " and ".join(common) + (" …" if len(counts) > 3 else "")
