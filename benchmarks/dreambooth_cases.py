"""What is trained in the DreamBooth benchmark: models, pictures, and the settings of each row."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT.parent / "shared" / "data" / "dreambooth"
POCKET = ROOT / "examples" / "pocket"


@dataclass(frozen=True)
class Case:
    """model: "pocket" or "sd15", Stable Diffusion 1.5's architecture with random weights; resolution in pixels."""

    model: str
    resolution: int
    batch: int = 1
    text_encoder: bool = False
    prior: bool = False
    checkpointing: bool = False
    precision: str = "no"
    quantize: str | None = None
    steps: int = 5
    rank: int = 8

    @property
    def name(self) -> str:
        parts = [
            f"{self.model} {self.resolution}²",
            f"batch {self.batch}",
            *(["text encoder"] if self.text_encoder else []),
            *(["prior"] if self.prior else []),
            *(["checkpointing"] if self.checkpointing else []),
            *([self.precision] if self.precision != "no" else []),
            *([self.quantize] if self.quantize else []),
        ]
        return ", ".join(parts)


def speed_cases(device: str, precision: str, *, quick: bool, only: str | None) -> list[Case]:
    """The rows of the speed table; on a GPU more steps, and larger pictures."""
    pocket = Case("pocket", 64, precision=precision, steps=6 if quick else 60)
    full = Case("sd15", 512 if device == "cuda" else 256, precision=precision, steps=30 if device == "cuda" else 5)
    rows = [
        pocket,
        replace(pocket, text_encoder=True),
        replace(pocket, prior=True),
        replace(pocket, checkpointing=True),
        replace(pocket, batch=4),
        replace(pocket, batch=4, text_encoder=True),
    ]
    if not quick:
        rows += [
            full,
            replace(full, text_encoder=True),
            replace(full, prior=True),
            replace(full, checkpointing=True),
            *([] if device == "cuda" else [replace(full, resolution=512, steps=3)]),
        ]
    return [row for row in rows if only is None or only in row.name]


def memory_cases(precision: str) -> list[Case]:
    """The cells of the memory table: Stable Diffusion 1.5 at 512 × 512, four steps each."""
    return [
        Case("sd15", 512, batch, text_encoder, False, checkpointing, precision, quantize, 4)
        for batch in (1, 2, 4)
        for text_encoder in (False, True)
        for checkpointing in (False, True)
        for quantize in (None, "int8", "nf4")
    ]


@dataclass(frozen=True)
class Material:
    """Where a case's model and pictures lie, and what is said of them."""

    model: Path
    photos: Path
    class_pictures: Path
    prompt: str
    class_prompt: str

    @property
    def class_count(self) -> int:
        return len(list(self.class_pictures.iterdir()))


def material(case: Case, scratch: Path, python: str = sys.executable) -> Material:
    """Prepare what is missing below `scratch`; the photos of other subjects stand for class pictures."""
    if case.model == "pocket":
        return Material(
            POCKET / "model",
            _copied(POCKET / "subjects" / "zorp" / "photos", scratch / "zorp"),
            _copied(POCKET / "subjects" / "mib" / "photos", scratch / "zorp-class"),
            "a photo of sks creature",
            "a photo of a creature",
        )
    have = (PHOTOS / "dog").is_dir()
    photos, others = (PHOTOS / "dog", PHOTOS / "backpack_dog") if have else _shipped("zorp", "mib")
    return Material(
        _sd15(scratch / "sd15", python),
        _copied(photos, scratch / "dog"),
        _copied(others, scratch / "dog-class"),
        "a photo of sks dog",
        "a photo of a dog",
    )


def _shipped(*subjects: str) -> list[Path]:
    return [POCKET / "subjects" / subject / "photos" for subject in subjects]


def _copied(source: Path, target: Path) -> Path:
    """The script reads every file of its folder as a picture, so it gets one with nothing else in it."""
    if not target.is_dir():
        target.mkdir(parents=True)
        for path in sorted(source.iterdir()):
            if path.suffix in (".png", ".jpg"):
                shutil.copy(path, target / path.name)
    return target


def _sd15(folder: Path, python: str) -> Path:
    """Written by a process of its own, which takes its memory along when it ends."""
    if not (folder / "model_index.json").is_file():
        import subprocess

        subprocess.run([python, __file__, str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


def build_sd15(folder: Path) -> None:
    """Stable Diffusion 1.5's UNet, autoencoder and CLIP-L of random fp32 weights, with pocket's tokenizer (4.3 GB)."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(POCKET / "model" / "tokenizer", model_max_length=77)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=AutoencoderKL(
            sample_size=512,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.save_pretrained(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    build_sd15(Path(sys.argv[1]))
