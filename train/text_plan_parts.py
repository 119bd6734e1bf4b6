"""A base in parts (FSDP2, `--fsdp`, `--fsdp_cpu_offload`): what of it is on a card, planned from shapes.

The model's code runs as ever, and its frozen weights count for nothing; in their place stands what FSDP2 has of them on
the card at a time: this process's share (in main memory with offload), what belongs to no block (the embedding, a head
of its own), gathered, and three times the largest block: the one that is computed with, and the next one twice, as
what is gathered is copied to where it is used. Gathering what belongs to no block takes it twice, before any block is
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lora_diffusion.planning.live_bytes import LiveBytes
from lora_diffusion.planning.plan import ADAPTERS, GRADIENTS, WEIGHTS, WORKSPACE, Plan, plan_of
from lora_diffusion.planning.workspace import CUBLAS, cuda_workspace

_BLOCKS = 3  # of the largest, at a time


def base_bytes(model: nn.Module) -> int:
    """All frozen weights and buffers: what the processes keep together, in main memory with offload."""
    return sum(_size(tensor) for tensor in _frozen(model))


def on_card(model: nn.Module, *, processes: int, offload: bool) -> list[int]:
    """Bytes of the base on a card while the model computes, as the largest of them at a time."""
    largest, rest = _blocks(model)
    share = 0 if offload else base_bytes(model) // processes
    return [share, max(2 * rest, rest + _BLOCKS * largest)]


def measure_in_parts(
    mode: Any,
    work: Callable[[], None],
    model: nn.Module,
    learned: list[nn.Parameter],
    *,
    blocks: Mapping[str, list[int]],
    processes: int,
    offload: bool,
    cublas: int = CUBLAS,
    device: str = "cuda",
) -> Plan:
    """As `lora_diffusion.planning.plan.measure`, of a fake model whose frozen base is in parts."""
    trained = {id(parameter) for parameter in learned}
    live = LiveBytes(cuda_workspace if device == "cuda" else None)
    hooks = []
    try:
        with mode, live:
            for tensor in (*model.parameters(), *model.buffers()):
                own = id(tensor) in trained
                live.adopt(tensor, ADAPTERS if own else WEIGHTS, None if own else 0)
            live.reserve(on_card(model, processes=processes, offload=offload), WEIGHTS)
            for part, sizes in blocks.items():
                live.reserve(sizes, part)
            if device == "cuda":
                live.reserve([cublas // 2] * 2, WORKSPACE)
            for parameter in learned:
                if parameter.grad is not None:
                    live.adopt(parameter.grad, GRADIENTS)
                hooks.append(parameter.register_post_accumulate_grad_hook(_adopting(live)))
            work()
    finally:
        for hook in hooks:
            hook.remove()
    return plan_of(live, device)


def _adopting(live: LiveBytes) -> Callable[[torch.Tensor], None]:
    def adopt(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            live.adopt(parameter.grad, GRADIENTS)

    return adopt


def _blocks(model: Any) -> tuple[int, int]:
    """Bytes of the largest block's frozen weights, and of those that are in none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    inside: set[int] = set()
    largest = 0
    for module in model.modules():
        if type(module).__name__ in names:
            own = _frozen(module)
            inside.update(map(id, own))
            largest = max(largest, sum(map(_size, own)))
    return largest, sum(_size(tensor) for tensor in _frozen(model) if id(tensor) not in inside)


def _frozen(module: nn.Module) -> list[torch.Tensor]:
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.requires_grad]


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
