"""Loading: which families there are, in which precision; Stable Diffusion 2.x as its files say it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

import lora_diffusion as ld
from lora_diffusion import ConfigError, ModelNotFoundError
from train import models
from train.dreambooth import train
from train.dreambooth_config import DreamBoothConfig
from train.families import FAMILIES, family_of
from train.models import load_pipeline
from train.objective import NoiseSchedule
from train.sampling import generate

Make = Callable[..., DreamBoothConfig]


def pictures(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("fp16", torch.float16)])
def test_every_part_is_frozen_and_in_the_precision_asked_for(
    tiny_sdxl_dir: Path, precision: str, dtype: torch.dtype
) -> None:
    pipe = load_pipeline(str(tiny_sdxl_dir), precision=precision)
    modules = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]
    assert {module.dtype for module in modules} == {dtype}
    assert not any(module.training for module in modules)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert pipe.watermark is None
    family = family_of(pipe)
    assert family.trained(text_encoders=True) == ["unet", "text_encoder", "text_encoder_2"]
    assert family.trained(text_encoders=False) == ["unet"]


@pytest.mark.parametrize("kind", ["StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionInpaintPipeline", None])
def test_other_families_are_refused(tmp_path: Path, kind: str | None) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    known = r".*2\.x \(StableDiffusionPipeline\) and .* XL \(StableDiffusionXLPipeline\) are supported"
    with pytest.raises(ConfigError, match=f"is a {kind!r}; {known}"):
        load_pipeline(str(tmp_path))
    with pytest.raises(ConfigError, match="a dict is not supported"):
        family_of({})


def test_a_pipeline_without_one_of_its_encoders(tiny_sdxl_dir: Path, tmp_path: Path) -> None:
    index = json.loads((tiny_sdxl_dir / "model_index.json").read_text())
    for part in tiny_sdxl_dir.iterdir():
        if part.is_dir() and part.name != "text_encoder":
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    with pytest.raises(ConfigError, match="has no text_encoder, which a StableDiffusionXLPipeline needs"):
        load_pipeline(str(tmp_path))


def test_the_hub_is_asked_for_the_index_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def index(place: str, **options: Any) -> dict[str, Any]:
        asked.append({"place": place, **options})
        if options.get("local_files_only"):
            raise OSError("not in the cache")
        return {"_class_name": "FluxPipeline"}

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", index)
    with pytest.raises(ConfigError, match="owner/name is a 'FluxPipeline'"):
        load_pipeline("owner/name", revision="main")
    assert asked == [
        {"place": "owner/name", "local_files_only": True, "revision": "main"},
        {"place": "owner/name", "revision": "main"},
    ]

    def nothing(place: str, **options: Any) -> dict[str, Any]:
        raise OSError("no\nnetwork")

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", nothing)
    with pytest.raises(ModelNotFoundError, match=r"cannot be fetched from the hub; .*no network"):
        load_pipeline("owner/name")


def test_every_family_says_what_loads_it() -> None:
    import diffusers

    for family in FAMILIES.values():
        assert issubclass(getattr(diffusers, family.pipeline), diffusers.DiffusionPipeline)
        assert family.denoiser in ("unet", "transformer")
    assert models.supported().count("Pipeline") == len(FAMILIES)


@pytest.fixture(scope="module")
def second_generation(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 2.x in small: linear projections, heads of a fixed width, v-prediction."""
    folder = tmp_path_factory.mktemp("second_generation")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            norm_num_groups=8,
        )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    pipe.save_pretrained(folder)
    return folder


def test_stable_diffusion_2(second_generation: Path, make_config: Make) -> None:
    pipe = load_pipeline(str(second_generation))
    assert NoiseSchedule.of(pipe.scheduler).prediction == "v_prediction"
    result = train(
        make_config(
            pretrained_model_name_or_path=str(second_generation), train_text_encoder=True, learning_rate=2e-2,
            text_encoder_lr=2e-2, validation_prompt="sks dog", num_validation_images=1, validation_inference_steps=2,
        )
    )  # fmt: skip
    assert result.adapter and len(result.samples) == 1
    base = pictures(generate(pipe, "sks dog", [1, 2], steps=3))
    ld.load_adapter(pipe, result.adapter)
    theirs = StableDiffusionPipeline.from_pretrained(second_generation, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(result.adapter.parent, weight_name=result.adapter.name)
    ours, others = (pictures(generate(one, "sks dog", [1, 2], steps=3)) for one in (pipe, theirs))
    assert np.abs(ours - others).max() <= 1
    assert np.abs(ours - base).max() > 8
