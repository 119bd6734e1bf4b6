"""Whole runs on a tiny Stable Diffusion XL: two text encoders, sizes as conditioning, an autoencoder for fp32 only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

import lora_diffusion as ld
from lora_diffusion import ConfigError, TrainingError
from train.dreambooth import resolve, train
from train.dreambooth_checks import validate
from train.dreambooth_config import DreamBoothConfig
from train.families import family_of
from train.images import list_images
from train.models import load_pipeline
from train.record import read_events
from train.sample import sample
from train.sample_config import SampleConfig
from train.sampling import generate

Make = Callable[..., DreamBoothConfig]
ENCODERS = {"train_text_encoder": True, "text_encoder_lr": 2e-2, "learning_rate": 2e-2}


def pictures(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == kind]


def test_the_denoiser_alone(make_sdxl_config: Make) -> None:
    result = train(make_sdxl_config(validation_prompt="sks dog", num_validation_images=2, validation_inference_steps=2))
    assert result.adapter and result.steps == 4 and math.isfinite(result.loss)
    assert list(ld.read_adapter(result.adapter).components) == ["unet"]
    assert [path.name for path in result.samples] == ["step-000004-0.png", "step-000004-1.png"]
    assert Image.open(result.samples[0]).size == (32, 32)
    assert not events_of(result.output_dir, "warning")


def test_both_text_encoders_learn_and_diffusers_draws_the_same(make_sdxl_config: Make, tiny_sdxl_dir: Path) -> None:
    result = train(make_sdxl_config(**ENCODERS, lora_alpha=16.0, text_encoder_2_lr=1e-2, gradient_checkpointing=True))
    assert result.adapter
    adapter = ld.read_adapter(result.adapter)
    assert sorted(adapter.components) == ["text_encoder", "text_encoder_2", "unet"]
    layers = {
        name: {path.split("layers.")[1][0] for path in adapter.components[name]}
        for name in ("text_encoder", "text_encoder_2")
    }
    assert layers == {"text_encoder": {"0"}, "text_encoder_2": {"0", "1", "2"}}
    for component in adapter.components.values():
        assert all(float(layer.b.abs().max()) > 0 for layer in component.values())
    step = events_of(result.output_dir, "step")[0]
    assert (step["lr"], step["text_encoder_lr"], step["text_encoder_2_lr"]) == (2e-2, 2e-2, 1e-2)
    gradients = events_of(result.output_dir, "gradients")[0]
    assert gradients["layers"] == adapter.layer_count() and gradients["without"] == 0

    ours = load_pipeline(str(tiny_sdxl_dir))
    base = pictures(generate(ours, "sks dog", [1, 2], steps=3))
    ld.load_adapter(ours, result.adapter)
    theirs = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_dir, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(result.output_dir, weight_name="adapter.safetensors")
    assert {len(theirs.get_list_adapters()[part]) for part in ("unet", "text_encoder", "text_encoder_2")} == {1}
    mine, other = (pictures(generate(one, "sks dog", [1, 2], steps=3)) for one in (ours, theirs))
    assert np.abs(mine - other).max() <= 1
    assert np.abs(mine - base).max() > 8


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_each_encoder_has_its_share_in_the_picture(
    make_sdxl_config: Make, tiny_sdxl_dir: Path, tmp_path: Path, part: str
) -> None:
    """A file with one component only: if the conditioning did not depend on it, nothing would change."""
    adapter = ld.read_adapter(train(make_sdxl_config(**ENCODERS, max_train_steps=2, lora_alpha=64.0)).adapter or "")
    pipe = load_pipeline(str(tiny_sdxl_dir))
    base = pictures(generate(pipe, "sks dog", [1], steps=2))
    ld.load_adapter(pipe, replace(adapter, components={part: adapter.components[part]}, configs={}, bases={}))
    assert np.abs(pictures(generate(pipe, "sks dog", [1], steps=2)) - base).max() > 1


def test_resumed_with_everything_on_it_is_the_same_to_the_byte(make_sdxl_config: Make) -> None:
    settings = {
        **ENCODERS, "max_train_steps": 4, "checkpointing_steps": 2, "lora_dropout": 0.2, "train_batch_size": 2,
        "lr_scheduler": "cosine", "with_prior_preservation": True, "class_prompt": "a photo of a dog",
        "num_class_images": 2, "prior_generation_steps": 1, "caption_dropout_rate": 0.4,
    }  # fmt: skip
    whole = train(make_sdxl_config("whole", **settings))
    drawn = list_images(whole.output_dir / "class_images")
    assert [path.name for path in drawn] == ["class_0000.png", "class_0001.png"]
    config = make_sdxl_config("parts", **settings)
    reached: list[int] = []
    stopped = train(
        config,
        on_event=lambda event: reached.append(event["step"]) if event["event"] == "step" else None,
        should_stop=lambda: bool(reached) and reached[-1] >= 2,
    )
    assert stopped.stopped and stopped.steps == 2
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert whole.adapter and resumed.adapter and resumed.steps == 4
    assert resumed.adapter.read_bytes() == whole.adapter.read_bytes()
    with pytest.raises(ConfigError, match=r"--text_encoder_2_lr was None and is 0\.5"):
        train(replace(config, resume_from_checkpoint="latest", text_encoder_2_lr=0.5))


def test_cached_states_teach_the_same_as_fresh_ones(make_sdxl_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = train(make_sdxl_config("cached"))
    monkeypatch.setattr("train.text_states.TextStates.cache", lambda self: None)
    fresh = train(make_sdxl_config("fresh"))
    assert cached.adapter and fresh.adapter
    left, right = (ld.read_adapter(path).flat() for path in (cached.adapter, fresh.adapter))
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-3, atol=1e-5)


def test_the_denoiser_is_told_the_sizes(make_sdxl_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import UNet2DConditionModel

    seen: list[Any] = []
    original = UNet2DConditionModel.forward

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(options["added_cond_kwargs"]["time_ids"])
        return original(self, *arguments, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    train(make_sdxl_config(resolution=16, max_train_steps=3, train_batch_size=2, plan=False))  # a plan calls it too
    rows = {tuple(row) for row in torch.cat(seen).tolist()}
    # The photos are squares of 32 and 36, and one of height 48 and width 40.
    assert {row[:2] for row in rows} == {(32, 32), (48, 40), (36, 36)}
    assert {row[4:] for row in rows} == {(16, 16)}
    assert all(row[2:4] == (0, 0) for row in rows if row[0] == row[1])


def test_fp16_decodes_in_fp32_where_it_would_overflow(tiny_sdxl_dir: Path) -> None:
    pipe = load_pipeline(str(tiny_sdxl_dir), precision="fp16")
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(2e4)
    before = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    assert pictures(generate(pipe, "x", [1], steps=1)).std() > 0
    assert pipe.vae.dtype == torch.float16
    assert all(torch.equal(value, before[name]) for name, value in pipe.vae.state_dict().items())
    pipe.vae.register_to_config(force_upcast=False)
    with pytest.raises(TrainingError, match="NaN"):
        generate(pipe, "x", [1], steps=1)


def test_half_precision_runs_with_previews(make_sdxl_config: Make) -> None:
    result = train(
        make_sdxl_config(
            mixed_precision="fp16", max_train_steps=2, train_text_encoder=True, validation_prompt="sks",
            num_validation_images=1, validation_steps=1, validation_inference_steps=1,
        )
    )  # fmt: skip
    assert result.adapter and math.isfinite(result.loss) and len(result.samples) == 2
    assert {value.dtype for value in ld.read_adapter(result.adapter).flat().values()} == {torch.float32}


def test_sampling_and_the_defaults(make_sdxl_config: Make, tiny_sdxl_dir: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(str(tiny_sdxl_dir))
    assert resolve(make_sdxl_config(), pipe, 3).resolution == 32
    pipe.unet.register_to_config(sample_size=256)
    assert resolve(make_sdxl_config(), pipe, 3).resolution == 1024  # a factor of 4 here, of 8 at full size
    events: list[dict[str, Any]] = []
    config = SampleConfig(
        str(tiny_sdxl_dir), ("dog " * 30, "dog"), num_inference_steps=1, output_dir=str(tmp_path / "out"),
        negative_prompt="cat",
    )  # fmt: skip
    paths = sample(config, on_event=events.append)
    assert [Image.open(path).size for path in paths] == [(32, 32)] * 2
    warned = [event["message"] for event in events if event["event"] == "warning"]
    assert len(warned) == 1 and warned[0].endswith("the rest is cut off")


def test_modes_of_all_parts_are_put_back(tiny_sdxl_dir: Path) -> None:
    pipe = load_pipeline(str(tiny_sdxl_dir))
    pipe.text_encoder_2.train()
    modes: list[bool] = []
    pipe.text_encoder_2.register_forward_hook(lambda module, *_: modes.append(module.training))
    generate(pipe, "x", [1], steps=1)
    assert modes == [False] and pipe.text_encoder_2.training and not pipe.text_encoder.training


def test_mistakes(make_sdxl_config: Make, make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--text_encoder_2_lr needs --train_text_encoder"):
        validate(make_sdxl_config(text_encoder_2_lr=1e-4))
    with pytest.raises(ConfigError, match="--text_encoder_2_lr is for models with two text encoders"):
        train(make_config(train_text_encoder=True, text_encoder_2_lr=1e-4))
    with pytest.raises(ConfigError, match="tokens, 77 is the limit"):
        train(make_sdxl_config(instance_prompt="sks " + "dog " * 40))
    with pytest.raises(ConfigError, match="--tokenizer_max_length 78 is more"):
        train(make_sdxl_config(tokenizer_max_length=78))
    (tmp_path / "sd3").mkdir()
    (tmp_path / "sd3" / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(ConfigError, match=r"is a 'StableDiffusion3Pipeline'; .* are supported"):
        train(make_sdxl_config(pretrained_model_name_or_path=str(tmp_path / "sd3")))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="not supported"):
        family_of(object())


def test_the_base_as_teacher_and_a_quantised_base(make_sdxl_config: Make) -> None:
    result = train(
        make_sdxl_config(
            **ENCODERS, with_prior_preservation=True, class_prompt="a photo of a dog", prior_mode="teacher",
            quantize="int8", max_train_steps=2,
        )
    )  # fmt: skip
    assert result.adapter and math.isfinite(result.loss)
    assert sorted(ld.read_adapter(result.adapter).components) == ["text_encoder", "text_encoder_2", "unet"]
