"""How many bytes PyTorch's CUDA allocator takes for a series of allocations, found by doing as it does.

It hands out blocks of multiples of 512 bytes, cut from segments: of 2 MiB for blocks up to 1 MiB, of 20 MiB for those
below 10 MiB, else of the block's size rounded up to 2 MiB. The smallest free block that is large enough is taken, what
is left of it becomes a block of its own (in the segments of large blocks only if more than 1 MiB is left), and free
neighbours are joined again. Segments go back to the driver only when memory runs out. These are the defaults of
`c10/cuda/CUDACachingAllocator.cpp`, without expandable segments.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20
UNIT = 512
SMALL = MIB
_SMALL_SEGMENT, _LARGE_SEGMENT, _ROUND = 2 * MIB, 20 * MIB, 2 * MIB
_OWN_SEGMENT = 10 * MIB


@dataclass(frozen=True)
class Taken:
    """What `torch.cuda.max_memory_allocated` and `max_memory_reserved` would say, in bytes."""

    allocated: int
    reserved: int


class _Block:
    """A piece of a segment, between its neighbours."""

    __slots__ = ("after", "before", "free", "number", "size")

    def __init__(self, size: int, number: int) -> None:
        self.size, self.number, self.free = size, number, False
        self.before: _Block | None = None
        self.after: _Block | None = None


def replay(events: Iterable[tuple[int, int]]) -> Taken:
    """What the allocator takes for `LiveBytes.events`: (number, bytes) for made, (number, -1) for freed."""
    pools: tuple[_Pool, _Pool] = (_Pool(UNIT, small=True), _Pool(SMALL + UNIT, small=False))
    held: dict[int, tuple[_Pool, _Block]] = {}
    allocated = most = 0
    for number, size in events:
        if size == 0:
            continue
        if size > 0:
            wanted = -(-size // UNIT) * UNIT
            pool = pools[0] if wanted <= SMALL else pools[1]
            block = pool.take(wanted)
            held[number] = (pool, block)
            allocated += block.size
            most = max(most, allocated)
        elif number in held:
            pool, block = held.pop(number)
            allocated -= block.size
            pool.give(block)
    return Taken(most, pools[0].reserved + pools[1].reserved)


class _Pool:
    """The free blocks of one kind, smallest first.

    Args:
        least: what has to be left of a block for it to be cut.
    """

    def __init__(self, least: int, *, small: bool) -> None:
        self._least, self._small = least, small
        self._free: list[tuple[int, int]] = []
        self._blocks: dict[int, _Block] = {}
        self._count = 0
        self.reserved = 0

    def take(self, size: int) -> _Block:
        place = bisect.bisect_left(self._free, (size, 0))
        if place < len(self._free):
            block = self._blocks.pop(self._free.pop(place)[1])
            block.free = False
        else:
            segment = self._segment(size)
            self.reserved += segment
            block = self._new(segment)
        rest = block.size - size
        if rest >= self._least:
            other = self._new(rest)
            other.before, other.after = block, block.after
            if block.after is not None:
                block.after.before = other
            block.after, block.size = other, size
            self._keep(other)
        return block

    def give(self, block: _Block) -> None:
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._drop(neighbour)
                first, second = (neighbour, block) if neighbour is block.before else (block, neighbour)
                block = self._joined(first, second)
        self._keep(block)

    def _segment(self, size: int) -> int:
        if self._small:
            return _SMALL_SEGMENT
        return _LARGE_SEGMENT if size < _OWN_SEGMENT else -(-size // _ROUND) * _ROUND

    def _new(self, size: int) -> _Block:
        self._count += 1
        return _Block(size, self._count)

    def _joined(self, first: _Block, second: _Block) -> _Block:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first

    def _keep(self, block: _Block) -> None:
        block.free = True
        self._blocks[block.number] = block
        bisect.insort(self._free, (block.size, block.number))

    def _drop(self, block: _Block) -> None:
        block.free = False
        del self._blocks[block.number]
        del self._free[bisect.bisect_left(self._free, (block.size, block.number))]
