"""One run through the loop, whatever it learns: what is told of every step, when checkpoints are made, how it ends.

A recipe derives from `Running` and adds what it looks at while training (previews, validation) and what it prepares.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.errors import LoraDiffusionError, TrainingError
from train import loop
from train.distributed import ALONE, World
from train.learner import Learner
from train.memory import MemoryMeter
from train.record import RunFolder
from train.saving import RunSaver
from train.trackers import Trackers


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        output_dir: the run's folder.
        adapter: the adapter file; None if the run was stopped before it had taken a step.
        steps: optimizer steps in the adapter, resumed ones included.
        loss: mean over the last steps (up to 50) of this process; NaN if it took none.
        stopped: `should_stop` ended the run early; a checkpoint was saved.
        seconds_training: in the loop, previews and checkpoints included.
        seconds: in all, loading included.
        peak_memory_bytes: see `train.memory`.
        best, best_step: with `keep_best`, the adapter of the step that was judged best.
    """

    output_dir: Path
    adapter: Path | None
    steps: int
    loss: float
    stopped: bool
    seconds_training: float
    seconds: float
    peak_memory_bytes: int
    best: Path | None = None
    best_step: int | None = None


class Running:
    """One call of a recipe's `train`, after everything that could be refused has been checked."""

    def __init__(
        self, config: Any, folder: RunFolder, saver: RunSaver, device: torch.device, meter: MemoryMeter,
        should_stop: Callable[[], bool], world: World = ALONE,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.saver, self.world = config, folder, saver, world
        self.device, self.meter, self.should_stop = device, meter, should_stop
        self.wishes: Callable[[], set[str]] | None = None
        self.losses: list[float] = []
        self.last_step: int = config.max_train_steps or 0

    def settle(self, step: int) -> None:
        """Called where `step` steps have been taken, also before the first: what rests from now on, or wakes."""

    def watch(self, step: int, learner: Learner) -> None:
        """Called after every step and its checkpoint: previews, validation."""

    def show(self, step: int, learner: Learner) -> None:
        """Called after `watch` where somebody wishes to see now what it shows at times."""

    def enough(self) -> bool:
        """Whether the run has reached what it wanted before its last step. The same in all processes."""
        return False

    def set_training(self, mode: bool) -> None:
        """Train mode for what is trained, or eval mode."""
        raise NotImplementedError

    def around_loop(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def take_steps(
        self, micro_losses: Callable[[int], Iterable[torch.Tensor]], learner: Learner, start_step: int,
        tracking: Trackers,
    ) -> tuple[loop.LoopEnd, float]:  # fmt: skip
        """Take the steps from `start_step` on; returns the end and the seconds that it took.

        Raises:
            TrainingError: the loss diverged; what was good is kept.
        """
        config = self.config
        settings = loop.LoopSettings(
            self.last_step, config.seed, config.gradient_accumulation_steps, config.max_grad_norm
        )

        def on_step(report: loop.StepReport) -> None:
            values = self._report(report)
            self.folder.emit("step", **values)
            tracking.log({k: v for k, v in values.items() if isinstance(v, float)}, report.step)

        def after_step(step: int) -> None:
            self.settle(step)
            wished = self._wished()
            if step % config.checkpointing_steps == 0 or step == self.last_step or "save" in wished:
                self.checkpoint(step, learner)
            self.watch(step, learner)
            if "sample" in wished:
                self.show(step, learner)

        began = time.perf_counter()
        if self.enough():
            return loop.LoopEnd(start_step, stopped=False), 0.0
        self.settle(start_step)
        self.set_training(True)
        try:
            with self.around_loop():
                end = loop.run(
                    micro_losses, learner, settings, start_step=start_step, on_step=on_step, after_step=after_step,
                    on_first_gradients=lambda: self._check_gradients(learner),
                    should_stop=lambda: self.enough() or self.world.any(self.should_stop()), world=self.world,
                )  # fmt: skip
        except loop.Diverged as problem:
            raise self.diverged(problem, learner) from problem
        finally:
            self.set_training(False)
        if end.stopped and not (self.folder.checkpoints / f"step-{end.step}").is_dir():
            self.checkpoint(end.step, learner)
        self.check_finite(learner, end.step)
        if self.enough():
            end = loop.LoopEnd(end.step, stopped=False, skipped=end.skipped)
        return end, seconds_since(began)

    def say_how_it_begins(self, checkpoint: Path | None) -> None:
        """Damaged checkpoints, and that there is none to go on from."""
        for message in self.saver.passed_over:
            self.folder.emit("warning", message=message)
        if self.config.resume_from_checkpoint == "latest" and checkpoint is None:
            place = self.folder.checkpoints
            self.folder.emit("note", message=f"no checkpoint in {place} yet: starting from the beginning")

    def save_result(self, step: int, learner: Learner) -> None:
        """Write the adapter, by process 0; say what learned nothing."""
        if self.world.main:
            with learner.averaged():
                self.saver.save_adapter(step)
        if self.saver.report is not None and self.saver.report.without_effect:
            self.folder.emit("warning", message=str(self.saver.report))

    def finish(self, result: Result, skipped: int, planned: int | None) -> None:
        """Upload where that was asked for, and the last event."""
        if self.config.push_to_hub and not result.stopped and self.world.main:
            self.folder.emit("note", message=f"uploaded to {self.saver.push()}")
        self.folder.emit(
            "end", **{k: v for k, v in _plain(result).items() if k not in ("samples", "output_dir")},
            step=result.steps, skipped_steps=skipped, planned_memory_bytes=planned,
        )  # fmt: skip

    def mean_loss(self) -> float:
        last = self.losses[-50:]
        return sum(last) / len(last) if last else math.nan

    def checkpoint(self, step: int, learner: Learner) -> None:
        self.check_finite(learner, step)
        if not self.world.main:
            return
        with learner.averaged():
            path = self.saver.save_checkpoint(step, learner)
        self.folder.emit("checkpoint", step=step, path=str(path))

    def check_finite(self, learner: Learner, step: int) -> None:
        if not learner.is_finite():
            rate = next(iter(learner.learning_rates.values()))
            problem = loop.Diverged(
                f"the adapter is no longer finite after step {step} with a learning rate of {rate:g}", step + 1
            )
            raise self.diverged(problem, learner)

    def diverged(self, problem: loop.Diverged, learner: Learner) -> TrainingError:
        kept = self.saver.keep_last(problem.step - 1, learner) if self.world.main else "process 0 says what was kept"
        self.world.wait()
        other = ", or train without fp16 (--mixed_precision bf16 or no)" if learner.skips_overflows else ""
        return TrainingError(f"{problem}; {kept}; lower --learning_rate{other}")

    def further_rates(self, rates: dict[str, float]) -> dict[str, float]:
        """What a step's event says of learning rates beside the first."""
        return {f"lr/{name}": rate for name, rate in rates.items() if "/" in name}

    def _wished(self) -> set[str]:
        """What is wished for after this step: "sample", "save". The same in all processes."""
        if self.wishes is None:
            return set()
        wished = self.wishes()
        if self.world.size == 1:
            return wished
        return {wish for wish in ("sample", "save") if self.world.any(wish in wished)}

    def _report(self, report: loop.StepReport) -> dict[str, Any]:
        self.losses.append(report.loss)
        values: dict[str, Any] = {
            "step": report.step,
            "max_steps": self.last_step,
            "loss": report.loss,
            "lr": next(iter(report.learning_rates.values())),
            "grad_norm": report.grad_norm,
            "speed": round(report.steps_per_second, 4),
            "memory": self.meter.now(),
            **self.further_rates(report.learning_rates),
        }
        if report.skipped:
            values |= {"skipped": True, "loss": None, "grad_norm": None}
            self.losses.pop()
        return values

    def _check_gradients(self, learner: Learner) -> None:
        idle, count = learner.layers_without_gradient()
        if len(idle) == count:
            raise TrainingError("no layer of the adapter got a gradient: nothing would be learned")
        if idle:
            names = ", ".join(idle[:3]) + (", …" if len(idle) > 3 else "")
            self.folder.emit("warning", message=f"{len(idle)} of {count} adapted layers got no gradient: {names}")
        self.folder.emit("gradients", layers=count, without=len(idle))


@contextmanager
def told(folder: RunFolder, out_of_memory: Callable[[], str]) -> Iterator[None]:
    """What goes wrong inside is the run's last event, and one sentence.

    Args:
        out_of_memory: what to say then.

    Raises:
        TrainingError: memory ran out, or a file could not be read or written.
    """
    try:
        yield
    except LoraDiffusionError as problem:
        folder.emit("error", message=str(problem))
        raise
    except (torch.OutOfMemoryError, MemoryError) as problem:
        folder.emit("error", message="out of memory")
        raise TrainingError(out_of_memory()) from problem
    except OSError as problem:
        folder.emit("error", message=str(problem))
        raise TrainingError(
            f"a file could not be read or written: {problem}; after that is mended, go on with "
            "--resume_from_checkpoint latest"
        ) from problem
    finally:
        folder.close()


def seconds_since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def _plain(result: Result) -> dict[str, Any]:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(result).items()}
    if math.isnan(result.loss):
        values["loss"] = None
    return values
