"""The pictures of a DreamBooth run: photos checked, class pictures drawn where they are missing, all encoded."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_diffusion.errors import ConfigError, DatasetError
from train import prior
from train.augment import Crop, crops
from train.buckets import bucket_sizes, nearest
from train.captions import Caption, read_captions, unused_texts
from train.distributed import ALONE, World
from train.dreambooth_config import DreamBoothConfig
from train.images import Picture, fingerprint, list_images, other_pictures, read_pictures
from train.latents import LatentBank, encode
from train.masks import alpha_mask, find_masks, read_mask
from train.models import PRECISIONS, load_pipeline
from train.prompts import EVERYDAY_WORDS, words_of
from train.randomness import Draws
from train.record import RunFolder
from train.saving import model_label
from train.templates import check_templates, templates_of, variants
from train.text_states import TextStates

MUCH_ENLARGED = 1.5  # pictures that have to grow by more than this get a warning


class StoppedEarly(Exception):
    """Training was asked to stop while its data was still being prepared."""


@dataclass(frozen=True)
class Photos:
    """The photos of the subject, all read once; they are read again when it is their turn to be encoded.

    Attributes:
        paths: their files.
        texts: for each photo, what may be said of it; one is drawn each time it comes up.
        sources: for each photo, where its caption stands; empty if nothing but `--instance_prompt` is said of any.
        masks: their mask files, with `--mask_dir`.
        remarks: what the user should hear before training starts.
        may_be_silent: with caption dropout, the empty text is said, too.
    """

    paths: list[Path]
    texts: list[tuple[str, ...]]
    sources: list[str]
    masks: list[Path]
    remarks: list[str]
    may_be_silent: bool = False

    def add_texts(self, texts: TextStates) -> None:
        """Make all texts known to `texts`.

        Raises:
            DatasetError: one is too long; the message names the file that it comes from.
        """
        for number, each in enumerate(self.texts):
            try:
                texts.add(each)
            except ConfigError as problem:
                if not self.sources:
                    raise
                raise DatasetError(f"{self.sources[number]}: {problem}") from problem
        if self.may_be_silent:
            texts.add([""])


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
    """Check photos, captions and masks; a file that cannot be used is an error here, before any model is loaded.

    Raises:
        ConfigError: a template that cannot be used.
        DatasetError: no folder, no photo, or a file that cannot be used.
    """
    paths = list_images(config.instance_data_dir)
    templates = templates_of(config.caption_template, config.caption_template_file)
    check_templates(templates, config.subject_token)
    prompt = Caption(config.instance_prompt, "--instance_prompt")
    found = []
    if not config.ignore_captions:
        fallback = prompt if config.caption_fallback else None
        found = read_captions(paths, column=config.caption_column, fallback=fallback)
    if found and not any("{caption}" in template for template in templates):
        raise ConfigError(
            f"the pictures have captions ({found[0].source}), and the caption templates do not use them; write "
            "{caption} in one, or give --ignore_captions"
        )
    draws = Draws(config.seed)
    texts = [
        variants(
            caption.text, templates, subject=config.subject_token, shuffle=config.shuffle_caption,
            keep=config.keep_tokens, draws=draws, stream=f"instance/tags/{number}",
        )
        for number, caption in enumerate(found or [prompt] * len(paths))
    ]  # fmt: skip
    masks = find_masks(paths, Path(config.mask_dir)) if config.mask_dir is not None else []
    remarks = _unused_files(config, paths)
    for number, picture in enumerate(_read(paths, config.dataloader_num_workers)):
        remarks += picture.remarks
        _mask_of(config, picture, paths[number], masks[number] if masks else None)
    sources = [caption.source for caption in found]
    return Photos(
        paths, texts, sources, masks, remarks + _without_subject(config, texts, sources),
        may_be_silent=config.caption_dropout_rate > 0,
    )  # fmt: skip


def prepare_class_images(
    config: DreamBoothConfig, pipe: Any, device: torch.device, folder: RunFolder, should_stop: Callable[[], bool],
    world: World = ALONE,
) -> list[Path]:  # fmt: skip
    """The files of the class pictures; missing ones are drawn by the base model first, by each process its share.

    Raises:
        StoppedEarly: `should_stop` said so while drawing; what is drawn stays.
    """
    if not config.with_prior_preservation:
        return []
    place = Path(config.class_data_dir or folder.class_images)
    prior.check_drawn_for(place, config.class_prompt or "", model_label(config.pretrained_model_name_or_path))
    numbers = prior.missing(place, config.num_class_images)
    world.wait()  # all have seen what is missing before the first picture comes
    if numbers:
        painter = _painter(config, pipe, device)
        prior.draw_missing(
            painter,
            place,
            config.class_prompt or "",
            [number for number in numbers if number // config.sample_batch_size % world.size == world.rank],
            seed=config.seed,
            steps=config.prior_generation_steps,
            batch_size=config.sample_batch_size,
            model=model_label(config.pretrained_model_name_or_path),
            on_progress=lambda done, total: folder.emit("prepare", what="class pictures", done=done, total=total),
            should_stop=should_stop,
        )
        if world.any(should_stop()):
            raise StoppedEarly
    return prior.existing(place)[: config.num_class_images]


def encode_data(
    config: DreamBoothConfig, pipe: Any, photos: Photos, class_paths: list[Path], folder: RunFolder,
    world: World = ALONE,
) -> Data:  # fmt: skip
    """Crop all pictures to the training resolution, or to the nearest bucket, and encode them.

    Raises:
        DatasetError: a class picture cannot be read.
    """
    instance = _bank(config, pipe, photos.paths, photos.texts, photos.masks, "instance", folder, world)
    total = _fingerprint_of(photos)
    if not class_paths:
        return Data(instance, None, total)
    both = hashlib.sha256((total + fingerprint(class_paths)).encode()).hexdigest()
    said: list[tuple[str, ...]] = [(config.class_prompt or "",)] * len(class_paths)
    return Data(instance, _bank(config, pipe, class_paths, said, [], "prior", folder, world), both)


def _bank(
    config: DreamBoothConfig,
    pipe: Any,
    paths: list[Path],
    texts: list[tuple[str, ...]],
    masks: list[Path],
    stream: str,
    folder: RunFolder,
    world: World,
) -> LatentBank:
    draws = Draws(config.seed)
    buckets = bucket_sizes(config, config.resolution or 0, int(pipe.vae_scale_factor))
    used: Counter[tuple[int, int]] = Counter()
    small: list[Path] = []

    def cropped() -> Iterator[list[Crop]]:
        for number, picture in enumerate(_read(paths, config.dataloader_num_workers)):
            size = nearest(picture.image.size, buckets)
            used[size] += 1
            if max(want / have for want, have in zip(size, picture.image.size)) > MUCH_ENLARGED:
                small.append(paths[number])
            mask = None
            if stream == "instance":
                mask = _mask_of(config, picture, paths[number], masks[number] if masks else None)
            generator = draws.at(f"{stream}/crops", number)
            try:
                yield crops(
                    picture.image, size, center=config.center_crop, generator=generator, flip=config.random_flip,
                    mask=mask, unmasked_weight=config.unmasked_weight,
                )  # fmt: skip
            except DatasetError as problem:
                raise DatasetError(f"{masks[number] if masks else paths[number]}: {problem}") from problem

    what = {"instance": "photos encoded", "prior": "class pictures encoded"}[stream]
    pictures = encode(
        pipe.vae, cropped(), on_picture=lambda done: folder.emit("prepare", what=what, done=done, total=len(paths))
    )
    if len(buckets) > 1:
        listed = ", ".join(f"{count} at {width}×{height}" for (width, height), count in sorted(used.items()))
        folder.emit("note", message=f"{what} in {len(used)} of {len(buckets)} buckets: {listed}")
    if small:
        folder.emit(
            "warning",
            message=f"{len(small)} of {len(paths)} pictures are much smaller than they are trained at, so that what is "
            f"learned will be blurred: {_some(small)}; take larger ones, or a smaller --resolution",
        )
    return LatentBank(
        pictures,
        texts,
        float(pipe.vae.config.scaling_factor),
        stream,
        group=config.train_batch_size * config.gradient_accumulation_steps * world.size,
        flipped=config.random_flip,
        dropout=config.caption_dropout_rate if stream == "instance" else 0.0,
    )


def _read(paths: Sequence[Path], threads: int) -> Iterator[Picture]:
    """The pictures one after the other, never more of them in memory than there are threads."""
    step = max(1, threads)
    for start in range(0, len(paths), step):
        yield from read_pictures(paths[start : start + step], threads)


def _mask_of(config: DreamBoothConfig, picture: Picture, path: Path, mask: Path | None) -> Image.Image | None:
    if mask is not None:
        return read_mask(mask, path, picture.image.size)
    return alpha_mask(picture, path) if config.alpha_mask else None


def _fingerprint_of(photos: Photos) -> str:
    """Over the photos, and over captions, templates and masks where there are any."""
    pictures = fingerprint(photos.paths)
    if not photos.sources and not photos.masks and all(len(texts) == 1 for texts in photos.texts):
        return pictures
    rest = json.dumps([photos.texts, fingerprint(photos.masks) if photos.masks else None])
    return hashlib.sha256((pictures + rest).encode()).hexdigest()


def _unused_files(config: DreamBoothConfig, paths: list[Path]) -> list[str]:
    remarks = []
    others = other_pictures(config.instance_data_dir)
    if others:
        what = "1 file is not used, since its" if len(others) == 1 else f"{len(others)} files are not used, since their"
        remarks.append(f"{what} kind cannot be read: {_some(others)}")
    texts = [] if config.ignore_captions else unused_texts(paths)
    if texts:
        one = len(texts) == 1
        what = "1 text file is" if one else f"{len(texts)} text files are"
        remarks.append(f"{what} not used, since no picture has {'its' if one else 'their'} name: {_some(texts)}")
    return remarks


def _without_subject(config: DreamBoothConfig, texts: list[tuple[str, ...]], sources: list[str]) -> list[str]:
    """A remark where captions do not hold the subject's word, which is then not learned as its name."""
    rare = set(words_of(config.subject_token or config.instance_prompt))
    rare = rare if config.subject_token else rare - EVERYDAY_WORDS
    lacking = [
        source
        for each, source in zip(texts, sources)
        if any(not rare.intersection(words_of(text)) for text in each)
    ]  # fmt: skip
    if not lacking or not rare:
        return []
    return [
        f"{len(lacking)} of {len(texts)} captions do not hold the subject's word ({', '.join(sorted(rare))}), so that "
        f"it will not be the subject's name: {_some(lacking)}; --caption_template "
        f"'{{caption}}, {config.instance_prompt}' adds it"
    ]


def _some(items: Sequence[Any], most: int = 3) -> str:
    return ", ".join(map(str, items[:most])) + (", …" if len(items) > most else "")


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
