"""How a plan of memory is printed: a bar for each phase, the parts at the peak, and whether it fits."""

from __future__ import annotations

import shutil
from typing import Any

_BAR = 34
_MARKS = {"weights": "█", "adapters": "▓", "gradients": "▓", "optimizer": "▓", "activations": "▒", "workspace": "░"}


def plan_lines(facts: dict[str, Any]) -> list[str]:
    """What `RunPlan.to_dict` holds, line by line."""
    longest = max(phase["peak"] for phase in facts["phases"].values())
    width = min(_BAR, max(10, shutil.get_terminal_size().columns - 40))
    lines = []
    for name, phase in facts["phases"].items():
        mark = " <" if name == facts["phase"] else ""
        lines.append(f"{name:<15} {gib(phase['peak'])}  {_bar(phase['parts'], longest, width)}{mark}")
    lines += ["", f"{'at the peak':<15} {gib(facts['peak'])}  ({facts['phase']})"]
    lines += [f"  {part:<13} {gib(size)}  {_MARKS.get(part, '')}" for part, size in facts["parts"].items() if size]
    aside = "CUDA context, and blocks kept by the allocator" if facts["device"] == "cuda" else "Python and libraries"
    return [*lines, f"{'needed':<15} {gib(facts['needed'])}  with {aside}"]


def card_lines(facts: dict[str, Any]) -> list[str]:
    """Whether it fits on facts["card"], and facts["change"], which would make it."""
    there = f"{facts['card']} ({gib(facts['memory']).strip()})"
    if facts["fits"]:
        return [f"it fits on {there}: {gib(facts['memory'] - facts['needed']).strip()} to spare"]
    change = facts["change"]
    lines = [f"it does not fit on {there}: {gib(facts['needed'] - facts['memory']).strip()} too much"]
    if not change["fits"]:
        return [*lines, f"nor with {' '.join(change['flags'])}, which needs {gib(change['needed']).strip()}"]
    lines.append(f"it fits with {' '.join(change['flags'])}: {gib(change['needed']).strip()} needed")
    return lines + [f"  {flags}: {why}" for flags, why in zip(change["flags"], change["why"])]


def gib(size: int) -> str:
    return f"{size / 2**30:6.2f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:6.1f} MiB"


def _bar(parts: dict[str, int], longest: int, width: int) -> str:
    bar, total, drawn = "", 0, 0
    for part, size in parts.items():
        total += size
        end = round(total / max(longest, 1) * width)
        bar += _MARKS.get(part, "░") * (end - drawn)
        drawn = end
    return bar
