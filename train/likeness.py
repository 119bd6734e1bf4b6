"""Likeness and prompt following in figures, each with the scale that says what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from train.judge import Judge
from train.subjects import Ask, Subject


@torch.no_grad()
def through_autoencoder(pipe: Any, images: Sequence[Image.Image]) -> list[Image.Image]:
    """`images` encoded and decoded: the best that any picture of the model could be."""
    x = pipe.image_processor.preprocess(list(images)).to(pipe.vae.device, pipe.vae.dtype)
    decoded = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
    return pipe.image_processor.postprocess(decoded, output_type="pil")


def scale(judge: Judge, subject: Subject, pipe: Any) -> dict[str, float]:
    """What the judge gives where the answer is known: mean cosine to the subject's photos.

    `photos` is the photos among themselves, `true` the subject in other scenes, `true, through the autoencoder` the
    same decoded, `one attribute wrong` and `random of its class` what they say.
    """
    photos, true = subject.photos(), subject.sheet("true")
    return {
        "photos": judge.likeness_among(photos),
        "true": judge.likeness(true, photos),
        "true, through the autoencoder": judge.likeness(through_autoencoder(pipe, true), photos),
        "one attribute wrong": judge.likeness(subject.sheet("one_wrong"), photos),
        "half-formed": judge.likeness(subject.sheet("half_formed"), photos),
        "random of its class": judge.likeness(subject.sheet("random"), photos),
    }


def following(judge: Judge, images: Sequence[Image.Image], asks: Sequence[Ask]) -> float:
    """Share of what the prompts ask that the judge finds in the pictures, in 0..1. One `Ask` for each picture."""
    right = total = 0
    for seen, ask in zip(judge.read(images), asks, strict=True):
        right += sum(seen[name] == value for name, value in ask.asks.items())
        total += len(ask.asks)
    return right / total


def gap_closed(base: float, adapted: float, real: float) -> float:
    """How much of the way from `base` to `real` the adapter has gone: 0 nothing, 1 all of it."""
    return (adapted - base) / (real - base) if real > base else 0.0
