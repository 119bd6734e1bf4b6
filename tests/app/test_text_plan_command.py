"""`lora-diffusion plan text`: what it prints, its exit codes, and mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
TINY = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and nothing else."""
    place = tmp_path_factory.mktemp("tiny")
    (place / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return place


def test_a_plan_by_phase_and_by_part(run: Run, tiny: Path) -> None:
    code, out, err = run("plan", "text", "--model", tiny, "--task", "causal-lm", "--validation_file", "rows.jsonl")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].endswith("causal-lm, lora, 8 × 256 tokens, bf16, on cuda")
    assert [line.split()[0] for line in lines[2:6]] == ["loading", "training", "validation", "saving"]
    for part in ("weights", "adapters", "optimizer", "activations", "needed"):
        assert part in out


def test_json_adds_up(run: Run, tiny: Path) -> None:
    words = ("plan", "text", "--model", tiny, "--task", "causal-lm", "--max-length", 64, "--gpu", "t4", "--json")
    code, out, _ = run(*words)
    facts = json.loads(out)
    assert code == 0 and facts["fits"] is True and facts["max_length"] == 64
    assert facts["mixed_precision"] == "fp16"  # a T4 has no bf16
    assert facts["peak"] == sum(facts["parts"].values()) == facts["phases"][facts["phase"]]["peak"]
    assert facts["needed"] >= facts["peak"] + facts["aside"]


def test_what_does_not_fit_says_what_would(run: Run, tiny: Path) -> None:
    words = ("plan", "text", "--model", tiny, "--task", "causal-lm", "--train_batch_size", 64)
    needed = json.loads(run(*words, "--json")[1])["needed"]
    code, out, _ = run(*words, "--memory", f"{(needed >> 20) - 1}MiB")
    assert code == 3 and "it does not fit on a card of" in out and "it fits with --gradient_checkpointing: " in out
    code, out, _ = run(*words, "--memory", "100MiB")
    assert code == 3 and "nor with --gradient_checkpointing" in out


def test_a_base_in_main_memory(run: Run, tiny: Path) -> None:
    words = ("--model", tiny, "--task", "causal-lm", "--fsdp", "--fsdp_cpu_offload", "--train_batch_size", 1)
    code, out, err = run("plan", "text", *words)
    assert (code, err) == (0, "") and "base in main memory" in out.splitlines()[0]
    assert out.splitlines()[-1].startswith("main memory")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "gpt5", "--task", "causal-lm"], "there is no model gpt5"),
        (["--model", "gpt2", "--task", "masked-lm"], "gpt2"),
        (["--model", "gpt2", "--task", "causal-lm", "--gpu", "voodoo2"], "--gpu voodoo2 is not known"),
        (["--model", "gpt2", "--task", "causal-lm", "--gpus", "t4"], "there is no flag --gpus; did you mean --gpu"),
        (["--model", "gpt2", "--task", "causal-lm", "--processes", "2"], "--processes 2 is for --fsdp"),
        (["--model", "gpt2", "--task", "causal-lm", "--method", "lara"], "--method 'lara' is not one of"),
        (["--model", "gpt2", "--task", "causal-lm", "--max_length", "2000"], "--max_length 2000 is more than"),
        (["--model", "gpt2"], "--task must be given"),
        (["rows.jsonl"], "one argument too many"),
    ],
)
def test_mistakes_are_one_line(run: Run, words: list[str], said: str) -> None:
    code, out, err = run("plan", "text", *words)
    assert code in (1, 2)
    assert out == "" and err.count("\n") == 1 and said in err


def test_pictures_are_planned_as_before(run: Run) -> None:
    code, _, err = run("plan", "--model", "sd16")
    assert code in (1, 2) and "there is no model sd16" in err
