"""The settings that say what kind of adapter is trained: what they make, that it resumes, that diffusers reads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import lora_diffusion as ld
from lora_diffusion import ConfigError
from train.dreambooth import resolve, train
from train.dreambooth_checks import validate
from train.dreambooth_config import DreamBoothConfig
from train.dreambooth_learn import build_learner
from train.record import read_events
from train.sampling import generate

Make = Callable[..., DreamBoothConfig]

KINDS = [
    {"use_dora": True},
    {"use_rslora": True, "lora_alpha": 4.0},
    {"init_lora_weights": "pissa", "rank": 4},
    {"init_lora_weights": "orthogonal"},
]


def names(changes: dict[str, Any]) -> str:
    return next(iter(changes)) + str(next(iter(changes.values())))


@pytest.mark.parametrize("changes", KINDS, ids=names)
def test_trained_resumed_and_read_by_diffusers(
    make_config: Make, tiny_pipeline: Any, tiny_pipeline_dir: Path, changes: dict[str, Any]
) -> None:
    settings = {"max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-2, **changes}
    plain = train(make_config("plain", max_train_steps=4, learning_rate=1e-2))
    whole = train(make_config("whole", **settings))
    config = make_config("parts", **settings)
    reached: list[int] = []
    train(
        config,
        on_event=lambda event: reached.append(event["step"]) if event["event"] == "step" else None,
        should_stop=lambda: bool(reached) and reached[-1] >= 2,
    )
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert plain.adapter and whole.adapter and resumed.adapter
    assert resumed.adapter.read_bytes() == whole.adapter.read_bytes() != plain.adapter.read_bytes()

    theirs = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    base = generate(theirs, "sks dog", [1, 2], steps=3)
    theirs.load_lora_weights(whole.output_dir, weight_name="adapter.safetensors")
    ld.load_adapter(tiny_pipeline, whole.adapter)
    drawn = [generate(pipe, "sks dog", [1, 2], steps=3) for pipe in (tiny_pipeline, theirs)]
    ours, others, plainly = (np.stack([np.asarray(one, dtype=int) for one in images]) for images in (*drawn, base))
    assert np.abs(ours - others).max() <= 1
    assert np.abs(ours - plainly).max() > 1


def test_what_they_make(make_config: Make, tiny_pipeline: Any) -> None:
    config = make_config(use_dora=True, use_rslora=True, rank=4, lora_alpha=8.0, target_modules="to_q")
    build_learner(resolve(config, tiny_pipeline, 3), tiny_pipeline, torch.device("cpu"))
    layers = ld.get_adapter(tiny_pipeline).components["unet"]
    assert len(layers) == 8
    assert all(layer.magnitude is not None and layer.scale == 8.0 / math.sqrt(4) for layer in layers.values())


def test_mistakes(make_config: Make) -> None:
    with pytest.raises(ConfigError, match="--init_lora_weights"):
        validate(make_config(init_lora_weights="loftq"))
    with pytest.raises(ConfigError, match="rank 200 is more than"):
        train(make_config(init_lora_weights="pissa", rank=200))


def test_a_rank_beyond_a_layers_width_is_said(make_config: Make) -> None:
    result = train(make_config(rank=48, max_train_steps=1))
    said = [e["message"] for e in read_events(result.output_dir / "events.jsonl") if e["event"] == "warning"]
    assert any("--rank is more than" in text and "is 32" in text for text in said)
    quiet = train(make_config("quiet", rank=4, max_train_steps=1))
    said = [e["message"] for e in read_events(quiet.output_dir / "events.jsonl") if e["event"] == "warning"]
    assert not any("--rank" in text for text in said)
