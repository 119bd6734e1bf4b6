"""One DreamBooth run, from prepared settings to files: what happens in which order, and what is told about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.errors import TrainingError
from train import loop
from train.dreambooth_config import DreamBoothConfig
from train.dreambooth_data import encode_data, prepare_class_images
from train.dreambooth_learn import BatchLoss, build_learner, text_states
from train.dreambooth_save import Saver, model_label
from train.learner import Learner
from train.memory import MemoryMeter
from train.objective import NoiseSchedule
from train.preview import Preview
from train.record import RunFolder
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
        seconds: in all, loading and encoding included.
        peak_memory_bytes: see `train.memory`.
        samples: previews, in order.
    """

    output_dir: Path
    adapter: Path | None
    steps: int
    loss: float
    stopped: bool
    seconds_training: float
    seconds: float
    peak_memory_bytes: int
    samples: tuple[Path, ...] = ()


class Run:
    """One call of `train`, after everything that could be refused has been checked."""

    def __init__(
        self, config: DreamBoothConfig, pipe: Any, folder: RunFolder, saver: Saver, device: torch.device,
        meter: MemoryMeter, should_stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.config, self.pipe, self.folder, self.saver = config, pipe, folder, saver
        self.device, self.meter, self.should_stop = device, meter, should_stop
        self.samples: list[Path] = []
        self.losses: list[float] = []
        self.last_step = config.max_train_steps or 0
        self.preview = _preview(config)

    def go(
        self, photos: Any, schedule: NoiseSchedule, checkpoint: Path | None, tracking: Trackers, started: float
    ) -> Result:
        config, pipe, folder = self.config, self.pipe, self.folder
        start_step = 0 if checkpoint is None else self.saver.step_of(checkpoint)
        folder.emit(
            "start", recipe="dreambooth", model=config.pretrained_model_name_or_path, photos=len(photos.paths),
            device=str(self.device), precision=config.mixed_precision, resolution=config.resolution,
            max_steps=self.last_step, resumed_from=start_step or None, torch=torch.__version__,
        )  # fmt: skip
        if config.resume_from_checkpoint == "latest" and checkpoint is None:
            folder.emit("note", message=f"no checkpoint in {folder.checkpoints} yet: starting from the beginning")
        if not config.with_prior_preservation and config.class_data_dir is not None:
            folder.emit("warning", message="--class_data_dir is not used without --with_prior_preservation")
        class_paths = prepare_class_images(config, pipe, self.device, folder, self.should_stop)
        data = encode_data(config, pipe, photos, class_paths, folder)
        self.saver.check_data(checkpoint, data.fingerprint)
        texts = text_states(config, pipe)
        learner = build_learner(config, pipe, self.device)
        if not config.train_text_encoder:
            texts.cache()
        self._make_room()
        if checkpoint is not None:
            learner.load(checkpoint)
        end, seconds = self._loop(
            BatchLoss(config, pipe.unet, schedule, data, texts, self.device), learner, start_step, tracking
        )
        if end.stopped and folder.checkpoints.joinpath(f"step-{end.step}") not in folder.checkpoints.glob("step-*"):
            self._checkpoint(end.step, learner)
        self._check_finite(learner, end.step)
        adapter = self.saver.save_adapter(end.step)
        if self.saver.report is not None and self.saver.report.without_effect:
            folder.emit("warning", message=str(self.saver.report))
        self.saver.save_card(end.step, self.samples)
        mean = sum(self.losses[-50:]) / max(1, len(self.losses[-50:])) if self.losses else math.nan
        result = Result(
            folder.path,
            adapter,
            end.step,
            mean,
            end.stopped,
            seconds,
            seconds_since(started),
            self.meter.peak(),
            tuple(self.samples),
        )
        if config.push_to_hub and not end.stopped:
            folder.emit("note", message=f"uploaded to {self.saver.push()}")
        folder.emit(
            "end", **{k: v for k, v in _plain(result).items() if k not in ("samples", "output_dir")}, step=end.step
        )
        return result

    def _loop(
        self, micro_losses: BatchLoss, learner: Learner, start_step: int, tracking: Trackers
    ) -> tuple[loop.LoopEnd, float]:
        config = self.config
        settings = loop.LoopSettings(
            self.last_step, config.seed, config.gradient_accumulation_steps, config.max_grad_norm
        )

        def on_step(report: loop.StepReport) -> None:
            values = self._report(report)
            self.folder.emit("step", **values)
            tracking.log({k: v for k, v in values.items() if isinstance(v, float)}, report.step)

        def after_step(step: int) -> None:
            if step % config.checkpointing_steps == 0 or step == self.last_step:
                self._checkpoint(step, learner)
            if self.preview is not None and self.preview.due(step, self.last_step):
                self._draw(step)

        self._set_training(True)
        began = time.perf_counter()
        try:
            end = loop.run(
                micro_losses, learner, settings, start_step=start_step, on_step=on_step, after_step=after_step,
                on_first_gradients=lambda: self._check_gradients(learner), should_stop=self.should_stop,
            )  # fmt: skip
        except loop.Diverged as problem:
            raise self._diverged(problem, learner) from problem
        finally:
            self._set_training(False)
        return end, seconds_since(began)

    def _report(self, report: loop.StepReport) -> dict[str, Any]:
        self.losses.append(report.loss)
        values: dict[str, Any] = {
            "step": report.step,
            "max_steps": self.last_step,
            "loss": report.loss,
            "lr": report.learning_rates["unet"],
            "grad_norm": report.grad_norm,
            "speed": round(report.steps_per_second, 4),
            "memory": self.meter.now(),
        }
        if "text_encoder" in report.learning_rates:
            values["text_encoder_lr"] = report.learning_rates["text_encoder"]
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

    def _checkpoint(self, step: int, learner: Learner) -> None:
        self._check_finite(learner, step)
        path = self.saver.save_checkpoint(step, learner)
        self.folder.emit("checkpoint", step=step, path=str(path))

    def _check_finite(self, learner: Learner, step: int) -> None:
        if not learner.is_finite():
            rate = learner.learning_rates["unet"]
            problem = loop.Diverged(
                f"the adapter is no longer finite after step {step} with a learning rate of {rate:g}", step + 1
            )
            raise self._diverged(problem, learner)

    def _diverged(self, problem: loop.Diverged, learner: Learner) -> TrainingError:
        return TrainingError(f"{problem}; {self.saver.keep_last(problem.step - 1, learner)}; lower --learning_rate")

    def _draw(self, step: int) -> None:
        assert self.preview is not None
        for path, seed in self.preview.draw(self.pipe, self.folder.samples, step, self.device, self.should_stop):
            self.samples.append(path)
            self.folder.emit("sample", step=step, path=str(path), prompt=self.preview.prompt, seed=seed)

    def _set_training(self, mode: bool) -> None:
        """Train mode for what is trained: dropout and checkpointing are off without it."""
        trained = [self.pipe.unet, *([self.pipe.text_encoder] if self.config.train_text_encoder else [])]
        for module in trained:
            module.train(mode)
        if mode and self.config.gradient_checkpointing:
            self.pipe.unet.enable_gradient_checkpointing()
            if self.config.train_text_encoder:
                _checkpoint_activations(self.pipe.text_encoder)

    def _make_room(self) -> None:
        """What has done its work leaves the GPU; previews bring it back for as long as they take."""
        if self.device.type == "cpu":
            return
        self.pipe.vae.to("cpu")
        if not self.config.train_text_encoder:
            self.pipe.text_encoder.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _checkpoint_activations(text_encoder: Any) -> None:
    """Non-reentrant checkpointing of a transformers model, under its name of today or that of before 5.20."""
    enable = getattr(text_encoder, "activation_checkpointing_enable", text_encoder.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _preview(config: DreamBoothConfig) -> Preview | None:
    if config.validation_prompt is None:
        return None
    return Preview(
        prompt=config.validation_prompt,
        images=config.num_validation_images,
        every=config.validation_steps or 1,
        steps=config.validation_inference_steps,
        seed=config.seed,
        resolution=config.resolution or 0,
        model=model_label(config.pretrained_model_name_or_path),
    )


def _plain(result: Result) -> dict[str, Any]:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(result).items()}
    if math.isnan(result.loss):
        values["loss"] = None
    return values


def seconds_since(started: float) -> float:
    return round(time.perf_counter() - started, 3)
