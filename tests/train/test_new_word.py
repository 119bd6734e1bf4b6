"""A new word for the subject, learned as vectors: alone (textual inversion) and beside layers (pivotal tuning)."""

from __future__ import annotations

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
from train.dreambooth import Result, train
from train.dreambooth_checks import validate
from train.dreambooth_config import DreamBoothConfig
from train.models import load_pipeline
from train.record import read_events
from train.sampling import generate

Make = Callable[..., DreamBoothConfig]
WORD = {"placeholder_token": "<sks>", "instance_prompt": "a photo of <sks>", "initializer_token": "dog",
        "num_vectors": 2, "token_learning_rate": 0.05}  # fmt: skip


def vectors(result: Result) -> torch.Tensor:
    assert result.adapter is not None
    return ld.read_adapter(result.adapter).tokens["<sks>"]["text_encoder"]


def start(pipeline_dir: Path) -> torch.Tensor:
    pipe = load_pipeline(str(pipeline_dir))
    ids = pipe.tokenizer("dog", add_special_tokens=False).input_ids
    return pipe.text_encoder.get_input_embeddings().weight[ids].mean(dim=0)


@pytest.mark.parametrize("settings", [{"only_token": True}, {}, {"train_text_encoder": True}])
def test_it_learns_and_draws_the_same_in_diffusers(
    make_config: Make, tiny_pipeline_dir: Path, settings: dict[str, Any]
) -> None:
    result = train(make_config(**WORD, **settings, learning_rate=1e-2, text_encoder_lr=1e-2))
    assert result.adapter is not None
    assert (vectors(result) - start(tiny_pipeline_dir)).abs().max() > 0.01
    adapter = ld.read_adapter(result.adapter)
    assert (adapter.layer_count() == 0) == bool(settings.get("only_token"))
    ours = load_pipeline(str(tiny_pipeline_dir))
    plain = generate(ours, "<sks> dog", [1, 2], steps=4)
    report = ld.load_adapter(ours, result.adapter)
    assert report.tokens == ["<sks>"] and report.trigger_words[0] == "<sks>"
    theirs = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_textual_inversion(str(result.output_dir / "embeddings" / "<sks>.safetensors"))
    if adapter.layer_count():
        theirs.load_lora_weights(str(result.output_dir), weight_name="adapter.safetensors")
    left, right, base = (
        np.stack([np.asarray(image, dtype=int) for image in images])
        for images in (
            generate(ours, "<sks> dog", [1, 2], steps=4),
            generate(theirs, "<sks> dog", [1, 2], steps=4),
            plain,
        )
    )
    assert np.abs(left - right).max() <= 1
    assert np.abs(left - base).max() > 1


def test_it_rests_after_its_share_and_resumes_exactly(make_config: Make) -> None:
    settings = {**WORD, "max_train_steps": 6, "checkpointing_steps": 2, "train_text_encoder_ti_frac": 0.5}
    whole = train(make_config("whole", **settings))
    half = train(make_config("half", **{**settings, "max_train_steps": 3, "train_text_encoder_ti_frac": 1.0}))
    assert torch.equal(vectors(whole), vectors(half)), "after half of the steps the word is left alone"
    for name, at in (("early", 2), ("late", 4)):
        config = make_config(name, **settings)
        seen: list[int] = []
        train(config, on_event=lambda e, seen=seen: seen.append(e["step"]) if e["event"] == "step" else None,
              should_stop=lambda seen=seen, at=at: bool(seen) and seen[-1] >= at)  # fmt: skip
        again = train(replace(config, resume_from_checkpoint="latest"))
        assert again.adapter and whole.adapter and again.adapter.read_bytes() == whole.adapter.read_bytes()


def test_its_rate_is_told(make_config: Make) -> None:
    result = train(make_config(**WORD, max_train_steps=1))
    step = next(e for e in read_events(result.output_dir / "events.jsonl") if e["event"] == "step")
    assert step["lr/text_encoder/word"] == 0.05


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"placeholder_token": "<sks>"}, "is not a word of --instance_prompt"),
        ({"initializer_token": "dog"}, "needs --placeholder_token"),
        ({"only_token": True}, "needs --placeholder_token"),
        ({**WORD, "only_token": True, "train_text_encoder": True}, "exclude each other"),
        ({**WORD, "only_token": True, "train_text_encoder_ti_frac": 0.5}, "cannot rest"),
        ({**WORD, "pre_compute_text_embeddings": True}, "while a word is being learned"),
    ],
)
def test_mistakes(make_config: Make, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(make_config(**settings))
