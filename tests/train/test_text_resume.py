"""A text run that is interrupted and goes on ends with the bytes of one that never was; two processes share one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_diffusion import ConfigError, DatasetError
from train.checkpoints import steps_in
from train.config import settings_of, to_dict
from train.record import read_events
from train.text import Result, train
from train.text_config import TextConfig

Make = Callable[..., TextConfig]
REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

# Everything that has a state: momentum, a schedule, dropout, two methods, a head, an epoch in the middle.
EVERYTHING: dict[str, Any] = {
    "max_train_steps": 10,
    "checkpointing_steps": 3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "lora_dropout": 0.2,
    "method": "lora+p-tuning",
    "num_virtual_tokens": 2,
    "gradient_accumulation_steps": 2,
}


def result_bytes(result: Result) -> bytes:
    assert result.adapter is not None
    return result.adapter.read_bytes()


def stop_at(config: TextConfig, step: int) -> Result:
    """Run until `step`, then ask for a stop."""
    reached: list[int] = []
    result = train(
        config,
        on_event=lambda event: reached.append(event["step"]) if event["event"] == "step" else None,
        should_stop=lambda: bool(reached) and reached[-1] >= step,
    )
    assert result.stopped and result.steps == step
    return result


def test_stopped_and_resumed_twice(make_text_config: Make) -> None:
    whole = train(make_text_config(name="whole", **EVERYTHING))
    config = make_text_config(name="parts", **EVERYTHING)
    stopped = stop_at(config, 4)
    assert list(steps_in(stopped.output_dir / "checkpoints")) == [3, 4]
    assert result_bytes(stopped) != result_bytes(whole)
    stop_at(replace(config, resume_from_checkpoint="latest"), 5)
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert resumed.steps == 10 and result_bytes(resumed) == result_bytes(whole)
    starts = [event for event in read_events(resumed.output_dir / "events.jsonl") if event["event"] == "start"]
    assert [start["resumed_from"] for start in starts] == [None, 4, 5]


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("causal-lm", {"method": "prefix-tuning", "prefix_projection": True, "packing": True, "max_length": 60}),
        ("causal-lm", {"method": "houlsby", "group_by_length": True, "use_ema": True, "ema_decay": 0.9}),
        ("causal-lm", {"method": "pre-layer", "optimizer": "schedule-free-adamw", "lr_scheduler": "constant"}),
        ("masked-lm", {"method": "p-tuning", "prompt_template": "(2,2,2)", "template": None,
                       "num_virtual_tokens": None}),
        ("seq2seq-lm", {"method": "full", "optimizer": "adafactor"}),
        ("token-classification", {"method": "bitfit"}),
        ("question-answering", {"method": "top-layers", "top_layers": 1, "optimizer": "prodigy",
                                "learning_rate": 1.0}),
        ("sequence-classification", {"method": "head", "mixed_precision": "bf16"}),
        ("sequence-classification", {"method": "lora", "mixed_precision": "fp16", "use_dora": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["method"],
)  # fmt: skip
def test_an_older_checkpoint_of_other_ways_to_learn(make_text_config: Make, task: str, changes: dict[str, Any]) -> None:
    """Steps 5 to 7 are taken twice, with a validation in between only the first time."""
    settings = {**EVERYTHING, "max_train_steps": 7, "checkpointing_steps": 2, "lora_dropout": 0.0, **changes}
    if settings["method"] not in ("prefix-tuning", "pre-layer"):
        settings["num_virtual_tokens"] = None
    if settings["lr_scheduler"] == "constant":
        settings["lr_warmup_steps"] = 0
    config = make_text_config(task, **settings)
    first = result_bytes(train(replace(config, validation_file=config.train_file, validation_steps=3)))
    again = train(replace(config, resume_from_checkpoint="step-4", checkpointing_steps=100))
    assert result_bytes(again) == first


def test_validations_and_the_best_step_are_remembered(make_text_config: Make) -> None:
    settings = {**EVERYTHING, "validation_steps": 2, "keep_best": True, "metric_for_best": "loss"}
    whole = make_text_config(name="whole", **settings)
    whole = replace(whole, validation_file=whole.train_file, test_file=whole.train_file)
    first = train(whole)
    parts = replace(whole, output_dir=whole.output_dir + "2")
    stop_at(parts, 5)
    second = train(replace(parts, resume_from_checkpoint="latest"))
    assert second.best_step == first.best_step and second.figures == first.figures
    assert first.best and second.best and first.best.read_bytes() == second.best.read_bytes()


def test_a_validation_that_a_kill_left_out_is_made_up_for(make_text_config: Make) -> None:
    config = make_text_config(**{**EVERYTHING, "max_train_steps": 4, "checkpointing_steps": 2}, validation_steps=2)
    config = replace(config, validation_file=config.train_file, keep_best=True)
    train(config)
    events = Path(config.output_dir) / "events.jsonl"
    lines = events.read_text().splitlines()
    cut = next(n for n, line in enumerate(lines) if '"event": "metrics"' in line)
    events.write_text("\n".join(lines[:cut]) + "\n")
    shutil.rmtree(Path(config.output_dir) / "checkpoints" / "step-4")
    train(replace(config, resume_from_checkpoint="latest"))
    found = [event for event in read_events(events) if event["event"] == "metrics"]
    assert [event["step"] for event in found] == [2, 4]


def test_a_constant_rate_may_be_run_longer(make_text_config: Make) -> None:
    settings = {"lr_scheduler": "constant", "checkpointing_steps": 4}
    whole = train(make_text_config(name="whole", max_train_steps=6, **settings))
    config = make_text_config(name="longer", max_train_steps=4, **settings)
    train(config)
    longer = train(replace(config, max_train_steps=6, resume_from_checkpoint="latest"))
    assert result_bytes(longer) == result_bytes(whole)
    with pytest.raises(ConfigError, match="past --max_train_steps 2"):
        train(replace(config, max_train_steps=2, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    "changes", [{"rank": 4}, {"learning_rate": 5e-4}, {"seed": 9}, {"method": "bitfit"}, {"max_length": 100}]
)
def test_other_settings_are_refused_by_name(make_text_config: Make, changes: dict[str, Any]) -> None:
    config = make_text_config(max_train_steps=2, checkpointing_steps=2)
    train(config)
    with pytest.raises(ConfigError, match=f"--{next(iter(changes))} was"):
        train(replace(config, resume_from_checkpoint="latest", **changes))


def test_other_rows_and_a_folder_with_a_run_are_refused(make_text_config: Make, text_files: dict[str, Path]) -> None:
    config = make_text_config(max_train_steps=2, checkpointing_steps=2)
    train(config)
    with pytest.raises(DatasetError, match="rows are not those that"):
        train(replace(config, train_file=str(text_files["labels"]), resume_from_checkpoint="latest"))
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config)
    train(replace(config, overwrite=True, max_train_steps=1))
    assert list(steps_in(Path(config.output_dir) / "checkpoints")) == [1]


def command(config: TextConfig) -> list[str]:
    """The words of a config: settings that are not at their default."""
    words, values = ["-m", "app.cli", "text"], to_dict(config)
    for item in settings_of(TextConfig):
        value = values[item.name]
        if value != item.default:
            words += [f"--{'' if value else 'no_'}{item.name}"] if item.kind is bool else [f"--{item.name}", str(value)]
    return words


def start(config: TextConfig, launcher: list[str] | None = None) -> subprocess.Popen[str]:
    threads = str(torch.get_num_threads()) if launcher is None else "1"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    words = [sys.executable, *(launcher or []), *command(config)]
    return subprocess.Popen(
        words, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for_step(process: subprocess.Popen[str], config: TextConfig, step: int) -> None:
    events = Path(config.output_dir) / "events.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if events.is_file() and f'"step": {step},' in events.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"the run never reached step {step}: {process.communicate()}")


def test_killed_and_resumed(make_text_config: Make) -> None:
    settings = {**EVERYTHING, "max_train_steps": 60, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    whole = train(make_text_config(name="whole", **settings))
    config = make_text_config(name="killed", **settings)
    process = start(config)
    wait_for_step(process, config, 7)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (Path(config.output_dir) / "adapter.safetensors").exists()
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert read_events(resumed.output_dir / "events.jsonl")[-1]["event"] == "end"
    assert result_bytes(resumed) == result_bytes(whole)


def test_ctrl_c_saves_and_says_how_to_go_on(make_text_config: Make) -> None:
    config = make_text_config(name="stopped", max_train_steps=50_000, checkpointing_steps=100_000)
    process = start(config)
    wait_for_step(process, config, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in err and "--resume_from_checkpoint latest" in out
    folder = Path(config.output_dir)
    assert (folder / "adapter.safetensors").is_file() and len(steps_in(folder / "checkpoints")) == 1


def run_two(config: TextConfig) -> Path:
    process = start(config, TORCHRUN)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert out.count("adapter: ") == 1
    return Path(config.output_dir)


def assert_same_adapter(one: Path, other: Path) -> None:
    first, second = load_file(one / "adapter.safetensors"), load_file(other / "adapter.safetensors")
    assert first.keys() == second.keys() and len(first) > 8
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


SHARED: dict[str, Any] = {"method": "lora+p-tuning", "num_virtual_tokens": 2, "adam_epsilon": 1e-4}


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_twice_the_batch(
    make_text_config: Make, text_folders: dict[str, Path]
) -> None:
    """And with accumulation and rows of unequal lengths; one of the two writes and judges."""
    settings = {**SHARED, "pretrained_model_name_or_path": str(text_folders["llama"])}
    big = make_text_config("causal-lm", "one", **settings, train_batch_size=8)
    big = replace(big, validation_file=big.train_file, validation_steps=2)
    one = train(big)
    small = replace(big, output_dir=big.output_dir + "2", train_batch_size=2, gradient_accumulation_steps=2)
    folder = run_two(small)
    assert_same_adapter(one.output_dir, folder)
    events = [read_events(place / "events.jsonl") for place in (one.output_dir, folder)]
    losses = [[event["loss"] for event in part if event["event"] == "step"] for part in events]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    found = [[event["figures"]["loss"] for event in part if event["event"] == "metrics"] for part in events]
    assert len(found[1]) == 2 and found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True], ids=["parts", "offload"])
def test_a_base_in_parts(make_text_config: Make, text_folders: dict[str, Path], offload: bool) -> None:
    settings = {**SHARED, "pretrained_model_name_or_path": str(text_folders["llama"]), "gradient_checkpointing": True}
    alone = make_text_config("causal-lm", "one", **settings, train_batch_size=4)
    alone = replace(alone, test_file=alone.train_file)
    one = train(alone)
    config = replace(alone, output_dir=alone.output_dir + "2", train_batch_size=2, fsdp=True, fsdp_cpu_offload=offload)
    folder = run_two(config)
    assert_same_adapter(one.output_dir, folder)
    notes = [event["message"] for event in read_events(folder / "events.jsonl") if event["event"] == "note"]
    assert any("the frozen base is in parts" in note for note in notes)
