"""The DreamBooth benchmark: its stand-in for torchvision, its marks, and a quick round where the script is there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from train.images import to_tensor

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "DREAMBOOTH_SCRIPT"  # the environment variable with the path of diffusers' train_dreambooth_lora.py


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def transforms() -> ModuleType:
    return load("dreambooth_transforms")


def test_the_stand_in_gives_what_our_own_reader_gives(transforms: ModuleType) -> None:
    picture = Image.effect_noise((40, 40), 80).convert("RGB")
    chain = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    ours = to_tensor(picture.resize((32, 32), Image.Resampling.LANCZOS))
    torch.testing.assert_close(chain(picture), ours, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "scaled"), [((40, 80), (20, 40)), ((90, 30), (60, 20)), ((20, 50), (20, 50))])
def test_the_shorter_side_is_scaled(transforms: ModuleType, size: tuple[int, int], scaled: tuple[int, int]) -> None:
    assert transforms.Resize(20)(Image.new("RGB", size)).size == scaled


def test_a_random_crop_lies_within_the_picture(transforms: ModuleType) -> None:
    picture = Image.new("RGB", (12, 9), "white")
    for _ in range(20):
        crop = transforms.RandomCrop(8)(picture)
        assert crop.size == (8, 8) and crop.getextrema() == ((255, 255),) * 3  # beyond the edge Pillow gives black


def test_each_step_leaves_a_mark(tmp_path: Path) -> None:
    """A program of two steps, as a process of its own; the number of marks is that of its steps."""
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "from torchvision import transforms\n"
        "assert transforms.InterpolationMode.LANCZOS\n"
        "w = torch.nn.Parameter(torch.ones(3))\n"
        "o = torch.optim.AdamW([w])\n"
        "for _ in range(2):\n"
        "    w.sum().backward(); o.step(); o.zero_grad()\n"
    )
    child = ROOT / "benchmarks" / "dreambooth_child.py"
    subprocess.run(
        [sys.executable, str(child), str(tmp_path / "marks.json"), str(program)],
        check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    marks = json.loads((tmp_path / "marks.json").read_text())
    assert len(marks["ends"]) == len(marks["cpu"]) == len(marks["peaks"]) == 2
    assert marks["parameters"] == 3
    assert 0 < marks["peaks"][0] <= marks["peaks"][1] <= marks["peak"]


@pytest.mark.slow
def test_a_quick_round_against_the_script(tmp_path: Path) -> None:
    script = os.environ.get(SCRIPT)
    if not script:
        pytest.skip(f"diffusers' script is not part of this project; {SCRIPT} says where it is")
    out = tmp_path / "figures.json"
    subprocess.run(
        [sys.executable, "benchmarks/dreambooth.py", "--script", script, "--quick", "--only", "batch 4",
         "--repetitions", "1", "--device", "cpu", "--out", str(out)],
        cwd=ROOT, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2
    for row in rows:
        assert "skipped" not in row and "disagrees" not in row
        ours, theirs = row["contestants"]["ours"], row["contestants"]["theirs"]
        assert ours["parameters"] == theirs["parameters"]
        assert ours["peak"] > 0 and theirs["peak"] > 0
