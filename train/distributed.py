"""More than one process on one run: who is who, and what they tell each other.

Every process holds the whole adapter, a few MB, and takes its own share of each step's samples. What they exchange is
the mean of the adapter's gradients, once a step and as one tensor: what DistributedDataParallel does, without a wrapper
around the models. The frozen base is whole in each of them, or lies in shards (see `train.shards`).

`accelerate launch` and torchrun say in the environment which process this is: RANK, WORLD_SIZE, LOCAL_RANK, and where
the first one is, MASTER_ADDR and MASTER_PORT. The first process alone writes files and tells of events.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lora_diffusion.errors import ConfigError, TrainingError

_STEP = timedelta(minutes=30)  # for the exchange of gradients
_WAIT = timedelta(days=1)  # for one process that draws or uploads while the others have nothing to do
_MARKS = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "c10d", "process group")


class World:
    """The processes of a run. Of one alone, which is the default, all here is nothing and costs nothing.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @torch.no_grad()
    def average(self, parameters: Iterable[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Replace the gradients by their mean over all processes; returns the mean of the loss, a scalar.

        A parameter that no process has a gradient for stays without one.
        """
        if self.size == 1:
            return loss
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        missing = [parameter.grad is None for parameter in learning]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
        there = torch.tensor([float(not one) for one in missing])
        flat = torch.cat([one.flatten().to(loss.device, torch.float32) for one in (*gradients, there, loss)])
        with _explained():
            dist.all_reduce(flat)
        flat /= self.size
        *means, there, mean = flat.split([*(one.numel() for one in gradients), len(learning), 1])
        elsewhere = there.tolist() if any(missing) else [1.0] * len(learning)
        for parameter, value, share in zip(learning, means, elsewhere):
            if share:
                parameter.grad = value.view(parameter.shape).to(parameter.dtype)
        return mean[0]

    def any(self, flag: bool) -> bool:
        """Whether any process says so. All have to ask."""
        if self.size == 1:
            return flag
        count = torch.tensor(int(flag))
        with _explained():
            dist.all_reduce(count, group=self._group)
        return bool(count)

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.any(False)

    def agree(self, values: Mapping[str, Any]) -> None:
        """See to it that values (what they are, in words: the value) are the same in all processes.

        Raises:
            ConfigError: naming what differs, in all of them.
        """
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        with _explained():
            dist.all_gather_object(found, dict(values), group=self._group)
        for rank, other in enumerate(found):
            different = [name for name in values if other[name] != found[0][name]]
            if different:
                first, own = found[0][different[0]], other[different[0]]
                raise ConfigError(
                    f"processes 0 and {rank} of this run differ in {' and '.join(different)} ({first!a}, {own!a}); "
                    "they need the same command, files and versions, and one --output_dir that all of them see"
                )


ALONE = World()


@contextmanager
def joined(device: torch.device, *, even_alone: bool = False) -> Iterator[World]:
    """Within the context this process is one of those that a launcher has started; without a launcher it is alone.

    Args:
        device: where training happens; on CUDA each process of a machine takes the card of its number.
        even_alone: have the means to exchange tensors with a single process too, as sharding needs them.

    Raises:
        ConfigError: the launcher's variables cannot be used, there are fewer cards than processes, or a process is
            started without a launcher where one is needed.
        TrainingError: another process has ended in the midst of the run.
    """
    place = _place()
    if place is None and even_alone:
        raise ConfigError(
            "--fsdp needs a launcher, also for a single process: accelerate launch -m app.cli …, or torchrun"
        )
    if place is None or (place[1] == 1 and not even_alone):
        yield ALONE
        return
    rank, size, local = place
    if device.type == "mps":
        raise ConfigError("--device mps: several processes need CUDA devices or the CPU")
    if device.type == "cuda":
        cards = torch.cuda.device_count()
        if local >= cards:
            raise ConfigError(f"process {local} of this machine has no GPU of its own: PyTorch sees {cards}")
        torch.cuda.set_device(local)
    own = not dist.is_initialized()
    with _explained():
        if own:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=_STEP)
        world = World(rank, size, dist.new_group(backend="gloo", timeout=_WAIT))
    with _explained():
        yield world
        world.wait()
    if own:
        dist.destroy_process_group()


def launched_as() -> int:
    """The number of this process among those that a launcher has started; 0 without one."""
    return (_place() or (0, 1, 0))[0]


def leave(code: int) -> None:
    """End a process that a launcher has started along with others, without tearing down what still talks to them.

    Gloo's threads now and then abort an interpreter that shuts down in order.
    """
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """A hash over the bits of tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def _place() -> tuple[int, int, int] | None:
    """(rank, size, rank on this machine) as the launcher says; None without one.

    Raises:
        ConfigError: what it says cannot be used.
    """
    said = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if said["RANK"] is None or said["WORLD_SIZE"] is None:
        return None
    try:
        rank, size, local = (int(value) for value in (said["RANK"], said["WORLD_SIZE"], said["LOCAL_RANK"] or "0"))
    except ValueError:
        rank, size, local = -1, 0, 0
    if not 0 <= rank < size or local < 0:
        listed = ", ".join(f"{name}={value!a}" for name, value in said.items())
        raise ConfigError(f"the environment's {listed} make no sense; unset them, or let a launcher set them")
    if size > 1 and not os.environ.get("MASTER_ADDR"):
        raise ConfigError(f"WORLD_SIZE is {size}, but MASTER_ADDR is not set: start with accelerate launch or torchrun")
    return rank, size, local


@contextmanager
def _explained() -> Iterator[None]:
    """What a backend says when its peers are gone, as one sentence."""
    try:
        yield
    except RuntimeError as problem:
        words = " ".join(str(problem).split())
        if not isinstance(problem, dist.DistError) and not any(mark in words for mark in _MARKS):
            raise
        raise TrainingError(
            f"another process of this run has ended or cannot be reached ({words[:160]}); its own message says why, if "
            "it left one; go on with --resume_from_checkpoint latest"
        ) from problem
