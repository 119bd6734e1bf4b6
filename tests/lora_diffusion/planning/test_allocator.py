"""CUDA's caching allocator, replayed: sizes of blocks and segments, reuse, cutting and joining."""

from __future__ import annotations

from lora_diffusion.planning.allocator import MIB, Taken, replay


def test_small_blocks_share_a_segment_of_two_mebibytes() -> None:
    assert replay([(1, 1)]) == Taken(512, 2 * MIB)
    assert replay([(1, 513), (2, 1000)]) == Taken(2048, 2 * MIB)
    assert replay([(1, MIB), (2, MIB), (3, 1)]) == Taken(2 * MIB + 512, 4 * MIB)


def test_large_blocks_come_from_larger_segments() -> None:
    assert replay([(1, MIB + 1)]) == Taken(MIB + 512, 20 * MIB)
    assert replay([(1, 10 * MIB)]).reserved == 10 * MIB
    assert replay([(1, 10 * MIB + 1)]).reserved == 12 * MIB


def test_a_block_is_not_cut_for_less_than_a_mebibyte() -> None:
    whole = replay([(1, 12 * MIB), (1, -1), (2, 11 * MIB + 512)])
    assert whole == Taken(12 * MIB, 12 * MIB)
    cut = replay([(1, 12 * MIB), (1, -1), (2, 10 * MIB), (3, MIB + 512)])
    assert cut == Taken(12 * MIB, 12 * MIB)  # the rest of 2 MiB is given whole: less than 1 MiB of it would be left


def test_freed_neighbours_are_joined_and_used_again() -> None:
    events = [(1, 8 * MIB), (2, 8 * MIB), (1, -1), (2, -1), (3, 16 * MIB)]
    assert replay(events) == Taken(16 * MIB, 20 * MIB)
    assert replay([*events, (3, -1), (4, 20 * MIB)]) == Taken(20 * MIB, 20 * MIB)
    assert replay([(1, 4 * MIB), (2, 4 * MIB), (3, 4 * MIB), (2, -1), (1, -1), (4, 8 * MIB)]).reserved == 20 * MIB
    assert replay([(1, 4 * MIB), (2, 4 * MIB), (3, 4 * MIB), (1, -1), (3, -1), (4, 14 * MIB)]).reserved == 34 * MIB


def test_what_was_never_made_is_not_freed() -> None:
    assert replay([(1, 0), (1, -1), (2, 512), (2, -1)]) == Taken(512, 2 * MIB)
