"""A run that is interrupted and goes on ends with the bytes of one that never was."""

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

import pytest
import torch

from lora_diffusion import ConfigError, DatasetError
from train.checkpoints import steps_in
from train.config import settings_of, to_dict
from train.dreambooth import Result, train
from train.dreambooth_config import DreamBoothConfig
from train.record import read_events

Make = Callable[..., DreamBoothConfig]
REPOSITORY = Path(__file__).resolve().parents[2]

# Everything that has a state: momentum, a schedule, dropout, a scaler's kin, two adapters, an epoch in the middle.
EVERYTHING = {
    "max_train_steps": 10,
    "checkpointing_steps": 3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "lora_dropout": 0.2,
    "train_text_encoder": True,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "snr_gamma": 5.0,
}


def result_bytes(result: Result) -> bytes:
    assert result.adapter is not None
    return result.adapter.read_bytes()


def stop_at(config: DreamBoothConfig, step: int) -> Result:
    """Run until `step`, then ask for a stop."""
    reached: list[int] = []
    result = train(
        config,
        on_event=lambda event: reached.append(event["step"]) if event["event"] == "step" else None,
        should_stop=lambda: bool(reached) and reached[-1] >= step,
    )
    assert result.stopped and result.steps == step
    return result


def test_stopped_and_resumed_twice(make_config: Make) -> None:
    whole = train(make_config("whole", **EVERYTHING))
    config = make_config("parts", **EVERYTHING)
    stopped = stop_at(config, 4)
    assert list(steps_in(stopped.output_dir / "checkpoints")) == [3, 4]
    assert stopped.adapter is not None and result_bytes(stopped) != result_bytes(whole)
    stop_at(replace(config, resume_from_checkpoint="latest"), 5)
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert resumed.steps == 10
    assert result_bytes(resumed) == result_bytes(whole)
    starts = [event for event in read_events(resumed.output_dir / "events.jsonl") if event["event"] == "start"]
    assert [start["resumed_from"] for start in starts] == [None, 4, 5]


def test_with_all_that_can_be_done_to_pictures_and_captions(make_config: Make, rich: Path) -> None:
    settings = {
        **EVERYTHING, "instance_data_dir": str(rich), "aspect_ratio_buckets": "auto", "random_flip": True,
        "mask_dir": str(rich.parent / "masks"), "unmasked_weight": 0.1, "shuffle_caption": True, "keep_tokens": 1,
        "caption_template": "{caption}, photo", "caption_dropout_rate": 0.2, "dataloader_num_workers": 2,
    }  # fmt: skip
    whole = train(make_config("whole", **settings))
    config = make_config("parts", **settings)
    stop_at(config, 4)
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert result_bytes(resumed) == result_bytes(whole)
    (rich / "0.txt").write_text("sks dog elsewhere")
    with pytest.raises(DatasetError, match="not those that"):
        train(replace(config, resume_from_checkpoint="latest"))


def test_resumed_from_an_older_checkpoint_by_name(make_config: Make) -> None:
    config = make_config(max_train_steps=6, checkpointing_steps=2)
    first = result_bytes(train(config))
    again = train(replace(config, resume_from_checkpoint="checkpoint-2", validation_prompt=None))
    assert result_bytes(again) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"use_ema": True, "ema_decay": 0.9, "mixed_precision": "fp16"},
        {"optimizer": "schedule-free-adamw", "lr_scheduler": "constant_with_warmup", "loraplus_lr_ratio": 4.0},
        {"optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_lr": 1.0},
        {"with_prior_preservation": True, "prior_mode": "teacher", "class_prompt": "a dog", "optimizer": "adafactor"},
        {"multires_noise_iterations": 4, "input_perturbation": 0.1, "loss_type": "huber", "max_timestep": 500},
    ],
    ids=["average", "schedule-free", "prodigy", "teacher", "noise"],
)
def test_an_older_checkpoint_of_other_ways_to_learn(make_config: Make, changes: dict) -> None:
    """Steps 5 to 7 are taken twice, with a preview and a checkpoint in between only the first time."""
    settings = {**EVERYTHING, "max_train_steps": 7, "checkpointing_steps": 2, **changes}
    config = make_config(**settings, validation_prompt="x", validation_steps=3, num_validation_images=1,
                         validation_inference_steps=1)  # fmt: skip
    first = result_bytes(train(config))
    again = train(replace(config, resume_from_checkpoint="step-4", validation_prompt=None, checkpointing_steps=100))
    assert result_bytes(again) == first


def test_fp16_with_its_scaler(make_config: Make) -> None:
    settings = {"mixed_precision": "fp16", "max_train_steps": 4, "checkpointing_steps": 2}
    whole = train(make_config("whole", **settings))
    config = make_config("parts", **settings)
    stop_at(config, 2)
    assert result_bytes(train(replace(config, resume_from_checkpoint="latest"))) == result_bytes(whole)


def test_a_constant_rate_may_be_run_longer(make_config: Make) -> None:
    whole = train(make_config("whole", max_train_steps=6))
    config = make_config("longer", max_train_steps=4, checkpointing_steps=4)
    train(config)
    longer = train(replace(config, max_train_steps=6, resume_from_checkpoint="latest"))
    assert result_bytes(longer) == result_bytes(whole)
    with pytest.raises(ConfigError, match="past --max_train_steps 2"):
        train(replace(config, max_train_steps=2, resume_from_checkpoint="latest"))


def test_a_finished_run_is_left_as_it_is(make_config: Make) -> None:
    config = make_config(max_train_steps=2)
    first = result_bytes(train(config))
    again = train(replace(config, resume_from_checkpoint="latest"))
    assert again.steps == 2 and result_bytes(again) == first
    shutil.rmtree(again.output_dir / "checkpoints")
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        train(replace(config, resume_from_checkpoint="latest"))


def test_a_damaged_checkpoint_is_passed_over_with_a_word(make_config: Make) -> None:
    """The one before it is taken, and the end is the same."""
    whole = train(make_config("whole", **EVERYTHING))
    config = make_config("torn", **EVERYTHING)
    stop_at(config, 7)
    newest = Path(config.output_dir) / "checkpoints" / "step-7"
    for name in ("parameters.safetensors", "optimizer.pt"):
        data = bytearray((newest / name).read_bytes())
        data[len(data) // 2] ^= 1
        (newest / name).write_bytes(data)
    result = train(replace(config, resume_from_checkpoint="latest"))
    assert result_bytes(result) == result_bytes(whole)
    warnings = [e["message"] for e in read_events(result.output_dir / "events.jsonl") if e["event"] == "warning"]
    assert any("step-7 is damaged" in message and "passed over" in message for message in warnings)


def test_latest_without_a_checkpoint_begins(make_config: Make) -> None:
    result = train(make_config(max_train_steps=1, resume_from_checkpoint="latest"))
    assert any(event["event"] == "note" for event in read_events(result.output_dir / "events.jsonl"))


@pytest.mark.parametrize(
    "changes", [{"rank": 4}, {"learning_rate": 5e-4}, {"seed": 9}, {"train_text_encoder": True}, {"snr_gamma": 5.0}]
)
def test_other_settings_are_refused_by_name(make_config: Make, changes: dict) -> None:
    config = make_config(max_train_steps=2, checkpointing_steps=2)
    train(config)
    with pytest.raises(ConfigError, match=f"--{next(iter(changes))} was"):
        train(replace(config, resume_from_checkpoint="latest", **changes))


def test_other_pictures_are_refused(make_config: Make, photos: Path, tmp_path: Path) -> None:
    config = make_config(max_train_steps=2, checkpointing_steps=2)
    train(config)
    (tmp_path / "fewer").mkdir()
    (tmp_path / "fewer" / "0.png").write_bytes((photos / "0.png").read_bytes())
    with pytest.raises(DatasetError, match="not those that"):
        train(replace(config, instance_data_dir=str(tmp_path / "fewer"), resume_from_checkpoint="latest"))


def test_a_folder_with_a_run_is_not_overwritten_unasked(make_config: Make) -> None:
    config = make_config(max_train_steps=2, checkpointing_steps=1)
    train(config)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config)
    again = train(replace(config, overwrite=True, max_train_steps=1))
    assert list(steps_in(again.output_dir / "checkpoints")) == [1]


def command(config: DreamBoothConfig, *extra: str) -> list[str]:
    """The command line of a config: settings that are not at their default."""
    words = [sys.executable, "-m", "app.cli", "dreambooth"]
    values = to_dict(config)
    for item in settings_of(DreamBoothConfig):
        if values[item.name] != item.default:
            words += [f"--{item.name}"] if item.kind is bool else [f"--{item.name}", str(values[item.name])]
    return [*words, *extra]


def start(config: DreamBoothConfig, *extra: str) -> subprocess.Popen[str]:
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return subprocess.Popen(
        command(config, *extra),
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_step(process: subprocess.Popen[str], config: DreamBoothConfig, step: int) -> None:
    events = Path(config.output_dir) / "events.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if events.is_file() and f'"step": {step},' in events.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"the run never reached step {step}: {process.communicate()}")


def test_killed_and_resumed(make_config: Make) -> None:
    settings = {**EVERYTHING, "max_train_steps": 40, "lr_scheduler": "cosine", "checkpointing_steps": 2}
    whole = train(make_config("whole", **settings))
    config = make_config("killed", **settings)
    process = start(config)
    wait_for_step(process, config, 7)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (Path(config.output_dir) / "adapter.safetensors").exists()
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert read_events(resumed.output_dir / "events.jsonl")[-1]["event"] == "end"
    assert result_bytes(resumed) == result_bytes(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(make_config: Make, number: signal.Signals) -> None:
    config = make_config("stopped", max_train_steps=5000, checkpointing_steps=10_000)
    process = start(config)
    wait_for_step(process, config, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "Traceback" not in err and "--resume_from_checkpoint latest" in out
    folder = Path(config.output_dir)
    assert (folder / "adapter.safetensors").is_file() and len(steps_in(folder / "checkpoints")) == 1
    assert read_events(folder / "events.jsonl")[-1]["stopped"] is True


@pytest.mark.slow
def test_killed_again_and_again(make_config: Make) -> None:
    settings = {**EVERYTHING, "max_train_steps": 60, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    whole = train(make_config("whole", **settings))
    config = make_config("killed", **settings)
    for kill in range(8):
        process = start(config, "--resume_from_checkpoint", "latest")
        reached = max(steps_in(Path(config.output_dir) / "checkpoints"), default=0)
        wait_for_step(process, config, reached + 4)
        time.sleep(0.013 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert result_bytes(train(replace(config, resume_from_checkpoint="latest"))) == result_bytes(whole)
