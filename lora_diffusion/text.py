"""Text from files on its way to a terminal."""

from __future__ import annotations


def printable(text: str, limit: int = 200) -> str:
    """`text` on one line without control characters, cut to `limit` characters."""
    clean = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
