"""What the pocket trainings share: an average of weights, checkpoints that are whole or absent, a written record."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import torch
import torch.distributed as dist


class Average:
    """Exponential moving average of a module's parameters, with a warm-up so that early steps do not linger."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.parameters = list(module.parameters())
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the live weights; call twice to get back."""
        for p, s in zip(self.parameters, self.shadow, strict=True):
            kept = p.detach().clone()
            p.copy_(s)
            s.copy_(kept)


def save_atomically(state: dict, path: Path) -> None:
    """Write `state` so that a kill at any moment leaves either the old file or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def machine() -> str:
    """The processor in words, as the record keeps it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


class Record:
    """One JSON line per entry, kept across resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **entry: object) -> None:
        entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **entry}
        with self.path.open("a") as f:
            f.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)


class Workers:
    """Data parallelism over the processes that `torchrun --nproc_per_node=N` started; one process works as well.

    On a CPU one single-threaded process per core beats one process with many threads: small operators and Python run
    in parallel too, and nothing spins at a barrier after each operator.
    """

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            torch.set_num_threads(1)
            dist.init_process_group("gloo")

    @classmethod
    def alone(cls) -> Workers:
        """One process, whatever the environment says."""
        workers = cls.__new__(cls)
        workers.rank, workers.count = 0, 1
        return workers

    @property
    def first(self) -> bool:
        return self.rank == 0

    def average(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        for g, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(piece.view_as(g))

    @torch.no_grad()
    def send(self, tensors: list[torch.nn.Parameter], source: int) -> None:
        """Give every process the `source` process's values."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.broadcast(flat, source)
        if self.rank != source:
            for t, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(piece.view_as(t))

    def agree(self, value: float) -> float:
        """The first process's `value`, on all of them (elapsed time, say, so that all stop at the same step)."""
        if self.count == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(box, 0)
        return float(box)
