"""`lora-diffusion plan`: what it prints, its exit codes, and mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


def test_a_plan_by_phase_and_by_part(run: Run, tiny_pipeline_dir: Path) -> None:
    code, out, err = run("plan", "--model", tiny_pipeline_dir, "--train_text_encoder", "--validation_prompt", "x")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].endswith("32 px, batch 1, bf16, text encoder too, rank 8, on cuda")
    assert [line.split()[0] for line in lines[2:7]] == ["loading", "encoding", "training", "previews", "saving"]
    assert sum(line.endswith("<") for line in lines) == 1
    for part in ("weights", "adapters", "optimizer", "activations", "needed"):
        assert part in out
    assert "fit" not in out


def test_json_adds_up(run: Run, tiny_pipeline_dir: Path) -> None:
    code, out, _ = run("plan", "--model", tiny_pipeline_dir, "--gpu", "t4", "--json", "--gradient-checkpointing")
    facts = json.loads(out)
    assert code == 0 and facts["fits"] is True and facts["card"] == "T4 16 GB"
    assert facts["mixed_precision"] == "fp16"  # a T4 has no bf16
    assert facts["peak"] == sum(facts["parts"].values()) == facts["phases"][facts["phase"]]["peak"]
    assert facts["needed"] >= facts["peak"] + facts["aside"]


def test_what_does_not_fit_says_what_would(run: Run, tiny_pipeline_dir: Path) -> None:
    words = ("plan", "--model", tiny_pipeline_dir, "--resolution", 128, "--train_batch_size", 32)
    needed = json.loads(run(*words, "--json")[1])["needed"]
    code, out, _ = run(*words, "--memory", f"{(needed >> 20) - 1}MiB")
    assert code == 3
    assert "it does not fit on a card of" in out
    assert "it fits with --gradient_checkpointing: " in out
    code, out, _ = run(*words, "--memory", "100MiB")
    assert code == 3 and "nor with --gradient_checkpointing" in out


def test_on_the_cpu_the_process_counts(run: Run, tiny_pipeline_dir: Path) -> None:
    code, out, _ = run("plan", "--model", tiny_pipeline_dir, "--device", "cpu", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["mixed_precision"] == "no"
    assert facts["peak"] == sum(facts["parts"].values()) + facts["aside"] == facts["needed"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "sd16"], "there is no model sd16"),
        (["--model", "sd15", "--gpu", "voodoo2"], "--gpu voodoo2 is not known"),
        (["--model", "sd15", "--gpus", "t4"], "there is no flag --gpus; did you mean --gpu"),
        (["--model", "sd15", "--with_prior_preservation"], "needs --class_prompt"),
        ([], "--model must be given"),
    ],
)
def test_mistakes_are_one_line(run: Run, words: list[str], said: str) -> None:
    code, out, err = run("plan", *words)
    assert code == 2 or "sd16" in words
    assert out == "" and err.count("\n") == 1 and said in err
