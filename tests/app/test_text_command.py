"""`lora-diffusion text`: real rows through the whole command line, and misuse in one line each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lora_diffusion as ld

Run = Callable[..., tuple[int, str, str]]
REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data" / "text"
POCKET = REPOSITORY / "examples" / "pocket_text"

real = pytest.mark.skipif(not DATA.is_dir(), reason="the real rows are not beside this checkout")
pocket = pytest.mark.skipif(not (POCKET / "bert" / "config.json").is_file(), reason="the pocket models are not built")


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    """A text command that works; later flags win over earlier ones."""
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"the {word} is nice", "label": word}) for word in ("cat", "dog")] * 3
    rows.write_text("\n".join(lines) + "\n")
    return ["text", "--model", "pocket-bert", "--task", "sequence-classification", "--train_file", rows,
            "--output_dir", tmp_path / "run", "--max_train_steps", 2, "--train_batch_size", 2]  # fmt: skip


@pocket
def test_rows_in_an_adapter_out(words: list[object], run: Run, tmp_path: Path) -> None:
    rows = words[6]
    code, out, err = run(*words, "--validation_file", rows, "--test_file", rows, "--keep_best")
    assert code == 0 and "training 2/2" in err, err
    assert "lora for sequence-classification: 2 steps of pocket-bert on cpu in fp32" in out
    assert "[CLS] the cat is nice [SEP] → «cat»" in out and "memory: about" in out
    assert "the task's own layers are learned as a whole: bert.pooler.dense, classifier" in out
    assert f"adapter: {tmp_path / 'run' / 'adapter.safetensors'}" in out and "best: " in out and "test: loss" in out
    metadata = ld.read_adapter(tmp_path / "run" / "adapter.safetensors").metadata
    assert metadata["labels"] == ["cat", "dog"] and metadata["template"]["prompt"] == "{text}"
    assert metadata["base_model"] == "pocket-bert"
    code, out, err = run("inspect", tmp_path / "run" / "adapter.safetensors")
    assert code == 0 and "rank 8" in out, err


@pocket
@real
@pytest.mark.parametrize("data", ["RTE", "CB"])
def test_the_p_tuning_papers_rows(run: Run, tmp_path: Path, data: str) -> None:
    """RTE and CB, 32 rows: LoRA with the head, and P-tuning of a cloze with words for labels."""
    folder = DATA / "fewglue_32dev" / data
    common = ["text", "--model", "pocket-bert", "--train_file", folder / "train.jsonl", "--test_file",
              folder / "dev32.jsonl", "--too_long", "truncate", "--max_length", 96, "--num_train_epochs", 1,
              "--no_plan"]  # fmt: skip
    code, out, err = run(*common, "--task", "sequence-classification", "--output_dir", tmp_path / "lora")
    assert code == 0, err
    assert "cut to 96 tokens" in out and "accuracy" in out
    figures = json.loads((tmp_path / "lora" / "metrics.json").read_text())
    assert figures["step"] == 4 and 0 <= figures["test"]["accuracy"] <= 1
    labels = "entailment=yes,not_entailment=no" if data == "RTE" else "entailment=yes,contradiction=no,neutral=and"
    code, out, err = run(
        *common, "--task", "masked-lm", "--method", "p-tuning", "--output_dir", tmp_path / "cloze", "--label_words",
        labels, "--prompt_template", "{premise} question : {hypothesis} ? {P:3} answer : {mask} .",
        "--learning_rate", "1e-3",
    )  # fmt: skip
    assert code == 0, err
    assert "[V2]" in out and "«[MASK]»" in out and "p@1" in out


@pocket
@real
def test_restaurants_described(run: Run, tmp_path: Path) -> None:
    """E2E: attributes and their description, two columns of a text file."""
    code, out, err = run(
        "text", "--model", "pocket-gpt", "--task", "causal-lm", "--train_file", DATA / "e2e" / "valid.txt",
        "--separator", "||", "--columns", "mr,ref", "--max_train_samples", 40, "--validation_file",
        DATA / "e2e" / "test.txt", "--max_validation_samples", 10, "--packing", "--max_length", 256,
        "--max_train_steps", 2, "--train_batch_size", 2, "--generate_answers", "--max_new_tokens", 4, "--no_plan",
        "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    assert "rows to learn from share" in out and "perplexity" in out and "bleu" in out
    assert "name : Alimentum | area : city centre" in out


def fails(run: Run, code: int, *words: object) -> str:
    """Run, expect this exit code and one line on stderr; returns it."""
    got, _, err = run(*words)
    lines = [line for line in err.splitlines() if not line.startswith("training")]
    assert got == code, err
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--method", "lorra"], "did you mean lora"),
        (["--task", "classify"], "not one of"),
        (["--rank", "0"], "at least 1"),
        (["--lr_schedular", "cosine"], "did you mean --lr_scheduler"),
        (["--hub_token", "x"], "not supported"),
        (["--deepspeed", "x.json"], "--fsdp_cpu_offload"),
        (["--trust_remote_code"], "never run"),
        (["--model", "nowhere/at/all"], "no model folder"),
        (["--train_file", "nowhere.jsonl"], "nowhere.jsonl is not there"),
        (["--label_column", "lable"], "'label'"),
        (["--text_column", "txt"], "'text'"),
        (["--target_modules", "qery"], "query"),
        (["--resume_from_checkpoint", "step-7"], "no checkpoint step-7"),
        (["--fsdp"], "needs a launcher"),
        (["--max_length", "100000"], "more than the model takes"),
    ],
)  # fmt: skip
@pocket
def test_misuse_is_one_line(words: list[object], run: Run, tmp_path: Path, extra: list[str], message: str) -> None:
    assert message in fails(run, 2, *words, *extra)
    assert not (tmp_path / "run" / "events.jsonl").exists()


@pocket
def test_a_half_line_names_its_place_and_can_be_skipped(words: list[object], run: Run) -> None:
    rows = Path(str(words[6]))
    rows.write_text(rows.read_text() + '{"text": "cut')
    line = fails(run, 2, *words)
    assert f"{rows}, line 7" in line and "is no JSON" in line
    code, out, err = run(*words, "--on_bad", "skip")
    assert code == 0 and "1 row skipped: is no JSON" in out, err


def test_mistakes_are_answered_before_torch_is_loaded(tmp_path: Path) -> None:
    """And so is --help."""
    code = (
        "import sys; from app.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    wrong = [
        "text",
        "--model",
        "x",
        "--task",
        "causal-lm",
        "--train_file",
        "y",
        "--method",
        "full",
        "--quantize",
        "nf4",
    ]
    for words, expected, said in ((["text", "--help"], 0, "--prompt_template"), (wrong, 2, "--quantize would fix")):
        done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
        assert said in done.stdout + done.stderr
