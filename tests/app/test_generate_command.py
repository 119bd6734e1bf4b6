"""`lora-diffusion generate` as typed: what is printed, and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from app.cli import main
from app.generate_command import Streamed
from tests.train.text_models import model, tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    model("gpt2", "ForCausalLM").save_pretrained(folder)
    tokenizer("gpt2").save_pretrained(folder)
    return str(folder)


def test_a_text_is_all_that_one_prompt_gives(run: Run, gpt: str) -> None:
    words = ("generate", "--model", gpt, "--prompt", "Anna lives in", "--max-new-tokens", 5)
    code, out, err = run(*words)
    assert code == 0 and out.count("\n") == out.rstrip("\n").count("\n") + 1 and "error" not in err
    code, again, _ = run(*words, "--seed", 3)
    assert again == out  # nothing is drawn


def test_several_prompts_are_named_and_json_lines_are_json(run: Run, gpt: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Anna\n\nTom\n")
    words = ("generate", "--model", gpt, "--prompts_file", prompts, "--max_new_tokens", 3, "--temperature", 1)
    code, out, _ = run(*words, "--output_file", tmp_path / "out.jsonl")
    assert code == 0 and "[1/2] Anna" in out and "[2/2] Tom" in out and "answers: " in out
    code, out, _ = run(*words, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows == [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Anna", "Tom"]


def test_misuse_is_one_line(run: Run, gpt: str, tmp_path: Path) -> None:
    for words, message in (
        (("--prompt", "x", "--top_k", 3), "--temperature above 0"),
        (("--prompt", "x", "--adapter", tmp_path / "none.safetensors"), "none.safetensors"),
        (("--promt", "x"), "did you mean --prompt"),
        ((), "neither is given"),
    ):
        code, out, err = run("generate", "--model", gpt, *words)
        assert code == 2 and message in err and len(err.splitlines()) == 1 and out == ""


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(
        flag in said for flag in ("--adapter", "--repetition_penalty", "--input_file", "--compare", "--quantize")
    )


def test_terminal_codes_in_a_text_are_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    show = Streamed(compare=True)
    show({"event": "writing", "index": 0, "base": True, "of": 1, "prompt": "x"})
    show({"event": "piece", "text": "a\x1b[31mb\nc"})
    out = capsys.readouterr().out
    assert "\x1b" not in out and "b\nc" in out and out.startswith("base:")
