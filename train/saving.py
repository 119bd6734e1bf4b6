"""What every run writes and finds again, whatever it learns: checkpoints, the adapter, the best of it.

A recipe derives from `RunSaver` and says what travels inside the adapter's file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

import lora_diffusion as ld
from lora_diffusion.errors import ConfigError, DatasetError, TrainingError
from train import checkpoints
from train.config import differences, settings_of, to_dict
from train.distributed import ALONE, World
from train.learner import Learner
from train.record import RunFolder

BEST_FILE = "best.safetensors"
STATE_FILE = "state.json"
ADAPTER_FILE = "adapter.safetensors"
_SHARING = ("train_batch_size", "gradient_accumulation_steps")

Config = TypeVar("Config")


class RunSaver:
    """Writes for one run; every file appears complete or not at all.

    data_words: what the run is trained on, for an error. units: what a batch holds. uploaded: what goes to the hub.

    Args:
        target: what the adapter is in, a pipeline or a model.
    """

    data_words: ClassVar[str] = "data"
    units: ClassVar[str] = "samples"
    uploaded: ClassVar[tuple[str, ...]] = (ADAPTER_FILE, BEST_FILE, "README.md", "config.json")

    def __init__(self, folder: RunFolder, config: Any, target: Any, world: World = ALONE) -> None:
        self.folder, self.config, self.target, self.world = folder, config, target, world
        self.fingerprint = ""
        self.report: ld.SaveReport | None = None  # of the adapter that was written last
        self.passed_over: list[str] = []  # damaged checkpoints, in words

    def metadata(self, step: int) -> dict[str, Any]:
        """What travels inside the adapter's file: no times and no paths, so that the same run gives the same bytes."""
        raise NotImplementedError

    def find_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, or None to start from the beginning."""
        which = self.config.resume_from_checkpoint
        return None if which is None else checkpoints.find(self.folder.checkpoints, which, self.passed_over)

    def step_of(self, checkpoint: Path) -> int:
        """The step at which a checkpoint was made.

        Raises:
            ConfigError: it lies behind the end of this run.
        """
        step = int(read_state(checkpoint)["step"])
        if step > (self.config.max_train_steps or 0):
            raise ConfigError(f"{checkpoint} is at step {step}, past --max_train_steps {self.config.max_train_steps}")
        return step

    def check_data(self, checkpoint: Path | None, fingerprint: str) -> None:
        """Remember what the run is trained on; refuse to go on with other data.

        Raises:
            DatasetError: the data are not those of the checkpoint.
        """
        if checkpoint is not None and read_state(checkpoint)["data"] != fingerprint:
            raise DatasetError(
                f"the {self.data_words} are not those that {checkpoint} was trained on; put them back, "
                "or start again with --overwrite"
            )
        self.fingerprint = fingerprint

    def save_checkpoint(self, step: int, learner: Learner) -> Path:
        """Write `checkpoints/step-N` and remove the oldest beyond `--checkpoints_total_limit`."""
        config = self.config
        state = {
            "step": step,
            # All randomness is counted, not kept: seed and position are the whole of it (see `train.randomness`).
            "randomness": {"kind": "counter", "seed": config.seed},
            "position": step * config.gradient_accumulation_steps * config.train_batch_size * self.world.size,
            "processes": self.world.size,
            "data": self.fingerprint,
            "torch": torch.__version__,
            "config": to_dict(config),
        }

        def fill(place: Path) -> None:
            learner.save(place)
            self._write_adapter(place / ADAPTER_FILE, step)
            (place / STATE_FILE).write_text(json.dumps(state, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

        return checkpoints.write(self.folder.checkpoints, step, fill, keep=config.checkpoints_total_limit)

    def save_adapter(self, step: int) -> Path:
        """Write the result, `adapter.safetensors`."""
        return checkpoints.replace_file(self.folder.adapter_file, lambda path: self._write_adapter(path, step))

    def save_best(self, step: int, scores: dict[str, Any]) -> Path:
        """Write the adapter as it is now as `best.safetensors`, with what was judged of it."""

        def fill(path: Path) -> None:
            ld.save_adapter(self.target, path, metadata={**self.metadata(step), "scores": scores})

        return checkpoints.replace_file(self.folder.path / BEST_FILE, fill)

    def write_card(self, text: str) -> None:
        checkpoints.replace_file(self.folder.card_file, lambda path: _write(path, text))

    def keep_last(self, step: int, learner: Learner) -> str:
        """After a run has diverged: make the last good state the result, and say in words what was kept.

        The parameters after `step` gave NaN; what came before them has proved itself. So it is the last checkpoint
        before `step`; without one, the adapter one step back.
        """
        have = [item for item in checkpoints.steps_in(self.folder.checkpoints).items() if item[0] < step]
        if have:
            last, path = have[-1]
            checkpoints.replace_file(self.folder.adapter_file, lambda to: _copy(path / ADAPTER_FILE, to))
            return f"kept: the adapter of step {last} in {self.folder.adapter_file}"
        if step > 1:
            learner.step_back()
            self.save_adapter(step - 1)
            return f"kept: the adapter of step {step - 1} in {self.folder.adapter_file}"
        return "nothing was learned that could be kept"

    def push(self) -> str:
        """Upload adapter, card and settings to the hub; returns the repository's id.

        Raises:
            TrainingError: it did not work; the files are here all the same.
        """
        from huggingface_hub import HfApi

        try:
            name = self.config.hub_model_id or self.folder.path.resolve().name
            api = HfApi()
            repository = api.create_repo(name, exist_ok=True).repo_id
            api.upload_folder(repo_id=repository, folder_path=self.folder.path, allow_patterns=list(self.uploaded))
            return str(repository)
        except Exception as problem:  # the hub's client raises its own kinds, httpx's and the system's
            raise TrainingError(
                f"the upload failed ({' '.join(str(problem).split())[:200]}); "
                f"the adapter is in {self.folder.adapter_file}"
            ) from problem

    def _write_adapter(self, path: Path, step: int) -> None:
        self.report = ld.save_adapter(self.target, path, metadata=self.metadata(step))


def deciding(config: Any) -> dict[str, Any]:
    """The settings that decide the result."""
    values = to_dict(config)
    return {item.name: values[item.name] for item in settings_of(type(config)) if item.decides}


def with_label(config: Config) -> Config:
    """The config with a model folder named by its last part only."""
    values: Any = config
    label = model_label(values.pretrained_model_name_or_path)
    return dataclasses.replace(values, pretrained_model_name_or_path=label)


def model_label(name: str) -> str:
    """How a model is called in files that may be passed on: a hub id or `pocket` as it is, a folder by its own name."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_dir() else name


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint.

    Raises:
        ConfigError: it is missing or damaged.
    """
    try:
        return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{checkpoint} is no usable checkpoint: {problem}") from problem


def check_same_run(checkpoint: Path, config: Any, processes: int = 1, units: str = "samples") -> None:
    """Refuse to continue a run with settings that would have made another one.

    Only the number of steps may grow, and only where the learning rate does not depend on it; and another number of
    processes may share the steps, if a step has as many samples as before.

    Args:
        units: what a batch holds, in words.

    Raises:
        ConfigError: naming the settings that differ, with both values.
    """
    state = read_state(checkpoint)
    old, new = dict(state["config"]), to_dict(config)
    for values in (old, new):
        model = Path(str(values.get("pretrained_model_name_or_path"))).expanduser()
        if model.is_dir():
            values["pretrained_model_name_or_path"] = str(model.resolve())
    different = differences(old, new, type(config))
    before = int(state.get("processes", 1))
    if before != processes:
        had, has = (_samples(values, count) for values, count in ((old, before), (new, processes)))
        if had != has:
            raise ConfigError(
                f"{checkpoint} was made by {before} process{'es' * (before > 1)} with {had} {units} in a step, with "
                f"{processes} there are {has}; change --train_batch_size or --gradient_accumulation_steps"
            )
        different = [name for name in different if name not in _SHARING]
    if config.lr_scheduler in ("constant", "constant_with_warmup"):
        different = [name for name in different if name != "max_train_steps"]
    if different:
        listed = ", ".join(f"--{name} was {old.get(name)!r} and is {new[name]!r}" for name in different)
        raise ConfigError(
            f"{checkpoint} belongs to a run with other settings: {listed}; resume with the old ones, "
            "or start again with --overwrite or another --output_dir"
        )


def _samples(values: Mapping[str, Any], processes: int) -> int:
    """Samples in an optimizer step."""
    return processes * math.prod(int(values.get(name, 1)) for name in _SHARING)


def _copy(source: Path, to: Path) -> None:
    shutil.copyfile(source, to)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
