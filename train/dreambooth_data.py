"""The pictures of a DreamBooth run: photos read, class pictures drawn where they are missing, all encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from train import prior
from train.dreambooth_config import DreamBoothConfig
from train.dreambooth_save import model_label
from train.images import fingerprint, list_images, read_images, squares
from train.latents import LatentBank, encode
from train.models import PRECISIONS, load_pipeline
from train.randomness import Draws
from train.record import RunFolder


class StoppedEarly(Exception):
    """Training was asked to stop while its data was still being prepared."""


@dataclass(frozen=True)
class Photos:
    """The photos of the subject, upright and RGB, with the files that they come from."""

    paths: list[Path]
    images: list[Image.Image]


@dataclass(frozen=True)
class Data:
    """All that the loop needs of the pictures.

    Attributes:
        instance: the photos.
        prior: the class pictures, with prior preservation.
        fingerprint: a hash over the contents of all files, so that a resumed run can tell that they are the same.
    """

    instance: LatentBank
    prior: LatentBank | None
    fingerprint: str


def read_photos(config: DreamBoothConfig) -> Photos:
    """Read the photos; a file that cannot be used is an error here, before any model is loaded.

    Raises:
        DatasetError: no folder, no photo, or a file that is no usable picture.
    """
    paths = list_images(config.instance_data_dir)
    return Photos(paths, read_images(paths, config.dataloader_num_workers))


def prepare_class_images(
    config: DreamBoothConfig, pipe: Any, device: torch.device, folder: RunFolder, should_stop: Callable[[], bool]
) -> list[Path]:
    """The files of the class pictures; missing ones are drawn by the base model first.

    Raises:
        StoppedEarly: `should_stop` said so while drawing; what is drawn stays.
    """
    if not config.with_prior_preservation:
        return []
    place = Path(config.class_data_dir or folder.class_images)
    prior.check_drawn_for(place, config.class_prompt or "", model_label(config.pretrained_model_name_or_path))
    numbers = prior.missing(place, config.num_class_images)
    if numbers:
        painter = _painter(config, pipe, device)
        prior.draw_missing(
            painter,
            place,
            config.class_prompt or "",
            numbers,
            seed=config.seed,
            steps=config.prior_generation_steps,
            batch_size=config.sample_batch_size,
            model=model_label(config.pretrained_model_name_or_path),
            on_progress=lambda done, total: folder.emit("prepare", what="class pictures", done=done, total=total),
            should_stop=should_stop,
        )
        if should_stop():
            raise StoppedEarly
    return prior.existing(place)[: config.num_class_images]


def encode_data(
    config: DreamBoothConfig, pipe: Any, photos: Photos, class_paths: list[Path], folder: RunFolder
) -> Data:
    """Crop all pictures to the training resolution and encode them.

    Raises:
        DatasetError: a class picture cannot be read.
    """
    instance = _bank(config, pipe, photos.images, "instance", folder)
    if not class_paths:
        return Data(instance, None, fingerprint(photos.paths))
    images = read_images(class_paths, config.dataloader_num_workers)
    both = hashlib.sha256((fingerprint(photos.paths) + fingerprint(class_paths)).encode()).hexdigest()
    return Data(instance, _bank(config, pipe, images, "prior", folder), both)


def _bank(config: DreamBoothConfig, pipe: Any, images: list[Image.Image], stream: str, folder: RunFolder) -> LatentBank:
    draws = Draws(config.seed)
    side = config.resolution or 0
    pictures = [
        squares(image, side, center=config.center_crop, generator=draws.at(f"{stream}/crops", number))
        for number, image in enumerate(images)
    ]
    prompt = {"instance": config.instance_prompt, "prior": config.class_prompt or ""}[stream]
    what = {"instance": "photos encoded", "prior": "class pictures encoded"}[stream]
    return encode(
        pipe.vae,
        pictures,
        [prompt] * len(pictures),
        stream,
        on_progress=lambda done, total: folder.emit("prepare", what=what, done=done, total=total),
    )


def _painter(config: DreamBoothConfig, pipe: Any, device: torch.device) -> Any:
    """The pipeline that draws class pictures: the training one, or a second one where another precision is wanted.

    Not the training one cast there and back, which would round its weights.
    """
    wanted = config.prior_generation_precision
    if wanted is None or PRECISIONS[wanted] == PRECISIONS[config.mixed_precision]:
        return pipe
    return load_pipeline(
        config.pretrained_model_name_or_path,
        precision=wanted,
        device=device,
        revision=config.revision,
        variant=config.variant,
    )
