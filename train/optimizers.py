"""Optimizers by name, each from the library that keeps it, imported when it is chosen and not before.

AdamW (Loshchilov & Hutter, 2019) is PyTorch's, its 8-bit form (Dettmers et al., 2022) bitsandbytes', Adafactor (Shazeer
& Stern, 2018) transformers', Prodigy (Mishchenko & Defazio, 2024) prodigyopt's, schedule-free AdamW (Defazio et al.,
2024) schedulefree's.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_diffusion.errors import ConfigError

WITHOUT_SCHEDULE = "schedule-free-adamw"


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate, by name; all fp32.

    Attributes:
        name: the component that they belong to.
        kind: what sets them apart from other groups of that component, such as `lora_B`.
    """

    name: str
    parameters: Mapping[str, torch.nn.Parameter]
    learning_rate: float
    kind: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}/{self.kind}" if self.kind else self.name


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer and the course of its learning rate.

    Attributes:
        name: one of `train.dreambooth_config.OPTIMIZERS`.
        betas, epsilon: of all optimizers but Adafactor, which has rules of its own.
        ema_decay: keep an average of the parameters with this decay; None for none. See `train.ema`.
        ema_warmup: let the decay grow along a power of the steps.
    """

    name: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    epsilon: float = 1e-8
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 1
    cycles: int = 1
    power: float = 1.0
    ema_decay: float | None = None
    ema_warmup: bool = False


def lora_plus(group: Group, ratio: float | None) -> list[Group]:
    """LoRA+ (Hayou et al., 2024): a group as two, the B of all layers at `ratio` times the rate of the rest."""
    if ratio is None:
        return [group]
    second = {name: p for name, p in group.parameters.items() if name.rpartition(".")[2] == "lora_B"}
    rest = {name: p for name, p in group.parameters.items() if name not in second}
    split = [
        Group(group.name, rest, group.learning_rate),
        Group(group.name, second, group.learning_rate * ratio, "lora_B"),
    ]
    return [one for one in split if one.parameters]


def make_optimizer(groups: list[Group], settings: OptimizerSettings) -> Any:
    """The optimizer that `settings` names, ready to train.

    Raises:
        ConfigError: its package is not installed.
    """
    entries = [{"params": list(group.parameters.values()), "lr": group.learning_rate} for group in groups]
    rate = groups[0].learning_rate
    adam: dict[str, Any] = {
        "lr": rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
        "eps": settings.epsilon,
    }
    if settings.name == "adamw8bit":
        return _library("bitsandbytes", settings.name).optim.AdamW8bit(entries, **adam)
    if settings.name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            entries, lr=rate, weight_decay=settings.weight_decay, scale_parameter=False, relative_step=False
        )
    if settings.name == "prodigy":
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how it decays weights
            return _library("prodigyopt", settings.name).Prodigy(
                entries, **adam, use_bias_correction=True, safeguard_warmup=True
            )
    if settings.name == WITHOUT_SCHEDULE:
        warmup = settings.warmup_steps if settings.schedule == "constant_with_warmup" else 0
        optimizer = _library("schedulefree", settings.name).AdamWScheduleFree(entries, **adam, warmup_steps=warmup)
        optimizer.train()
        return optimizer
    fused = groups[0].parameters and next(iter(groups[0].parameters.values())).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(entries, fused=bool(fused), **adam)


def make_schedule(optimizer: Any, settings: OptimizerSettings) -> Any:
    """The course of the learning rate; constant where the optimizer has its own."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        "constant" if settings.name == WITHOUT_SCHEDULE else settings.schedule,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.total_steps,
        num_cycles=settings.cycles,
        power=settings.power,
    )


def coming_rate(entry: Mapping[str, Any]) -> float:
    """The learning rate that a parameter group's coming step will use.

    Prodigy multiplies the rate by its estimate d; schedule-free AdamW warms up by itself.
    """
    rate = float(entry["lr"])
    if "d" in entry:
        return rate * float(entry["d"])
    if "train_mode" in entry:
        return rate * min(1.0, (entry["k"] + 1) / max(1, entry["warmup_steps"]))
    return rate


def averages(optimizer: Any) -> bool:
    """The optimizer trains at one place and means another, the average of its steps, to be used (schedule-free)."""
    return any("train_mode" in entry for entry in optimizer.param_groups)


def move_to_average(optimizer: Any) -> None:
    """Move the parameters to the average.

    The way back through the optimizer is not exact to the bit: the caller keeps the parameters and puts them back, and
    so the optimizer stays in train mode.
    """
    optimizer.eval()
    for entry in optimizer.param_groups:
        entry["train_mode"] = True


def _library(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"--optimizer {name} needs the package {package}: pip install {package}") from None
