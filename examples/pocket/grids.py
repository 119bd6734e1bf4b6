"""Pictures of what the model draws now: python grids.py --work ~/pocket --out grid.png"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

PROMPTS = (
    "a photo of a creature on a beach",
    "a photo of a green creature with three eyes in the snow",
    "a photo of a half purple and yellow creature with antennae on a white background",
    "a photo of a striped red and blue creature at night",
    "a photo of a red cup in the desert",
    "a photo of a zigzag white and blue cup in a forest",
    "a photo of a blue house in a meadow",
    "a photo of a yellow car in a city",
    "a photo of a pink flower in a meadow",
    "a photo of an orange fish under water",
    "a photo of a green tree at sunset",
    "a photo of a yellow star in space",
    "a photo of a red heart on a pink background",
    "a photo of a red mushroom in a forest",
    "a photo of a small blue creature on the left on a yellow background",
    "a photo of an orange creature and a blue house in the snow",
)


def assemble(work: Path) -> StableDiffusionPipeline:
    """The pipeline as it stands in a work folder, averaged weights first."""
    from train_unet import SCHEDULER

    def pick(name: str) -> Path:
        averaged = work / f"{name}-average"
        return averaged if averaged.exists() else work / name

    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(pick("text_encoder"), dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(pick("unet")),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sheet(images: list[Image.Image], columns: int, zoom: int = 2) -> Image.Image:
    """Pictures of one size side by side, `columns` in a row."""
    w, h = images[0].size
    rows = (len(images) + columns - 1) // columns
    out = Image.new("RGB", (columns * (w + 2), rows * (h + 2)), "white")
    for k, image in enumerate(images):
        out.paste(image, ((k % columns) * (w + 2), (k // columns) * (h + 2)))
    return out.resize((out.width * zoom, out.height * zoom), Image.Resampling.NEAREST)


def draw_grid(work: Path, out: Path, each: int = 2) -> None:
    """Draw PROMPTS `each` times at fixed seeds."""
    pipe = assemble(work)
    pipe.set_progress_bar_config(disable=True)
    prompts = [p for p in PROMPTS for _ in range(each)]
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    images = pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generators).images
    sheet(images, 8).save(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw_grid(args.work, args.out, each=4)
