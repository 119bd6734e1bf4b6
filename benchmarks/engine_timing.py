"""Time that is fair to every contestant: they take turns within each repetition, so that noise hits all alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

WARM_UP = {"cpu": 2, "cuda": 10}  # calls before the first timed one: caches, algorithms chosen, compilation


@dataclass(frozen=True)
class Timing:
    """Seconds per call, {contestant: one figure per repetition}; the n-th figures of all were taken side by side."""

    samples: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def ratio(self, name: str, to: str) -> float:
        """Median of the repetitions' quotients: a slow spell of the machine slows both sides of one."""
        return statistics.median(a / b for a, b in zip(self.samples[name], self.samples[to]))

    def figures(self) -> dict[str, dict[str, float]]:
        """Microseconds, for the JSON file."""
        return {
            name: {
                "median_us": round(statistics.median(values) * 1e6, 3),
                "least_us": round(min(values) * 1e6, 3),
                "most_us": round(max(values) * 1e6, 3),
            }
            for name, values in self.samples.items()
        }


def take_turns(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    repetitions: int,
    *,
    host: bool = False,
    least_s: float = 5e-3,
) -> Timing:
    """Time each run `repetitions` times, in an order drawn anew for every repetition.

    One figure is the mean of as many calls as take `least_s`, the same number for all runs.
    host: wall time of the processor although the device is a GPU, which is waited for at both ends; otherwise a GPU's
        time is the one between two of its events.
    """
    clock = _wall if host or device.type != "cuda" else _events
    for run in runs.values():
        for _ in range(WARM_UP[device.type]):
            run()
    fastest = min(clock(run, 1, device) for run in runs.values())
    calls = max(1, int(least_s / max(fastest, 1e-9)))
    order, draw = list(runs), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # what is there already need not be looked through after every repetition
    gc.disable()
    try:
        for _ in range(repetitions):
            draw.shuffle(order)
            for name in order:
                samples[name].append(clock(runs[name], calls, device))
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return Timing(samples)


def _wall(run: Callable[[], object], calls: int, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return (time.perf_counter() - began) / calls


def _events(run: Callable[[], object], calls: int, device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
