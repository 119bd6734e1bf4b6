"""The command line: good input ends well, bad input ends in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from train.pictures import read_settings

Run = Callable[..., tuple[int, str, str]]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def words(tiny_pipeline_dir: Path, photos: Path, tmp_path: Path) -> list[object]:
    """A dreambooth command that works; later flags win over earlier ones."""
    return [
        "dreambooth", "--model", tiny_pipeline_dir, "--instance_data_dir", photos, "--instance_prompt",
        "a photo of sks dog", "--output_dir", tmp_path / "run", "--max_train_steps", 2,
    ]  # fmt: skip


def test_train_sample_inspect(words: list[object], run: Run, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    code, out, err = run(*words)
    assert code == 0 and "training 2/2" in err
    assert f"adapter: {tmp_path / 'run' / 'adapter.safetensors'}" in out and "try: lora-diffusion sample" in out
    adapter = tmp_path / "run" / "adapter.safetensors"
    code, out, err = run(
        "sample", "--model", tiny_pipeline_dir, "--adapter", f"{adapter}:0.5", "--adapter", adapter,
        "--prompt", "sks dog", "--seed", 4, "--num_images", 2, "--num_inference_steps", 2,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    paths = [Path(line) for line in out.splitlines() if line.endswith(".png")]
    assert len(paths) == 2 and read_settings(paths[1])["seed"] == 5
    assert [one["weight"] for one in read_settings(paths[0])["adapters"]] == [0.5, 1.0]
    code, out, err = run("inspect", adapter)
    assert code == 0 and "32 layers, rank 8" in out and "a photo of sks dog" in out
    code, out, err = run("inspect", adapter, "--json")
    facts = json.loads(out)
    assert facts["components"]["unet"]["ranks"] == [8] and facts["metadata"]["steps"] == 2


def fails(run: Run, code: int, *words: object) -> str:
    """Run, expect this exit code and one line on stderr; returns it."""
    got, _, err = run(*words)
    lines = [line for line in err.splitlines() if not line.startswith(("photos encoded", "training"))]
    assert got == code, err
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err, err
    return lines[0]


def test_no_images(words: list[object], run: Run, tmp_path: Path) -> None:
    assert "no folder" in fails(run, 2, *words, "--instance_data_dir", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no image in" in fails(run, 2, *words, "--instance_data_dir", tmp_path / "empty")


def test_an_unreadable_image(words: list[object], run: Run, photos: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is no picture")
    assert "broken.jpg" in fails(run, 2, *words)
    (photos / "broken.jpg").unlink()
    whole = (photos / "0.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert "cut.png" in fails(run, 2, *words)
    (photos / "cut.png").unlink()
    Image.new("1", (20_000, 20_000)).save(photos / "huge.png")
    assert "huge.png" in fails(run, 2, *words)


def test_a_missing_model_folder(words: list[object], run: Run, tmp_path: Path) -> None:
    assert "no model folder" in fails(run, 2, *words, "--model", tmp_path / "nowhere")
    assert "no model folder" in fails(run, 2, "sample", "--model", tmp_path / "nowhere", "--prompt", "x")
    assert "model_index.json" in fails(run, 2, "sample", "--model", tmp_path, "--prompt", "x")


def test_a_prompt_without_the_subject_word(words: list[object], run: Run) -> None:
    assert "no subject word" in fails(run, 2, *words, "--instance_prompt", "a photo of a dog")
    same = ["--instance_prompt", "sks dog", "--class_prompt", "sks dog", "--with_prior_preservation"]
    assert "are the same" in fails(run, 2, *words, *same)
    assert "'zwx'" in fails(run, 2, *words, "--subject_token", "zwx")


def test_a_wrong_adapter_file(run: Run, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    sample = ["sample", "--model", tiny_pipeline_dir, "--prompt", "x", "--output_dir", tmp_path / "out", "--adapter"]
    assert "does not exist" in fails(run, 2, *sample, tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("hello " * 100)
    assert "text.safetensors" in fails(run, 2, *sample, tmp_path / "text.safetensors")
    model = tiny_pipeline_dir / "unet" / "diffusion_pytorch_model.safetensors"
    assert model.name in fails(run, 2, *sample, model)
    assert "not a number" in fails(run, 2, *sample, f"{tmp_path / 'text.safetensors'}:strong")
    assert "text.safetensors" in fails(run, 2, "inspect", tmp_path / "text.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_rate_that_diverges(words: list[object], run: Run, tmp_path: Path) -> None:
    line = fails(run, 1, *words, "--learning_rate", "1e30", "--max_train_steps", 9)
    assert "nan at step 2" in line and "lower --learning_rate" in line


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--learning_rate", "fast"], "not a number"),
        (["--learning_rate", "0"], "above 0"),
        (["--rank", "0"], "at least 1"),
        (["--mixed_precision", "fp8"], "not one of"),
        (["--resolution", "33"], "nearest is 32"),
        (["--lr_schedular", "cosine"], "did you mean --lr_scheduler"),
        (["--hub_token", "x"], "not supported"),
        (["--report_to", "comet"], "not one of"),
        (["--with_prior_preservation"], "--class_prompt"),
        (["--target_modules", "to_qq"], "to_q"),
        (["--resume_from_checkpoint", "step-7"], "no checkpoint step-7"),
        (["--device", "mps"], "--device"),
        (["surplus"], "one argument too many"),
    ],
)
def test_misuse_of_flags(words: list[object], run: Run, extra: list[str], message: str) -> None:
    assert message in fails(run, 2, *words, *extra)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(
    words: list[object], run: Run, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert f"pip install {tracker}" in fails(run, 2, *words, "--report_to", tracker)


def test_unknown_and_missing_subcommands(run: Run) -> None:
    assert "did you mean dreambooth" in fails(run, 2, "dreamboth")
    assert "--model and --prompt must be given" in fails(run, 2, "sample")
    assert run()[0] == 2
    code, out, _ = run("--help")
    assert code == 0 and "dreambooth" in out
    assert run("--version")[0] == 0


def test_an_unexpected_error_is_one_line_and_debug_shows_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("lora_diffusion.read_adapter", broken)
    assert "ZeroDivisionError: by zero" in fails(run, 1, "inspect", "x")
    with pytest.raises(ZeroDivisionError):
        run("inspect", "x", "--debug")
    monkeypatch.setenv("LORA_DIFFUSION_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("inspect", "x")


@pytest.mark.parametrize("words", [["--help"], ["dreambooth", "--help"], ["sample", "--help"], ["inspect", "--help"]])
def test_help_does_not_wait_for_torch(words: list[str]) -> None:
    code = (
        "import sys; from app.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'numpy'} & set(sys.modules); "
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    assert "usage: lora-diffusion" in done.stdout
    assert seconds < 3  # 0.1 s where nothing else runs
