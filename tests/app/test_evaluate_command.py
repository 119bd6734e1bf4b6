"""`lora-diffusion evaluate` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lora_diffusion as ld
from train.models import load_pipeline

Run = Callable[..., tuple[int, str, str]]
Words = Callable[..., list[object]]


@pytest.fixture
def words(tiny_pipeline_dir: Path, photos: Path, tmp_path: Path) -> Words:
    """A command line on the tiny pipeline, judged by pocket's judge; more words may follow."""
    pipe = load_pipeline(str(tiny_pipeline_dir))
    ld.add_adapter(pipe, ld.LoraConfig(r=2), generator=torch.Generator().manual_seed(0))
    ld.save_adapter(pipe, tmp_path / "dog.safetensors")
    (tmp_path / "prompts.txt").write_text("{} at night\n")

    def make(*more: object) -> list[object]:
        return [
            "evaluate", "--model", tiny_pipeline_dir, "--adapter", f"{tmp_path / 'dog.safetensors'}:0.8",
            "--instance_data_dir", photos, "--instance_prompt", "a photo of sks creature", "--num_inference_steps", 1,
            "--prompts", tmp_path / "prompts.txt", "--unrelated_prompts", tmp_path / "prompts.txt", "--seeds", 3,
            "--image_encoder", "pocket", "--text_encoder", "pocket", "--output_dir", tmp_path / "out", *more,
        ]  # fmt: skip

    return make


def test_a_table_words_and_where_to_look(run: Run, words: Words, tmp_path: Path) -> None:
    code, out, err = run(*words("--class_prompt", "a photo of a creature"))
    assert code == 0, err
    assert out.startswith("|") and "| dog:0.8 " in out and "prompt following" in out
    assert f"Look at   {tmp_path / 'out' / 'comparison.png'}" in out and (tmp_path / "out" / "comparison.png").is_file()


def test_json_and_nothing_else(run: Run, words: Words) -> None:
    code, out, _ = run(*words("--json", "--seeds", 1))
    report = json.loads(out)
    assert code == 0 and report["adapters"][0]["weight"] == 0.8
    assert report["adapters"][0]["figures"]["likeness"]["low"] is None


def test_a_sweep_says_what_is_best(run: Run, words: Words, tmp_path: Path) -> None:
    code, out, err = run(*words("--sweep-weights", "0,1"))
    assert code == 0, err
    assert "| weight |" in out and "does best with weight" in out and (tmp_path / "out" / "sweep.png").is_file()


def test_mistakes_are_one_line(run: Run, words: Words, tmp_path: Path) -> None:
    for more, said in (
        (["--instance_data_dir", tmp_path / "none"], "there is no folder"),
        (["--image_encoder", tmp_path], "no config.json"),
        (["--text_encoder", "nothing"], "no such folder"),
        (["--sweep_weights", "x"], "numbers with commas"),
        (["--adapter", tmp_path / "prompts.txt"], "prompts.txt"),
        (["--seeds", 0], "--seeds 0 is too small"),
    ):
        code, out, err = run(*words(*more))
        assert code in (1, 2) and out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert said in err


def test_help_answers_without_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from app.cli import main; main(['evaluate', '--help']); "
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--sweep_weights" in done.stdout and "--image_encoder" in done.stdout
