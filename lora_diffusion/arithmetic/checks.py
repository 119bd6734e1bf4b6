"""Settings that all of the arithmetic shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from ..adapter import Adapter
from ..config import MAX_RANK, is_number
from ..errors import AdapterMismatchError, ConfigError

T = TypeVar("T")
OnProgress = Callable[[str, int, int], None]


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


def refuse_prompts(adapters: Iterable[Adapter]) -> None:
    """Raises AdapterMismatchError for virtual tokens, which are no update of a weight."""
    if any(adapter.prompts for adapter in adapters):
        raise AdapterMismatchError("an adapter holds virtual tokens, for which there is no arithmetic")


def counted(on_progress: OnProgress | None, total: int) -> Callable[[str, T], T]:
    """A function that tells of a layer's result and hands it on."""
    done = 0

    def said(name: str, result: T) -> T:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(name, done, total)
        return result

    return said
