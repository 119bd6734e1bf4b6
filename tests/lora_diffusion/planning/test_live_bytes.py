"""Live bytes: what is made, shared, freed and adopted, with real tensors."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from lora_diffusion.planning.live_bytes import LiveBytes

KIB = 1024


def test_storages_are_counted_once_and_until_they_are_freed() -> None:
    with LiveBytes() as live:
        a = torch.zeros(256)
        b = a.view(16, 16)[:4]
        assert live.parts == {"activations": KIB}
        del a
        assert live.parts == {"activations": KIB}  # the view keeps it
        del b
        assert live.parts == {"activations": 0}
    assert live.peak == KIB


def test_the_parts_at_the_peak() -> None:
    weight = torch.zeros(512)
    with LiveBytes() as live:
        live.adopt(weight, "weights")
        live.reserve([100], "optimizer")
        x = weight + 1
        live.adopt(x, "gradients")
        y = x + 1
        del x, y
    assert live.at_peak == {"weights": 2 * KIB, "optimizer": 100, "gradients": 2 * KIB, "activations": 2 * KIB}
    assert live.peak == sum(live.at_peak.values())
    assert live.parts == {"weights": 2 * KIB, "optimizer": 100, "gradients": 0, "activations": 0}


def test_autograd_keeps_what_checkpointing_does_not() -> None:
    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = torch.sin(x)
        return x

    peaks = []
    for run in (deep, lambda x: checkpoint(deep, checkpoint(deep, x, use_reentrant=False), use_reentrant=False)):
        x = torch.zeros(256, requires_grad=True)
        with LiveBytes() as live:
            (run(run(x)) if run is deep else run(x)).sum().backward()
        peaks.append(live.peak // KIB)
    assert peaks[0] >= 16 and peaks[1] <= 11


def test_events_tell_of_every_storage_in_order() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1)
        b = torch.zeros(2)
        del a
        del b
    assert live.events == [(1, 4), (2, 8), (1, -1), (2, -1)]
