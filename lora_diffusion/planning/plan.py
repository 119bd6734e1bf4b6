"""Peak memory before anything is allocated: `ld.plan`.

The model's code runs once with fake tensors, forward and, where it trains, backward, while every tensor that comes and
goes is counted. A Stable Diffusion UNet takes about a second on one core of a laptop.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import LoraConfig
from ..errors import ConfigError
from ..inject import add_adapter
from .allocator import replay
from .fake_copy import fake_copy, fake_mode
from .live_bytes import LiveBytes
from .workspace import CUBLAS, cuda_workspace

DEVICES = ("cuda", "cpu")
WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, WORKSPACE = PARTS = (
    "weights", "adapters", "gradients", "optimizer", "activations", "workspace",
)  # fmt: skip
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "schedule-free-adamw", "sgd")


@dataclass(frozen=True)
class Plan:
    """Memory at its peak, in bytes.

    Attributes:
        parts: what it is made of at that moment: weights (of the base), adapters, gradients (those that are there by
            then), optimizer (its state), activations (all else that the code makes), and on CUDA workspace: what
            kernels take on the side, and the allocator by rounding up.
        peak: their sum; on CUDA what `torch.cuda.max_memory_allocated` would say.
        reserved: on CUDA what the allocator takes from the card to serve that, `max_memory_reserved`; elsewhere `peak`.
    """

    parts: dict[str, int]
    peak: int
    reserved: int

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in self.parts.items() if size)
        return f"{self.peak / 2**20:,.0f} MiB at the peak: {parts}"


def plan(
    model: Any,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    inputs: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    train: bool = True,
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw",
    quantize: str | None = None,
    device: str = "cuda",
) -> Plan:
    """The peak of one training step, or of one forward pass, of a model with an adapter.

    Args:
        model: an nn.Module, real or on the meta device. It is not changed, and nothing of it is copied.
        config: of the adapter to add, as for `add_adapter`; without it, the adapters that the model has already.
        inputs: forward's keyword arguments: tensors (on any device, meta included: only shape and dtype count), tuples
            of ints (the shape of a floating-point tensor), or anything else as it is. The loss is the output's `.loss`
            where it has one, else the mean of the squares of its first tensor.
        dtype: of the base weights and of floating-point inputs (default: the weights' own).
        train: also run backward, and count the optimizer's state; else forward under no_grad.
        gradient_checkpointing: recompute activations in the backward pass.
        optimizer: one of "adamw", "adamw8bit", "adafactor", "prodigy", "schedule-free-adamw", "sgd".
        quantize: store the base in fewer bits: "nf4", "int8" or "fp8"; see `planning/stored.py`.
        device: "cuda" or "cpu".

    Raises:
        ConfigError: an option that is not known, or nothing that would be trained.
    """
    check_options(device, optimizer)
    with planning() as mode:
        twin = fake_copy(model, mode, dtype, quantize)
        if config is not None:
            with mode:
                add_adapter(twin, config, _free_name(twin), generator=torch.Generator())
        learned = [parameter for parameter in twin.parameters() if parameter.requires_grad] if train else []
        if train and not learned:
            raise ConfigError("nothing would be trained: give the config of an adapter, or train=False")
        twin.train(train)
        if gradient_checkpointing and train:
            checkpoint_activations(twin)
        arguments = _fake_inputs(dict(inputs or {}), dtype or _dtype_of(model), mode)

        def step() -> None:
            with torch.set_grad_enabled(train):
                output = twin(**arguments)
                if train:
                    _loss_of(output).backward()

        return measure(
            mode, step, modules=[twin], learned=learned, inputs=arguments,
            blocks={OPTIMIZER: state_sizes(learned, optimizer)}, device=device,
        )  # fmt: skip


def measure(
    mode: Any,
    work: Callable[[], None],
    *,
    modules: list[nn.Module],
    learned: list[nn.Parameter] | None = None,
    inputs: Any = None,
    blocks: Mapping[str, list[int]] | None = None,
    cublas: int = CUBLAS,
    device: str = "cuda",
) -> Plan:
    """The peak of `work`, which runs fake modules of `mode`.

    Args:
        modules: those on the device while it runs, fakes of `mode`.
        learned: the parameters among theirs that are trained; they may have gradients from before.
        inputs: tensors, in lists and dicts at will, that are there before.
        blocks: sizes of further blocks that stay throughout, by part.
    """
    trained = {id(parameter) for parameter in learned or ()}
    live = LiveBytes(cuda_workspace if device == "cuda" else None)
    hooks = []
    try:
        with mode, live:
            for module in modules:
                for tensor in (*module.parameters(), *module.buffers()):
                    live.adopt(tensor, ADAPTERS if id(tensor) in trained else WEIGHTS)
            for part, sizes in (blocks or {}).items():
                live.reserve(sizes, part)
            if device == "cuda":
                live.reserve([cublas // 2] * 2, WORKSPACE)
            for tensor in _tensors(inputs):
                live.adopt(tensor, ACTIVATIONS)
            for parameter in learned or ():
                if parameter.grad is not None:
                    live.adopt(parameter.grad, GRADIENTS)
                hooks.append(parameter.register_post_accumulate_grad_hook(partial(_adopt_gradient, live)))
            work()
    finally:
        for hook in hooks:
            hook.remove()
    return plan_of(live, device)


def plan_of(live: LiveBytes, device: str) -> Plan:
    """What was counted, as the device's allocator would say it."""
    parts = {part: live.at_peak.get(part, 0) for part in PARTS}
    if device != "cuda":
        return Plan(parts, live.peak, live.peak)
    taken = replay(live.events)
    parts[WORKSPACE] += taken.allocated - live.peak
    return Plan(parts, taken.allocated, taken.reserved)


@contextmanager
def planning() -> Iterator[Any]:
    """A fake mode; afterwards the random state is what it was, whatever layers drew in between.

    Python's garbage collector rests meanwhile: what it finds and when would change the count, and it takes time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.random.fork_rng(devices=[]):
            yield fake_mode()
    finally:
        if collecting:
            gc.enable()


def check_options(device: str, optimizer: str) -> None:
    """Raises ConfigError."""
    if device not in DEVICES:
        raise ConfigError(f"device={device!r} is not one of {', '.join(DEVICES)}")
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer={optimizer!r} is not one of {', '.join(OPTIMIZERS)}")


def checkpoint_activations(module: nn.Module) -> None:
    """Non-reentrant gradient checkpointing of a model of diffusers or transformers.

    Raises:
        ConfigError: the model has none.
    """
    for name in ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable"):
        enable = getattr(module, name, None)
        if enable is not None:
            enable() if name.startswith("enable") else enable({"use_reentrant": False})
            return
    raise ConfigError(f"gradient_checkpointing: a {type(module).__name__} has no way to switch it on")


def state_sizes(learned: list[nn.Parameter], optimizer: str) -> list[int]:
    """The blocks of an optimizer's state, in bytes, once it has taken a step."""
    sizes = []
    for parameter in learned:
        count = parameter.numel()
        if optimizer == "adamw":
            sizes += [4 * count, 4 * count, 4]
        elif optimizer == "adamw8bit":  # tensors below 4096 elements keep their state in fp32
            sizes += [4 * count] * 2 if count < 4096 else [count, count, *[4 * -(-count // 256)] * 2, 1024, 1024]
        elif optimizer == "adafactor":
            rows = [4 * count // parameter.shape[-1], 4 * count // parameter.shape[-2]] if parameter.ndim > 1 else []
            sizes += rows or [4 * count]
        elif optimizer == "prodigy":
            sizes += [4 * count] * 4
        elif optimizer == "schedule-free-adamw":
            sizes += [4 * count] * 2
    return sizes


def _adopt_gradient(live: LiveBytes, parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        live.adopt(parameter.grad, GRADIENTS)


def _fake_inputs(inputs: dict[str, Any], dtype: torch.dtype, mode: Any) -> dict[str, Any]:
    with mode:
        return {name: _fake_input(value, dtype) for name, value in inputs.items()}


def _fake_input(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, tuple) and value and all(type(size) is int for size in value):
        return torch.empty(value, dtype=dtype)
    if isinstance(value, Mapping):
        return {name: _fake_input(one, dtype) for name, one in value.items()}
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _loss_of(output: Any) -> torch.Tensor:
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    first = next(_tensors(output), None)
    if first is None:
        raise ConfigError(f"the model returns a {type(output).__name__} without a tensor that a loss could be made of")
    return first.float().square().mean()


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _free_name(twin: nn.Module) -> str:
    from ..state import adapter_names

    taken = adapter_names(twin)
    return next(name for name in ("default", *(f"planned_{number}" for number in range(len(taken) + 1)))
                if name not in taken)  # fmt: skip
