"""DreamBooth with LoRA: a few photos of a subject in, an adapter of a few MB out (Ruiz et al., 2023; Hu et al., 2021).

    lora-diffusion dreambooth --model pocket --instance_data_dir photos --instance_prompt "a photo of sks dog" \\
        --output_dir runs/dog --max_train_steps 400

The same from Python:

    from train.dreambooth import train
    from train.dreambooth_config import DreamBoothConfig

    result = train(DreamBoothConfig("pocket", "photos", "a photo of sks dog", output_dir="runs/dog"))
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.errors import ConfigError
from train.best import judges_of
from train.buckets import bucket_sizes
from train.config import to_dict
from train.distributed import World, joined
from train.dreambooth_checks import validate
from train.dreambooth_config import DEFAULT_STEPS, DreamBoothConfig
from train.dreambooth_data import StoppedEarly, read_photos
from train.dreambooth_learn import text_states, weighting_of
from train.dreambooth_run import Result, Run
from train.dreambooth_save import Saver
from train.families import family_of
from train.memory import MemoryMeter
from train.models import load_pipeline, resolve_device, resolve_precision
from train.objective import objective_of
from train.record import OnEvent, RunFolder
from train.running import seconds_since, told
from train.saving import check_same_run, deciding
from train.shards import check_sharding
from train.trackers import Trackers, check_trackers

__all__ = ["DreamBoothConfig", "Result", "resolve", "train"]


def train(
    config: DreamBoothConfig,
    *,
    on_event: OnEvent | None = None,
    should_stop: Callable[[], bool] | None = None,
    wishes: Callable[[], set[str]] | None = None,
) -> Result:
    """Run a DreamBooth training from settings to files.

    Args:
        config: see `DreamBoothConfig`. `resume_from_checkpoint=None` with `overwrite=True` always starts afresh.
        on_event: told of every event of `train.record`, as a dict.
        should_stop: asked after every step; True saves a checkpoint and the adapter, then returns.
        wishes: asked after every step: "sample" in its answer draws the previews now, "save" makes a checkpoint now.

    Raises:
        ConfigError, DatasetError, ModelNotFoundError: before anything is written.
        TrainingError: the loss diverged, memory ran out, or a file could not be written; what was learned up to the
            last checkpoint is kept.
    """
    started = time.perf_counter()
    validate(config)
    device = resolve_device(config.device)
    if config.fsdp:
        check_sharding()
    with joined(device, even_alone=config.fsdp) as world:
        return _train(config, device, world, on_event, should_stop or (lambda: False), wishes, started)


def _train(
    config: DreamBoothConfig,
    device: torch.device,
    world: World,
    on_event: OnEvent | None,
    should_stop: Callable[[], bool],
    wishes: Callable[[], set[str]] | None,
    started: float,
) -> Result:
    trackers = check_trackers(config.report_to)
    folder = RunFolder(config.output_dir, on_event, writes=world.main)
    folder.check_usable(resuming=config.resume_from_checkpoint is not None, overwrite=config.overwrite)
    config = replace(config, mixed_precision=resolve_precision(config.mixed_precision, device))
    photos = read_photos(config)
    judges = judges_of(config) if world.main else None
    meter = MemoryMeter(device)
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    pipe = load_pipeline(
        config.pretrained_model_name_or_path,
        precision=config.mixed_precision,
        device=device,
        revision=config.revision,
        variant=config.variant,
        quantize=config.quantize,
        quantize_text_encoders=config.train_text_encoder,
    )
    config = resolve(config, pipe, len(photos.paths), world.size)
    saver = Saver(folder, config, pipe, world)
    checkpoint = saver.find_checkpoint()
    objective = objective_of(
        pipe.scheduler,
        zero_snr=config.rescale_betas_zero_snr,
        first=config.min_timestep,
        last=config.max_timestep,
    )
    weighting_of(config).check(objective.prediction)
    text_states(config, pipe, photos)  # a text too long shows itself here
    if checkpoint is not None:
        check_same_run(checkpoint, config, world.size, saver.units)
    resumed = {"the checkpoint": checkpoint and checkpoint.name, "PyTorch's version": str(torch.__version__)}
    world.agree({**{f"--{name}": value for name, value in deciding(config).items()}, "--fsdp": config.fsdp, **resumed})
    folder.open(to_dict(config), fresh=checkpoint is None, overwrite=config.overwrite)
    world.wait()  # what an earlier run left is gone
    run = Run(config, pipe, folder, saver, device, meter, should_stop, judges, world)
    run.wishes = wishes
    with told(folder, lambda: _out_of_memory(config)):
        tracking = Trackers(trackers if world.main else [], folder.path / config.logging_dir, to_dict(config))
        try:
            return run.go(photos, objective, checkpoint, tracking, started)
        except StoppedEarly:
            folder.emit("end", stopped=True, step=0, adapter=None, seconds=seconds_since(started))
            return Result(folder.path, None, 0, math.nan, True, 0.0, seconds_since(started), meter.peak())
        finally:
            tracking.finish()


def resolve(config: DreamBoothConfig, pipe: Any, photo_count: int, processes: int = 1) -> DreamBoothConfig:
    """The config with every default filled in from the model and the number of photos.

    Raises:
        ConfigError: a resolution or a bucket that the model's autoencoder cannot halve often enough.
    """
    factor = int(pipe.vae_scale_factor)
    family = family_of(pipe)
    if config.text_encoder_2_lr is not None and len(family.text_encoders) < 2:
        raise ConfigError("--text_encoder_2_lr is for models with two text encoders; this one has one, so leave it out")
    size = family.denoiser_of(pipe).config.sample_size
    native = (size if isinstance(size, int) else min(size)) * factor
    resolution = config.resolution or native
    if resolution % factor:
        raise ConfigError(
            f"--resolution {resolution} is not a multiple of {factor}; "
            f"the nearest is {max(1, round(resolution / factor)) * factor}"
        )
    bucket_sizes(config, resolution, factor)
    epoch = photo_count
    pictures = config.with_prior_preservation and config.prior_mode == "pictures"
    if pictures:
        epoch = max(epoch, config.num_class_images)
    steps_per_epoch = math.ceil(epoch / (config.train_batch_size * config.gradient_accumulation_steps * processes))
    steps = config.max_train_steps
    if steps is None:
        steps = DEFAULT_STEPS if config.num_train_epochs is None else config.num_train_epochs * steps_per_epoch
    class_dir = config.class_data_dir
    if pictures and class_dir is None:
        class_dir = str(Path(config.output_dir) / "class_images")
    return replace(
        config,
        resolution=resolution,
        max_train_steps=steps,
        lora_alpha=float(config.rank) if config.lora_alpha is None else config.lora_alpha,
        class_data_dir=class_dir,
        validation_steps=config.validation_steps or config.validation_epochs * steps_per_epoch,
    )


def _out_of_memory(config: DreamBoothConfig) -> str:
    advice = [] if config.gradient_checkpointing else ["--gradient_checkpointing"]
    if config.train_batch_size > 1:
        advice.append("a smaller --train_batch_size with more --gradient_accumulation_steps")
    advice += ["a smaller --resolution"]
    return (
        f"out of memory at {config.resolution} px, batch {config.train_batch_size}, {config.mixed_precision}; "
        f"try {', '.join(advice)}; go on with --resume_from_checkpoint latest"
    )
