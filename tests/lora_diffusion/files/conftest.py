"""What the fuzz test tried is said at the end of a run, whether or not output is captured."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

FUZZED = pytest.StashKey[Counter[str]]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    counts = config.stash.get(FUZZED, None)
    if counts:
        total = counts["refused"] + counts["loaded"]
        terminalreporter.write_line(
            f"mutated adapter files tried: {total:,} ({counts['refused']:,} refused, {counts['loaded']:,} loaded)"
        )
