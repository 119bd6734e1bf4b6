"""Fixtures of the first floor: photos, and a run small enough to be made many times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train.dreambooth_config import DreamBoothConfig


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three small photos, one of them not square, and a caption that is no picture."""
    folder = tmp_path_factory.mktemp("photos")
    draws = np.random.default_rng(0)
    for number, size in enumerate([(32, 32, 3), (48, 40, 3), (36, 36, 3)]):
        Image.fromarray(draws.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("a caption")
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
