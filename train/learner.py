"""What learns: the trainable parameters with their optimizer, learning-rate schedule and gradient scaler.

One object, so that a checkpoint is one thing to save and to restore.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora_diffusion.errors import ConfigError, TrainingError
from train.ema import Average
from train.optimizers import (
    Group,
    OptimizerSettings,
    averages,
    coming_rate,
    make_optimizer,
    make_schedule,
    move_to_average,
)

__all__ = ["Group", "Learner", "OptimizerSettings"]

PARAMETERS_FILE = "parameters.safetensors"
OPTIMIZER_FILE = "optimizer.pt"


class Learner:
    """Parameters in groups, and how they are moved.

    Plain PyTorch rather than `accelerate`: the whole state of a step is then in view here (a few state dicts), and
    exact resume is a matter of saving those, without hooks that save and order things on their own.

    Args:
        groups: the parameters; all on one device.
        settings: optimizer and schedule.
        scale_gradients: keep small fp16 gradients from vanishing, by a scale that adapts itself (Micikevicius et al.,
            2018). Steps whose gradients overflow are then skipped, as they should be.
    """

    def __init__(self, groups: list[Group], settings: OptimizerSettings, *, scale_gradients: bool = False) -> None:
        self.groups = groups
        self.parameters = [parameter for group in groups for parameter in group.parameters.values()]
        self.optimizer = make_optimizer(groups, settings)
        self.schedule = make_schedule(self.optimizer, settings)
        self.average = (
            None
            if settings.ema_decay is None
            else Average(self.parameters, settings.ema_decay, warmup=settings.ema_warmup)
        )
        device = self.parameters[0].device.type
        self._before = [torch.empty_like(parameter) for parameter in self.parameters]
        self._live: list[torch.Tensor] | None = None  # what is trained, while `averaged` shows something else
        self.scaler = torch.amp.GradScaler(device, enabled=scale_gradients)

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rate that the coming step will use, by group."""
        return {group.label: coming_rate(entry) for group, entry in zip(self.groups, self.optimizer.param_groups)}

    @property
    def skips_overflows(self) -> bool:
        return bool(self.scaler.is_enabled())

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def gradient_norm(self, clip_to: float) -> torch.Tensor:
        """The norm over all gradients before clipping (a tensor, not yet waited for); clips them if `clip_to` > 0."""
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if clip_to > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip_to, norm)
        return norm

    @torch.no_grad()
    def remember(self) -> None:
        """Keep a copy of the parameters, which have just given a finite loss."""
        torch._foreach_copy_(self._before, self.parameters)

    @torch.no_grad()
    def step_back(self) -> None:
        """Put the parameters back to the copy that `remember` kept."""
        torch._foreach_copy_(self.parameters, self._before)

    def step(self) -> None:
        """Move the parameters by one step and the schedule with them; gradients are gone afterwards."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.step()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the parameters are those to draw with and to keep: the average, where there is one.

        Afterwards they have the very bits that they had before, so that looking changes nothing.
        """
        if self._live is not None or (self.average is None and not averages(self.optimizer)):
            yield
            return
        self._live = [parameter.detach().clone() for parameter in self.parameters]
        try:
            if self.average is None:
                move_to_average(self.optimizer)
            else:
                self.average.copy_to_parameters()
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self._live)
            self._live = None

    def skip(self) -> None:
        """Let a step whose gradients overflowed go by: a smaller scale, nothing moved."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def is_finite(self) -> bool:
        """No parameter holds NaN or Inf."""
        return bool(torch.stack([parameter.detach().isfinite().all() for parameter in self.parameters]).all())

    def layers_without_gradient(self) -> tuple[list[str], int]:
        """The layers that the last backward pass did not reach, and how many layers there are.

        A layer's parameters share the path before their last dot; one of them with a gradient other than zero will do
        (with B = 0 at the start, that of A is zero).
        """
        reached: dict[str, list[torch.Tensor]] = {}
        for path, parameter in self._named():
            flags = reached.setdefault(path.rpartition(".")[0], [])
            if parameter.grad is not None:
                flags.append(parameter.grad.ne(0).any())
        return [layer for layer, flags in reached.items() if not any(bool(flag) for flag in flags)], len(reached)

    def save(self, folder: Path) -> None:
        """Write parameters (bit-exact) and the states of optimizer, schedule, scaler and average.

        Within `averaged`, too, the parameters are those that are trained.

        Raises:
            TrainingError: a parameter is not finite; nothing is written.
        """
        if not self.is_finite():
            raise TrainingError("a parameter of the adapter is no longer finite; nothing was saved")
        values = self._live or [parameter.detach() for parameter in self.parameters]
        save_file(
            {name: value.contiguous().cpu() for (name, _), value in zip(self._named(), values)},
            folder / PARAMETERS_FILE,
        )
        states = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.average is not None:
            states["average"] = self.average.state_dict()
        torch.save(states, folder / OPTIMIZER_FILE)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            ConfigError: the checkpoint is damaged or was made for other layers.
        """
        try:
            parameters = load_file(folder / PARAMETERS_FILE)
            states = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
            own = dict(self._named())
            if {n: p.shape for n, p in parameters.items()} != {n: p.shape for n, p in own.items()}:
                raise ConfigError(f"the checkpoint {folder} was made for other layers than this run has")
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(parameters[name])
            self.optimizer.load_state_dict(states["optimizer"])
            self.schedule.load_state_dict(states["schedule"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(states["scaler"])
            if self.average is not None:
                self.average.load_state_dict(states["average"])
        except ConfigError:
            raise
        except Exception as problem:  # a damaged file shows itself in a dozen kinds of exceptions
            raise ConfigError(
                f"the checkpoint {folder} cannot be read ({' '.join(str(problem).split())[:200]}); "
                "remove it, then resume from the one before it"
            ) from problem

    def _named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(f"{group.name}.{name}", p) for group in self.groups for name, p in group.parameters.items()]
