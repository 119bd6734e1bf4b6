"""One DreamBooth run, from prepared settings to files: what happens in which order, and what is told about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lora_diffusion as ld
from lora_diffusion.errors import TrainingError
from train import loop, prior
from train.best import Best
from train.distributed import ALONE, World, digest
from train.dreambooth_config import DreamBoothConfig, learns_text
from train.dreambooth_data import encode_data, prepare_class_images
from train.dreambooth_learn import BatchLoss, advice, build_learner, rank_beyond_width, rest_word, text_states
from train.dreambooth_save import BEST_FILE, Saver, model_label
from train.encoders import Encoders
from train.families import family_of
from train.images import read_image
from train.learner import Learner
from train.memory import MemoryMeter
from train.objective import Objective, with_zero_snr
from train.packed import packed, packs
from train.preview import Preview, encoder_alone, taking_turns
from train.record import RunFolder
from train.shards import shard
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
        best, best_step: with `keep_best`, the adapter of the step whose previews were judged best.
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
    best: Path | None = None
    best_step: int | None = None


class Run:
    """One call of `train`, after everything that could be refused has been checked."""

    def __init__(
        self, config: DreamBoothConfig, pipe: Any, folder: RunFolder, saver: Saver, device: torch.device,
        meter: MemoryMeter, should_stop: Callable[[], bool], judges: Encoders | None = None, world: World = ALONE,
    ) -> None:  # fmt: skip
        self.config, self.pipe, self.folder, self.saver, self.world = config, pipe, folder, saver, world
        self.device, self.meter, self.should_stop = device, meter, should_stop
        self.samples: list[Path] = []
        self.losses: list[float] = []
        self.last_step = config.max_train_steps or 0
        self.preview = _preview(config)
        self.judges = judges
        self.best: Best | None = None

    def go(
        self, photos: Any, objective: Objective, checkpoint: Path | None, tracking: Trackers, started: float
    ) -> Result:
        config, pipe, folder = self.config, self.pipe, self.folder
        start_step = 0 if checkpoint is None else self.saver.step_of(checkpoint)
        folder.emit(
            "start", recipe="dreambooth", model=config.pretrained_model_name_or_path, photos=len(photos.paths),
            device=str(self.device), precision=config.mixed_precision, resolution=config.resolution,
            max_steps=self.last_step, resumed_from=start_step or None, torch=torch.__version__,
            **({"processes": self.world.size} if self.world.size > 1 else {}),
        )  # fmt: skip
        for message in self.saver.passed_over:
            folder.emit("warning", message=message)
        if config.resume_from_checkpoint == "latest" and checkpoint is None:
            folder.emit("note", message=f"no checkpoint in {folder.checkpoints} yet: starting from the beginning")
        pictures = config.with_prior_preservation and config.prior_mode == "pictures"
        if not pictures and config.class_data_dir is not None:
            unused = "without --with_prior_preservation and --prior_mode pictures"
            folder.emit("warning", message=f"--class_data_dir is not used {unused}")
        for message in advice(config):
            folder.emit("warning", message=message)
        for remark in photos.remarks:
            folder.emit("warning", message=remark)
        planned = self._plan(photos, pictures)
        class_paths = []
        if pictures:
            with taking_turns(pipe, self.device):
                class_paths = prepare_class_images(config, pipe, self.device, folder, self.should_stop, self.world)
        if config.rescale_betas_zero_snr:
            pipe.scheduler = with_zero_snr(pipe.scheduler)
        with encoder_alone(pipe, self.device):
            data = encode_data(config, pipe, photos, class_paths, folder, self.world)
        self.saver.check_data(checkpoint, data.fingerprint)
        learner = build_learner(config, pipe, self.device, self.world.size)
        if (remark := rank_beyond_width(pipe)) is not None:
            folder.emit("warning", message=remark)
        texts = text_states(config, pipe, photos)  # after a new word has come to the tokenizers
        if not learns_text(config):
            texts.cache()
        self._make_room()
        if checkpoint is not None:
            learner.load(checkpoint)
        if config.fsdp:
            # Where shards lie in main memory, encoders stay: the pipeline computes where a module is that it finds.
            encoders = config.train_text_encoder and not config.fsdp_cpu_offload
            parts = family_of(pipe).trained(text_encoders=encoders)
            kept, total = shard(pipe, parts, self.device, cpu_offload=config.fsdp_cpu_offload)
            words = f"each of {self.world.size} processes keeps {kept / 2**20:.2f} of {total / 2**20:.2f} MiB"
            folder.emit("note", message=f"the frozen base of {' and '.join(parts)} is in parts: {words}")
        if self.world.size > 1:
            first = digest(learner.parameters)
            self.world.agree({"the pictures": data.fingerprint, "the adapter's first values": first})
        self._find_best(photos, learner, start_step)
        denoiser = family_of(pipe).denoiser_of(pipe)
        end, seconds = self._loop(
            BatchLoss(
                config, denoiser, objective, data, texts, self.device, base=lambda: ld.disable_adapters(pipe)
            ),
            learner, start_step, tracking,
        )  # fmt: skip
        if end.stopped and folder.checkpoints.joinpath(f"step-{end.step}") not in folder.checkpoints.glob("step-*"):
            self._checkpoint(end.step, learner)
        self._check_finite(learner, end.step)
        adapter = folder.adapter_file
        if self.world.main:
            with learner.averaged():
                self.saver.save_adapter(end.step)
            self.saver.save_card(end.step, self.samples)
        if self.saver.report is not None and self.saver.report.without_effect:
            folder.emit("warning", message=str(self.saver.report))
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
            *((None, None) if self.best is None or self.best.best is None else (self.best.file, self.best.best.step)),
        )
        if config.push_to_hub and not end.stopped and self.world.main:
            folder.emit("note", message=f"uploaded to {self.saver.push()}")
        folder.emit(
            "end", **{k: v for k, v in _plain(result).items() if k not in ("samples", "output_dir")}, step=end.step,
            skipped_steps=end.skipped, planned_memory_bytes=planned,
        )  # fmt: skip

        return result

    def _plan(self, photos: Any, pictures: bool) -> int | None:
        """Say how much memory the run will take, part by part; the end says how much it was.

        Of a base in parts, nothing can be said yet.
        """
        if not self.config.plan or not self.world.main or self.config.fsdp:
            return None
        from train.plan import plan_of_run

        place = Path(self.config.class_data_dir or self.folder.class_images)
        drawn = pictures and bool(prior.missing(place, self.config.num_class_images))
        texts = len({text for each in photos.texts for text in each}) or 1
        try:
            plan = plan_of_run(self.config, self.pipe, self.device, self.meter, texts=texts, drawn=drawn)
        except Exception as problem:  # a run is not to fail for want of an estimate
            what = " ".join(str(problem).split())[:200]
            self.folder.emit("warning", message=f"its memory cannot be planned: {type(problem).__name__}: {what}")
            return None
        self.folder.emit("plan", **plan.to_dict())
        return plan.peak

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
            rest_word(config, self.pipe, step)
            if step % config.checkpointing_steps == 0 or step == self.last_step:
                self._checkpoint(step, learner)
            if self.preview is not None and self.preview.due(step, self.last_step):
                self._draw(step, learner)

        rest_word(config, self.pipe, start_step)
        self._set_training(True)
        began = time.perf_counter()
        try:
            with self._packing():
                end = loop.run(
                    micro_losses, learner, settings, start_step=start_step, on_step=on_step, after_step=after_step,
                    on_first_gradients=lambda: self._check_gradients(learner),
                    should_stop=lambda: self.world.any(self.should_stop()), world=self.world,
                )  # fmt: skip
        except loop.Diverged as problem:
            raise self._diverged(problem, learner) from problem
        finally:
            self._set_training(False)
        return end, seconds_since(began)

    def _packing(self) -> AbstractContextManager[Any]:
        if self.device.type != "cpu" or self.config.fsdp or not packs(self.config):
            return nullcontext()
        return packed(family_of(self.pipe).denoiser_of(self.pipe))

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
        }
        for name in ("text_encoder", "text_encoder_2"):
            if name in report.learning_rates:
                values[f"{name}_lr"] = report.learning_rates[name]
        values |= {f"lr/{name}": rate for name, rate in report.learning_rates.items() if "/" in name}
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
        if not self.world.main:
            return
        with learner.averaged():
            path = self.saver.save_checkpoint(step, learner)
        self.folder.emit("checkpoint", step=step, path=str(path))

    def _check_finite(self, learner: Learner, step: int) -> None:
        if not learner.is_finite():
            rate = next(iter(learner.learning_rates.values()))
            problem = loop.Diverged(
                f"the adapter is no longer finite after step {step} with a learning rate of {rate:g}", step + 1
            )
            raise self._diverged(problem, learner)

    def _diverged(self, problem: loop.Diverged, learner: Learner) -> TrainingError:
        kept = self.saver.keep_last(problem.step - 1, learner) if self.world.main else "process 0 says what was kept"
        self.world.wait()
        other = ", or train without fp16 (--mixed_precision bf16 or no)" if learner.skips_overflows else ""
        return TrainingError(f"{problem}; {kept}; lower --learning_rate{other}")

    def _draw(self, step: int, learner: Learner) -> None:
        """Draw the previews of a step: process 0, or all of them where each has but a part of the model."""
        assert self.preview is not None
        place = self.folder.samples if self.world.main else None
        if self._draws():
            with learner.averaged():
                drawn = self.preview.draw(self.pipe, place, step, self.device, self._drawing_stops)
                for path, seed in drawn:
                    self.samples.append(path)
                    self.folder.emit("sample", step=step, path=str(path), prompt=self.preview.prompt, seed=seed)
                if self.best is not None:
                    self.best.judge(step, [path for path, _ in drawn])
        self.world.wait()

    def _draws(self) -> bool:
        return self.world.main or self.config.fsdp

    def _drawing_stops(self) -> bool:
        return self.world.any(self.should_stop()) if self.config.fsdp else self.should_stop()

    def _find_best(self, photos: Any, learner: Learner, start_step: int) -> None:
        """With `--keep_best`: judge the base model, and what an interrupted run left unjudged."""
        if start_step == 0 and self.world.main:
            (self.folder.path / BEST_FILE).unlink(missing_ok=True)
        if not self.config.keep_best or self.preview is None:
            return
        preview, pipe, device, stop = self.preview, self.pipe, self.device, self._drawing_stops
        if self.judges is None:  # process 0 has them; with its part of the model, this one takes part in drawing
            if self._draws():
                preview.base(pipe, preview.prompt, device, stop)
            if self.world.any(False):
                self._draw(start_step, learner)
            return
        pictures = map(read_image, photos.paths)
        self.best = Best(self.config, self.judges, pictures, preview, self.folder, self.saver.save_best)
        self.best.begin(lambda prompt: preview.base(pipe, prompt, device, stop), start_step)
        if self.world.any(self.best.missing(start_step, self.last_step)):
            self._draw(start_step, learner)

    def _set_training(self, mode: bool) -> None:
        """Train mode for what is trained: dropout and checkpointing are off without it."""
        family = family_of(self.pipe)
        denoiser = family.denoiser_of(self.pipe)
        encoders = family.encoders_of(self.pipe).values() if learns_text(self.config) else ()
        for module in (denoiser, *encoders):
            module.train(mode)
        if mode and self.config.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
            for encoder in encoders:
                _checkpoint_activations(encoder)

    def _make_room(self) -> None:
        """What has done its work leaves the GPU; previews bring it back for as long as they take."""
        if self.device.type == "cpu":
            return
        self.pipe.vae.to("cpu")
        if not learns_text(self.config):
            for encoder in family_of(self.pipe).encoders_of(self.pipe).values():
                encoder.to("cpu")
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
