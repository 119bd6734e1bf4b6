"""A worker whose recipe needs no model: real folder, events, checkpoints and wishes, a step of some milliseconds.

`validation_epochs` is the milliseconds of a step, `seed` what happens at step 5: 1 a known error, 2 an unknown one,
3 the process ends without a word. Each step is a line "pid step" in steps.txt.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import app.console
from app.web import worker
from lora_diffusion.errors import TrainingError
from train import checkpoints
from train.dreambooth_config import DreamBoothConfig
from train.record import RunFolder


@dataclass
class Result:
    adapter: Path | None
    steps: int
    stopped: bool
    seconds_training: float = 1.0
    seconds: float = 1.0


def train(
    config: DreamBoothConfig, *, on_event: Callable[[dict[str, Any]], None], should_stop: Callable[[], bool],
    wishes: Callable[[], set[str]],
) -> Result:  # fmt: skip
    folder = RunFolder(config.output_dir, on_event)
    folder.check_usable(resuming=config.resume_from_checkpoint is not None, overwrite=config.overwrite)
    found = checkpoints.find(folder.checkpoints, "latest") if config.resume_from_checkpoint else None
    begin = 0 if found is None else json.loads((found / "state.json").read_text())["step"]
    folder.open({}, fresh=found is None, overwrite=config.overwrite)
    total = config.max_train_steps or 0
    folder.emit("start", recipe="dreambooth", model="quick", photos=1, device="cpu", precision="no", resolution=64,
                max_steps=total, resumed_from=begin or None)  # fmt: skip
    folder.emit("plan", peak=123, phase="training")
    for step in range(begin + 1, total + 1):
        time.sleep(config.validation_epochs / 1000)
        with (folder.path / "steps.txt").open("a") as file:
            file.write(f"{os.getpid()} {step}\n")
        if step == 5:
            _mishap(config.seed)
        folder.emit("step", step=step, max_steps=total, loss=1 / step, speed=100.0, memory=1000)
        asked = wishes()
        if step % config.checkpointing_steps == 0 or step == total or "save" in asked:
            _checkpoint(folder, step)
        if "sample" in asked:
            folder.emit("sample", step=step, path=str(folder.samples / f"step-{step}.png"), prompt="p", seed=0)
        if step < total and should_stop():
            _checkpoint(folder, step)
            return _end(folder, step, stopped=True)
    return _end(folder, total, stopped=False)


def _mishap(seed: int) -> None:
    if seed == 1:
        raise TrainingError("the loss became nan at step 5; lower --learning_rate")
    if seed == 2:
        raise RuntimeError("a bug")
    if seed == 3:
        os._exit(9)


def _checkpoint(folder: RunFolder, step: int) -> None:
    def fill(place: Path) -> None:
        (place / "state.json").write_text(json.dumps({"step": step}))

    checkpoints.write(folder.checkpoints, step, fill, keep=2)
    folder.emit("checkpoint", step=step, path="")


def _end(folder: RunFolder, step: int, *, stopped: bool) -> Result:
    folder.adapter_file.write_bytes(b"adapter")
    folder.emit("end", stopped=stopped, step=step, steps=step)
    folder.close()
    return Result(folder.adapter_file, step, stopped)


if __name__ == "__main__":
    app.console.quieten = lambda: None
    paths = list(worker.RECIPES["dreambooth"])
    worker.RECIPES = {"dreambooth": (paths[0], paths[1], "tests.app.web.quick_worker:train")}
    sys.exit(worker.main(sys.argv[1:]))
