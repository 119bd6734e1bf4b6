"""From updates in a form of their own (LoHa, LoKr, …) to products of two factors, which the engine computes with."""

from __future__ import annotations

from .adapter import Adapter


def lowered(adapter: Adapter, tolerance: float = 1e-3) -> Adapter:
    """The same adapter without `structured` layers."""
    if not adapter.structured:
        return adapter
    raise NotImplementedError
