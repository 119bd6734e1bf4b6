"""How much memory a run takes."""

from __future__ import annotations

import sys

import psutil
import torch


class MemoryMeter:
    """Bytes in use where training happens: the GPU's allocations, or the process's resident memory on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def now(self) -> int:
        if self._device.type == "cuda":
            used = int(torch.cuda.memory_allocated(self._device))
        else:
            used = int(self._process.memory_info().rss)
        self._peak = max(self._peak, used)
        return used

    def peak(self) -> int:
        """The largest so far: since this meter was made on CUDA, since the process began on the CPU."""
        self.now()
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return max(self._peak, _process_peak(self._process))


def _process_peak(process: psutil.Process) -> int:
    if sys.platform == "win32":
        return int(process.memory_info().peak_wset)
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(largest) if sys.platform == "darwin" else int(largest) * 1024
