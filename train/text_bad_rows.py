"""What happens to a row that cannot be used: an error at once, or, where that was asked for, a count."""

from __future__ import annotations

from collections import Counter

from lora_diffusion.errors import ConfigError, DatasetError

ON_BAD = ("error", "skip")


class BadRows:
    """The rows of one file that were left out or cut, by reason.

    Args:
        on_bad: "error" ends the reading at the first bad row; "skip" leaves such rows out and counts them.

    Attributes:
        skipped: reason -> how many rows were left out.
        changed: what was done -> how many rows it was done to ("cut to 128 tokens"); these are used.

    Raises:
        ConfigError: another word for `on_bad`.
    """

    def __init__(self, on_bad: str = "error") -> None:
        if on_bad not in ON_BAD:
            raise ConfigError(f"on_bad={on_bad!r}: give 'error' or 'skip'")
        self.on_bad = on_bad
        self.skipped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def report(self, source: str, reason: str, advice: str, detail: str = "") -> None:
        """A bad row. Returns where it is to be left out.

        Args:
            source: where it stands: "train.jsonl, line 3".
            reason: what is wrong, after "the row …", alike for all rows of the kind: "is no JSON".
            advice: what to do about it.
            detail: what is wrong with this one.

        Raises:
            DatasetError: with `on_bad="error"`.
        """
        if self.on_bad == "error":
            raise DatasetError(
                f"{source}: the row {reason}{f' ({detail})' if detail else ''}; {advice}, or skip bad rows"
            )
        self.leave_out(source, reason)

    def leave_out(self, source: str, reason: str) -> None:
        """Count a row that a setting of its own says to leave out."""
        self.skipped[reason] += 1
        self._first.setdefault(reason, source)

    def change(self, source: str, what: str) -> None:
        """Count a row that is used, though not as it stands in the file."""
        self.changed[what] += 1
        self._first.setdefault(what, source)

    @property
    def total(self) -> int:
        """How many rows were left out."""
        return sum(self.skipped.values())

    def summary(self) -> list[str]:
        """One sentence for each kind of thing that happened; empty where all rows were used as they are."""
        said = [f"{count:,} {_rows(count)} skipped: {reason}{self._where(reason, count)}"
                for reason, count in self.skipped.most_common()]  # fmt: skip
        said += [f"{count:,} {_rows(count)} {what}{self._where(what, count)}"
                 for what, count in self.changed.most_common()]  # fmt: skip
        return said

    def _where(self, what: str, count: int) -> str:
        return f" ({'the first is ' if count > 1 else ''}{self._first[what]})"


def _rows(count: int) -> str:
    return "row" if count == 1 else "rows"
