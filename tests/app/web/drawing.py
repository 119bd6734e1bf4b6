"""What tests of drawing share: adapters whose effect can be seen, a workspace that holds some, a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lora_diffusion as ld
from app.web.limits import Limits
from app.web.pictures import Pictures, Request
from app.web.places import Workspace
from train.models import load_pipeline

LIMITS = Limits(inference_steps=40, count=4, grid=9, side=64)


def put_adapter(folder: Path, name: str, model: str, seed: int, **metadata: Any) -> Path:
    """An adapter whose effect can be seen, in a file."""
    pipe = load_pipeline(model)
    generator = torch.Generator().manual_seed(seed)
    ld.add_adapter(pipe, ld.LoraConfig(r=2), "a", components=["unet", "text_encoder"], generator=generator)
    with torch.no_grad():
        for parameter in [one for part in ld.adapter_parameters(pipe, "a").values() for one in part]:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir(parents=True, exist_ok=True)
    ld.save_adapter(pipe, folder / f"{name}.safetensors", "a", metadata=metadata)
    return folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def model(tiny_pipeline_dir: Path) -> str:
    return str(tiny_pipeline_dir)


@pytest.fixture(scope="module")
def shelf(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with two adapters and a run with two checkpoints. Only the gallery changes."""
    root = tmp_path_factory.mktemp("app")
    for number, name in enumerate(("rex", "ink")):
        put_adapter(root / "adapters", name, model, number)
    put_adapter(root / "runs" / "zorp", "adapter", model, 5)
    for step in (10, 20):
        put_adapter(root / "runs" / "zorp" / "checkpoints" / f"step-{step}", "adapter", model, step)
    return root


@pytest.fixture
def pictures(shelf: Path) -> Pictures:
    return Pictures(Workspace(shelf), LIMITS, device="cpu")


@pytest.fixture
def request_(model: str) -> Request:
    return Request(model, "a dog", seed=7, steps=2)


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()
