"""Randomness by counting: what is drawn follows from (seed, stream, counter) and from nothing else.

A generator whose state grows along with the run has to be saved and restored at every checkpoint, and each further
consumer (a validation picture, a skipped image) shifts what all later ones see. Here every draw has an address instead:
the noise of the 700th training sample is the same whether the run was killed before or not, how samples are grouped
into batches, and on which device they are used (all draws are made on the CPU).
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, stream: str, counter: int = 0) -> int:
    """A 63-bit seed for one address. The same on every machine and Python version (SHA-256)."""
    digest = hashlib.sha256(f"{seed}/{stream}/{counter}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Draws:
    """The draws of one seed. Not thread-safe: one CPU generator is re-seeded for every address."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generator = torch.Generator(device="cpu")

    def at(self, stream: str, counter: int = 0) -> torch.Generator:
        """The generator at the beginning of an address; use it up before the next call."""
        return self._generator.manual_seed(derive_seed(self.seed, stream, counter))

    def shuffled(self, stream: str, position: int, count: int) -> int:
        """Which of `count` items comes at `position` when they are shuffled anew in every pass.

        Args:
            stream: the name of this order.
            position: how many items were taken before, over all passes (0, 1, 2, …).
            count: the number of items.
        """
        epoch, place = divmod(position, count)
        order = torch.randperm(count, generator=self.at(f"{stream}/order", epoch))
        return int(order[place])


def seed_layers(seed: int, counter: int) -> None:
    """Seed the generators that layers use by themselves (dropout), for one micro-batch."""
    torch.manual_seed(derive_seed(seed, "layers", counter))
