"""Fixtures of the first floor: photos, and a run small enough to be made many times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.train.text_models import model, tokenizer
from train.dreambooth_config import DreamBoothConfig
from train.text_config import TextConfig


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three small photos, one of them not square, and a note that is no picture."""
    folder = tmp_path_factory.mktemp("photos")
    draws = np.random.default_rng(0)
    for number, size in enumerate([(32, 32, 3), (48, 40, 3), (36, 36, 3)]):
        Image.fromarray(draws.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "notes.md").write_text("not a picture")
    return folder


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """Five photos of several shapes with transparency, captions beside them; their masks are in `masks` next to it."""
    folder, masks = tmp_path / "rich", tmp_path / "masks"
    folder.mkdir()
    masks.mkdir()
    draws = np.random.default_rng(5)
    for number, (width, height) in enumerate([(32, 32), (48, 36), (36, 48), (40, 30), (33, 33)]):
        pixels = draws.integers(0, 255, (height, width, 4), dtype=np.uint8)
        pixels[..., 3] = 0
        pixels[: height // 2, :, 3] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
        Image.fromarray(pixels[..., 3]).save(masks / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks dog, grass, number {number}, sun")
    return folder


@pytest.fixture
def make_config(tiny_pipeline_dir: Path, photos: Path, tmp_path: Path) -> Callable[..., DreamBoothConfig]:
    """Settings of a run on the tiny pipeline; keyword arguments change them."""

    def make(name: str = "run", **changes: Any) -> DreamBoothConfig:
        values: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_pipeline_dir),
            "instance_data_dir": str(photos),
            "instance_prompt": "a photo of sks dog",
            "output_dir": str(tmp_path / name),
            "max_train_steps": 4,
            "learning_rate": 1e-3,
            "seed": 3,
        }
        return DreamBoothConfig(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def tiny_sdxl_dir(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `StableDiffusionXLPipeline.from_pretrained` loads: 32×32 pictures, text of width 32 + 24, pooled to
    20; the second tokenizer pads with `!`, as SDXL's does. Read only."""
    folder = tmp_path_factory.mktemp("tiny_sdxl")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=1,
            cross_attention_dim=56,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20,
            norm_num_groups=8,
        )
        second = CLIPTextConfig(
            vocab_size=514,
            hidden_size=24,
            intermediate_size=48,
            projection_dim=20,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act="gelu",
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=1,
        )
        text_encoder_2 = CLIPTextModelWithProjection(second)
    vae = AutoencoderKL.from_pretrained(tiny_pipeline_dir, subfolder="vae")
    vae.register_to_config(scaling_factor=0.13025, force_upcast=True)
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(tiny_pipeline_dir, subfolder="text_encoder"),
        text_encoder_2=text_encoder_2,
        tokenizer=CLIPTokenizer.from_pretrained(tiny_pipeline_dir, subfolder="tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(tiny_pipeline_dir, subfolder="tokenizer", pad_token="!"),
        unet=unet,
        scheduler=DDIMScheduler.from_pretrained(tiny_pipeline_dir, subfolder="scheduler"),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def make_sdxl_config(
    make_config: Callable[..., DreamBoothConfig], tiny_sdxl_dir: Path
) -> Callable[..., DreamBoothConfig]:
    """`make_config` for the tiny SDXL pipeline."""

    def make(name: str = "run", **changes: Any) -> DreamBoothConfig:
        return make_config(name, **{"pretrained_model_name_or_path": str(tiny_sdxl_dir), **changes})

    return make


@pytest.fixture(scope="session")
def judge_folders(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny DINO, DINOv2 and CLIP of random weights, as transformers writes them. Read only."""
    from transformers import (
        BitImageProcessorPil,
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTImageProcessorPil,
        ViTModel,
    )  # fmt: skip

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    view = {"image_size": 32, "patch_size": 8}
    size = {"height": 32, "width": 32}
    text = {**shape, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    root = tmp_path_factory.mktemp("judges")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**shape, **view}, projection_dim=16))
        dino = ViTModel(ViTConfig(**shape, **view))
        dinov2 = Dinov2Model(Dinov2Config(**shape, **view))
    clip.save_pretrained(root / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(root / "clip")
    CLIPTokenizer.from_pretrained(tiny_pipeline_dir / "tokenizer").save_pretrained(root / "clip")
    dino.save_pretrained(root / "dino")
    ViTImageProcessorPil(size=size).save_pretrained(root / "dino")
    dinov2.save_pretrained(root / "dinov2")
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(root / "dinov2")
    return {name: root / name for name in ("clip", "dino", "dinov2")}


@pytest.fixture(scope="session")
def text_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny language models of random weights, as `from_pretrained` loads them. Read only."""
    root = tmp_path_factory.mktemp("text_models")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    forms = {
        "bert": "ForMaskedLM", "roberta": "ForMaskedLM", "deberta": "ForMaskedLM", "gpt2": "ForCausalLM",
        "llama": "ForCausalLM", "t5": "ForConditionalGeneration",
    }  # fmt: skip
    for family, form in forms.items():
        with torch.random.fork_rng(devices=[]):
            model(family, form, **(still if family == "bert" else {})).save_pretrained(root / family)
        tokenizer(family).save_pretrained(root / family)
    return {family: root / family for family in forms}


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows for each task, 13 of them, in JSONL. Read only."""
    root = tmp_path_factory.mktemp("rows")
    places, names, colours = ("Paris", "Rome", "Oslo"), ("Anna", "Tom"), ("blue", "green", "red")
    counted = range(13)
    rows = {
        "labels": [{"text": f"The sky is {colours[n % 3]} .", "label": "yes" if n % 3 == 0 else "no"} for n in counted],
        "pairs": [
            {"premise": f"{names[n % 2]} lives in {places[n % 3]} .", "hypothesis": f"in {places[n % 2]}",
             "label": "entailment" if n % 3 == n % 2 else "contradiction"} for n in counted
        ],
        "facts": [{"x": names[n % 2], "place": places[n % 2]} for n in counted],
        "answers": [
            {"question": f"Where does {names[n % 2]} live ?" + " ." * (n % 4), "answer": places[n % 3]} for n in counted
        ],
        "tags": [
            {"tokens": [names[n % 2], "lives", "in", places[n % 3]], "tags": ["B-PER", "O", "O", "B-LOC"]}
            for n in counted
        ],
        "spans": [
            {"question": "Where does Anna live ?", "context": f"Anna lives in {places[n % 3]} .",
             "answers": {"text": [places[n % 3]], "answer_start": [14]}} for n in counted
        ],
    }  # fmt: skip
    for name, listed in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed), encoding="utf-8")
    return {name: root / f"{name}.jsonl" for name in rows}


# task -> (family, rows, further settings)
TEXT_TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sequence-classification": ("bert", "pairs", {}),
    "token-classification": ("bert", "tags", {}),
    "question-answering": ("bert", "spans", {}),
    "masked-lm": ("bert", "facts", {"template": "{x} lives in {mask} .", "answer_column": "place"}),
    "causal-lm": ("gpt2", "answers", {}),
    "seq2seq-lm": ("t5", "answers", {}),
}


@pytest.fixture
def make_text_config(
    text_folders: dict[str, Path], text_files: dict[str, Path], tmp_path: Path
) -> Callable[..., TextConfig]:
    """Settings of a run on a tiny language model; keyword arguments change them."""

    def make(task: str = "sequence-classification", name: str = "run", **changes: Any) -> TextConfig:
        family, rows, settings = TEXT_TASKS[task]
        values: dict[str, Any] = {
            "pretrained_model_name_or_path": str(text_folders[family]),
            "task": task,
            "train_file": str(text_files[rows]),
            "output_dir": str(tmp_path / name),
            "max_train_steps": 4,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "seed": 3,
            "plan": False,
            **settings,
        }
        return TextConfig(**{**values, **changes})

    return make
