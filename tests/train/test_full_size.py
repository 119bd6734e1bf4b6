"""The real thing but for its weights: Stable Diffusion 1.5's architecture, 512×512, real photos, one step."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import lora_diffusion as ld
from train.checkpoints import steps_in
from train.dreambooth import train
from train.dreambooth_config import DreamBoothConfig
from train.record import read_events

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "dreambooth" / "dog"
pytestmark = pytest.mark.slow


@pytest.fixture
def stable_diffusion_15(tiny_pipeline_dir: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder with a pipeline of SD 1.5's shapes and random bf16 weights (2.1 GB; removed afterwards)."""
    folder = tmp_path / "sd15"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            sample_size=512,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, eos_token_id=513
            )
        ).to(torch.bfloat16)
    finally:
        torch.set_default_dtype(before)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964  # as in SD 1.5
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(tiny_pipeline_dir / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    del pipeline, unet, vae, text_encoder
    gc.collect()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"the photos are not in {PHOTOS}")
def test_one_checkpointed_step_at_512(stable_diffusion_15: Path, tmp_path: Path) -> None:
    config = DreamBoothConfig(
        str(stable_diffusion_15),
        str(PHOTOS),
        "a photo of sks dog",
        output_dir=str(tmp_path / "run"),
        max_train_steps=1,
        checkpointing_steps=1,
        gradient_checkpointing=True,
        train_text_encoder=True,
        mixed_precision="bf16",
        center_crop=True,
    )
    result = train(config)
    events = read_events(result.output_dir / "events.jsonl")
    start, gradients = (next(one for one in events if one["event"] == kind) for kind in ("start", "gradients"))
    assert start["resolution"] == 512 and start["photos"] == 5
    assert gradients["layers"] == 128 + 48 and gradients["without"] == 0
    assert result.steps == 1 and math.isfinite(result.loss)
    assert list(steps_in(result.output_dir / "checkpoints")) == [1]
    assert result.adapter is not None
    adapter = ld.read_adapter(result.adapter)
    assert {name: len(layers) for name, layers in adapter.components.items()} == {"unet": 128, "text_encoder": 48}
    assert result.adapter.stat().st_size < 9e6
    print(f"{result.seconds_training:.0f} s for the step, {result.peak_memory_bytes / 2**30:.1f} GiB at most")
