"""From tensor names to checked pairs of factors: what every low-rank dialect has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..adapter import LowRank
from ..config import MAX_RANK
from .source import Source


@dataclass(frozen=True)
class Half:
    """Where one tensor belongs: component, module path, and whether it is A ("a") or B ("b")."""

    component: str
    path: str
    side: str


def read_pairs(
    file: Source, halves: Mapping[str, Half], scale: Callable[[str, str, int], float]
) -> dict[str, dict[str, LowRank]]:
    """{component: {path: LowRank}} from {tensor name: Half}; shapes are checked before anything is read.

    scale: (component, path, rank) -> the layer's scale.
    Raises AdapterFormatError for a half without its other half, ranks that differ or are out of range.
    """
    slots: dict[tuple[str, str], dict[str, str]] = {}
    for name, half in halves.items():
        slot = slots.setdefault((half.component, half.path), {})
        if half.side in slot:
            raise file.error(f"has {half.component}.{half.path} twice, as {slot[half.side]} and as {name}")
        slot[half.side] = name
    for (component, path), slot in slots.items():
        if len(slot) != 2:
            (only,) = slot.values()
            raise file.error(f"has {only} without its other half")
        _check_shapes(file, f"{component}.{path}", slot)
    values = file.read(list(halves))
    components: dict[str, dict[str, LowRank]] = {}
    for (component, path), slot in slots.items():
        a, b = values[slot["a"]], values[slot["b"]]
        layer = LowRank(a, b, scale(component, path, int(a.shape[0])))
        components.setdefault(component, {})[path] = layer
    return components


def _check_shapes(file: Source, where: str, slot: Mapping[str, str]) -> None:
    a, b = file.tensors[slot["a"]].shape, file.tensors[slot["b"]].shape
    fits = len(a) == len(b) >= 2 and all(size == 1 for size in b[2:]) and 0 not in (*a, *b)
    fits = fits and (a[0] == b[1] or (len(a) == 4 and a[0] % b[1] == 0))  # convolutions in groups: B is in blocks
    if not fits:
        raise file.error(f"has factors that do not fit each other at {where}: A {list(a)}, B {list(b)}")
    if a[0] > MAX_RANK:
        raise file.error(f"has rank {a[0]:,} at {where}; the limit is {MAX_RANK:,}")
