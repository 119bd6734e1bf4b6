"""Arithmetic on adapters: sums, other ranks, differences of models. Each gives an adapter and says what it cost."""

from __future__ import annotations

from .combine import combine
from .derived import Derived
from .extract import extract
from .resize import resize

__all__ = ["Derived", "combine", "extract", "resize"]
