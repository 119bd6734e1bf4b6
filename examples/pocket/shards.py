"""Scenes rendered ahead of training, in shards on disk: pictures as uint8, scenes pickled by their own seed.

A shard is a function of its number alone, so nothing but the number needs to be kept: `scenes(shard)` draws the same
scenes again (a second or two) wherever their captions are wanted.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from world import Scene, held_out, render, sample_scene

SHARD = 10_000
VALIDATION = 1_000_000  # shards from this number on are never trained on


def _rng(shard: int) -> np.random.Generator:
    return np.random.default_rng([20261123, shard])


def scenes(shard: int, count: int = SHARD) -> list[Scene]:
    """The scenes of a shard, without drawing them."""
    rng = _rng(shard)
    return [sample_scene(rng, forbidden=held_out) for _ in range(count)]


def pictures(shard: int, folder: Path, count: int = SHARD) -> np.ndarray:
    """The shard's pictures, (count, 64, 64, 3) uint8, memory-mapped; rendered on first use."""
    path = folder / f"pictures-{shard}-{count}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([20261124, shard])
        out = np.stack([np.asarray(render(s, rng)) for s in scenes(shard, count)])
        partial = path.with_suffix(".partial.npy")
        np.save(partial, out)
        partial.replace(path)
    return np.load(path, mmap_mode="r")


def render_ahead(shards: range, folder: Path, workers: int = 2) -> None:
    """Render several shards in parallel processes."""
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(pictures, shards, [folder] * len(shards)))
