"""What the sections of the engine's benchmark share: the setting of a run, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Setting:
    """device: "cpu" or "cuda"; repetitions: figures taken of each contestant; quick: the smallest shapes only;
    compiled: add contestants in torch.compile."""

    device: torch.device
    repetitions: int
    quick: bool
    compiled: bool

    @property
    def batch(self) -> int:
        """Rows of a training batch: one is enough to keep a core busy, a GPU needs more."""
        return 4 if self.device.type == "cuda" else 1


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, figures to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def notes(rows: Iterable[dict]) -> str:
    """One line for each row that was not measured (key "skipped") or is wrong (key "disagrees")."""
    lines = [
        f"- {row['name']}: {word} ({row[key]})"
        for row in rows
        for key, word in (("skipped", "skipped"), ("disagrees", "NOT TIMED"))
        if key in row
    ]
    return "\n".join(dict.fromkeys(lines))


def sections(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
