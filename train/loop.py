"""The training loop. It knows a function from a position to a loss, and nothing of what the loss means.

Every recipe (pictures now, text later) hands it `micro_losses(position)`: scalars whose sum is the mean loss of
micro-batch number `position`, counted from 0 over the whole run. Each goes backward before the next is computed, so
that they share the memory. All randomness follows from that number (see `train.randomness`), so a run that is
killed and resumed computes the same numbers as one that never stopped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from lora_diffusion.errors import TrainingError
from train.distributed import ALONE, World
from train.learner import Learner
from train.randomness import seed_layers

MAX_SKIPPED = 25  # overflows in a row; the scaler halves its scale each time, from 2^16, so this many cannot be chance


class Diverged(TrainingError):
    """The loss or a gradient is NaN or infinite. `step` is the step that was not taken."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs to know of a run."""

    max_steps: int
    seed: int
    accumulation: int = 1
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, done.

    Attributes:
        step: its number, from 1.
        loss: mean over its micro-batches, those of all processes.
        learning_rates: by group, as used in this step.
        grad_norm: before clipping.
        steps_per_second: over the last steps.
        skipped: the step's gradients overflowed in fp16 and nothing moved.
    """

    step: int
    loss: float
    learning_rates: dict[str, float]
    grad_norm: float
    steps_per_second: float
    skipped: bool


@dataclass(frozen=True)
class LoopEnd:
    """Where the loop ended: the last step that was taken, whether it was asked to stop before its time, and how many
    steps were skipped because their gradients overflowed in fp16."""

    step: int
    stopped: bool
    skipped: int = 0


class Speed:
    """Steps per second over the last 20 steps. Pauses (previews, saving) do not count, nor does the slow first step."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=20)
        self._steps = 0
        self._started = 0.0

    def begin(self) -> None:
        self._started = time.perf_counter()

    def end(self) -> float:
        if self._steps == 1:
            self._seconds.clear()
        self._steps += 1
        self._seconds.append(time.perf_counter() - self._started)
        return len(self._seconds) / max(sum(self._seconds), 1e-9)


def run(
    micro_losses: Callable[[int], Iterable[torch.Tensor]],
    learner: Learner,
    settings: LoopSettings,
    *,
    start_step: int = 0,
    on_step: Callable[[StepReport], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    on_first_gradients: Callable[[], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    world: World = ALONE,
) -> LoopEnd:
    """Take steps until `settings.max_steps`.

    Args:
        micro_losses: position of a micro-batch → its losses, scalars with a graph each.
        learner: what is moved.
        start_step: steps already taken (after `learner.load`).
        on_step: told of every step.
        after_step: called after every step with its number; previews and checkpoints are made there.
        on_first_gradients: called once, when the first step's gradients are there and nothing has moved yet.
        should_stop: asked after every step; True ends the loop with `stopped`. All processes need the same answer.
        world: the processes that share each step. Of W of them, that of rank r takes W·n + r as its nth position.

    Raises:
        Diverged: NaN or Inf in the loss or the gradients. The step is not taken; the parameters as they are gave NaN,
            `learner.step_back()` brings those that did not.
    """
    speed = Speed()
    skipped = skipped_in_a_row = 0
    for step in range(start_step + 1, settings.max_steps + 1):
        speed.begin()
        rates = learner.learning_rates
        total = world.average(learner.parameters, _accumulate(micro_losses, learner, settings, step, world))
        if step == start_step + 1 and on_first_gradients is not None:
            on_first_gradients()
        norm = learner.gradient_norm(settings.max_grad_norm)
        # The only wait for the device in a step: both numbers at once, before anything moves, so that NaN never gets
        # in.
        loss_value, norm_value = torch.stack([total, norm.to(total)]).tolist()
        finite = _finite(loss_value) and _finite(norm_value)
        if finite:
            learner.remember()
            learner.step()
            skipped_in_a_row = 0
        else:
            skipped += 1
            skipped_in_a_row += 1
            if not learner.skips_overflows or skipped_in_a_row > MAX_SKIPPED:
                raise _diverged(loss_value, norm_value, step, rates, skipped_in_a_row)
            learner.skip()
        if on_step is not None:
            on_step(StepReport(step, loss_value, rates, norm_value, speed.end(), skipped=not finite))
        if after_step is not None:
            after_step(step)
        if should_stop is not None and step < settings.max_steps and should_stop():
            return LoopEnd(step, stopped=True, skipped=skipped)
    return LoopEnd(settings.max_steps, stopped=False, skipped=skipped)


def _accumulate(
    micro_losses: Callable[[int], Iterable[torch.Tensor]],
    learner: Learner,
    settings: LoopSettings,
    step: int,
    world: World,
) -> torch.Tensor:
    total: torch.Tensor | None = None
    for micro in range(settings.accumulation):
        position = ((step - 1) * settings.accumulation + micro) * world.size + world.rank
        seed_layers(settings.seed, position)
        for part in micro_losses(position):
            loss = part / settings.accumulation
            learner.backward(loss)
            value = loss.detach().to(torch.float32)
            total = value if total is None else total + value
    if total is None:
        raise TrainingError("a step without a batch: accumulation must be at least 1")
    return total


def _finite(value: float) -> bool:
    return value - value == 0.0


def _diverged(loss: float, norm: float, step: int, rates: dict[str, float], skipped: int) -> Diverged:
    what = f"the loss became {loss}" if not _finite(loss) else f"the gradient became {norm}"
    rate = ", ".join(f"{value:g}" for value in dict.fromkeys(rates.values()))
    message = f"{what} at step {step} with a learning rate of {rate}"
    if skipped > 1:
        message += f", and so for {skipped} steps in a row: no loss scale is small enough, so this is no mere overflow"
    return Diverged(message, step)
