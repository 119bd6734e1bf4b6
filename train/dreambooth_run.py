"""One DreamBooth run, from prepared settings to files: what happens in which order, and what is told about it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lora_diffusion as ld
from train import prior, running
from train.best import Best
from train.distributed import ALONE, World, digest
from train.dreambooth_config import DreamBoothConfig, learns_text
from train.dreambooth_data import encode_data, prepare_class_images
from train.dreambooth_learn import BatchLoss, advice, build_learner, rank_beyond_width, rest_word, text_states
from train.dreambooth_save import Saver
from train.encoders import Encoders
from train.families import family_of
from train.images import read_image
from train.learner import Learner
from train.memory import MemoryMeter
from train.objective import Objective, with_zero_snr
from train.packed import packed, packs
from train.preview import Preview, encoder_alone, taking_turns
from train.record import RunFolder
from train.running import seconds_since
from train.saving import BEST_FILE, model_label
from train.shards import shard
from train.trackers import Trackers


@dataclass(frozen=True)
class Result(running.Result):
    """What a run left behind: `train.running.Result`, and samples: previews, in order."""

    samples: tuple[Path, ...] = ()


class Run(running.Running):
    """One call of `train.dreambooth.train`, after everything that could be refused has been checked."""

    saver: Saver

    def __init__(
        self, config: DreamBoothConfig, pipe: Any, folder: RunFolder, saver: Saver, device: torch.device,
        meter: MemoryMeter, should_stop: Callable[[], bool], judges: Encoders | None = None, world: World = ALONE,
    ) -> None:  # fmt: skip
        super().__init__(config, folder, saver, device, meter, should_stop, world)
        self.pipe = pipe
        self.samples: list[Path] = []
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
        self.say_how_it_begins(checkpoint)
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
        end, seconds = self.take_steps(
            BatchLoss(
                config, denoiser, objective, data, texts, self.device, base=lambda: ld.disable_adapters(pipe)
            ),
            learner, start_step, tracking,
        )  # fmt: skip
        self.save_result(end.step, learner)
        if self.world.main:
            self.saver.save_card(end.step, self.samples)
        best = None if self.best is None else self.best.best
        result = Result(
            folder.path, folder.adapter_file, end.step, self.mean_loss(), end.stopped, seconds,
            seconds_since(started), self.meter.peak(),
            best=None if best is None or self.best is None else self.best.file,
            best_step=None if best is None else best.step, samples=tuple(self.samples),
        )  # fmt: skip
        self.finish(result, end.skipped, planned)
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

    def settle(self, step: int) -> None:
        rest_word(self.config, self.pipe, step)

    def watch(self, step: int, learner: Learner) -> None:
        if self.preview is not None and self.preview.due(step, self.last_step):
            self._draw(step, learner, self.preview)

    def show(self, step: int, learner: Learner) -> None:
        """Draw the previews, without a validation prompt those of the instance prompt, unless they were just drawn."""
        if self.preview is not None and self.preview.due(step, self.last_step):
            return
        config = replace(self.config, validation_prompt=self.config.validation_prompt or self.config.instance_prompt)
        preview = self.preview or _preview(config)
        assert preview is not None
        self._draw(step, learner, preview)

    def further_rates(self, rates: dict[str, float]) -> dict[str, float]:
        own = {f"{name}_lr": rates[name] for name in ("text_encoder", "text_encoder_2") if name in rates}
        return {**own, **super().further_rates(rates)}

    def around_loop(self) -> AbstractContextManager[Any]:
        if self.device.type != "cpu" or self.config.fsdp or not packs(self.config):
            return nullcontext()
        return packed(family_of(self.pipe).denoiser_of(self.pipe))

    def _draw(self, step: int, learner: Learner, preview: Preview) -> None:
        """Draw the previews of a step: process 0, or all of them where each has but a part of the model."""
        place = self.folder.samples if self.world.main else None
        if self._draws():
            with learner.averaged():
                drawn = preview.draw(self.pipe, place, step, self.device, self._drawing_stops)
                for path, seed in drawn:
                    self.samples.append(path)
                    self.folder.emit("sample", step=step, path=str(path), prompt=preview.prompt, seed=seed)
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
                self._draw(start_step, learner, preview)
            return
        pictures = map(read_image, photos.paths)
        self.best = Best(self.config, self.judges, pictures, preview, self.folder, self.saver.save_best)
        self.best.begin(lambda prompt: preview.base(pipe, prompt, device, stop), start_step)
        if self.world.any(self.best.missing(start_step, self.last_step)):
            self._draw(start_step, learner, preview)

    def set_training(self, mode: bool) -> None:
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
