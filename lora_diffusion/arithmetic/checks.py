"""Settings that all of the arithmetic shares."""

from __future__ import annotations

import torch

from ..adapter import Adapter
from ..config import MAX_RANK, is_number
from ..errors import ConfigError


def check_adapter(name: str, adapter: object) -> None:
    """Raises ConfigError."""
    if not isinstance(adapter, Adapter):
        raise ConfigError(
            f"{name} is a {type(adapter).__name__}: give an Adapter, read by read_adapter or the .adapter of a result"
        )


def check_rank(name: str, rank: object) -> None:
    """Raises ConfigError."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"{name}={rank!r}: a rank is a whole number from 1 to {MAX_RANK}")


def check_share(name: str, share: object) -> None:
    """Raises ConfigError."""
    if not is_number(share) or not 0.0 < share <= 1.0:
        raise ConfigError(f"{name}={share!r}: give a share above 0 and up to 1")


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises ConfigError."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype={dtype!r}: give a floating-point torch.dtype, or None for that of the input")
