"""One batch, many adapters: each row its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .components import components_of
from .errors import ConfigError
from .state import holders, refuse_copies, refuse_merged, states


@contextmanager
def adapters_per_sample(target: Any, names: Sequence[str | None]) -> Iterator[None]:
    """Within the context row i of every batch uses adapter names[i] alone, with its weight from `set_adapters` (1 where
    it is not active there); None is the base model. In sampling and in training, for every kind of layer.

    A batch of twice as many rows is taken for the two halves of classifier-free guidance, which share their adapters;
    for a model that generates text, k times as many rows are k beams or samples of each, as `generate` lays them out.
    The terms of all adapters of a layer are computed in one product, so the cost grows with the sum of the ranks.
    Raises ConfigError for an unknown or merged adapter, a DoRA adapter, no names at all, and from the model's forward
    when a batch has another number of rows.
    """
    rows: list[str | None] = [names] if isinstance(names, str) else [*names]
    if not rows:
        raise ConfigError("adapters_per_sample: give one adapter name, or None, for each row of the batch")
    for name in dict.fromkeys(row for row in rows if row is not None):
        found = holders(target, name)
        refuse_merged(found, name)
        refuse_copies(found, name, "mixed in a batch")
        for state in found.values():
            _refuse_dora(name, state.adapters[name].layers, state)
    concerned = list(states(target).values())
    for component, state in states(target).items():
        state.beside = hasattr(components_of(target)[component], "generate")
    before = [state.per_sample for state in concerned]
    try:
        for state in concerned:
            state.per_sample = rows
            state.apply()
        yield
    finally:
        for state, earlier in zip(concerned, before):
            state.per_sample = earlier
            state.apply()


def _refuse_dora(name: str, layers: Any, state: Any) -> None:
    for path, layer in layers.items():
        if layer.part(name).lora_magnitude_vector is not None:
            raise ConfigError(
                f"adapter {name!r} uses DoRA ({path}), which cannot be mixed row by row: run it on its own"
            )
