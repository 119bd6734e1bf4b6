"""The labels of a classification, by name: learned from the rows to train on, looked up in all others."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable

MAX_LABELS = 10_000
MOST_NAMED = 8  # in a message


class Labels:
    """names in a fixed order: whole numbers by size, other labels by alphabet.

    Raises ConfigError for fewer than two labels, too many, or one given twice.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if len(set(names)) != len(names) or not 2 <= len(names) <= MAX_LABELS:
            raise ConfigError(
                f"{len(names):,} labels ({self._listed(names)}): a classification needs from 2 to {MAX_LABELS:,}, each "
                "once; for numbers to predict, choose regression"
            )
        self.names = list(names)
        self.ids = {name: number for number, name in enumerate(names)}

    @classmethod
    def found(cls, values: Iterable[str]) -> Labels:
        """Those that occur."""
        names = set(values)
        whole = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names)
        return cls(sorted(names, key=lambda name: (int(name), name)) if whole else sorted(names))

    def advice(self, label: str) -> str:
        """What to say of a label that is none of these."""
        near = difflib.get_close_matches(label, self.names, n=1)
        return f"the labels are {self._listed(self.names)}" + (f" (did it mean {near[0]!a}?)" if near else "")

    def settings(self) -> dict[str, object]:
        """Keywords for a model's config."""
        return {"num_labels": len(self.names), "id2label": dict(enumerate(self.names)), "label2id": dict(self.ids)}

    @staticmethod
    def _listed(names: Sequence[str]) -> str:
        return ", ".join(ascii(printable(name, 40)) for name in names[:MOST_NAMED]) + (
            f", … ({len(names):,})" if len(names) > MOST_NAMED else ""
        )
