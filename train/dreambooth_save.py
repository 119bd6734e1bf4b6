"""What a DreamBooth run writes and finds again: checkpoints, the adapter, its card."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import lora_diffusion as ld
from lora_diffusion.errors import ConfigError, DatasetError, TrainingError
from lora_diffusion.files.embedding import write_embeddings
from train import checkpoints
from train.card import dreambooth_card
from train.config import differences, settings_of, to_dict
from train.distributed import ALONE, World
from train.dreambooth_config import DreamBoothConfig
from train.learner import Learner
from train.record import RunFolder

BEST_FILE = "best.safetensors"
STATE_FILE = "state.json"
ADAPTER_FILE = "adapter.safetensors"
EMBEDDINGS_FOLDER = "embeddings"
_SHARING = ("train_batch_size", "gradient_accumulation_steps")


class Saver:
    """Writes for one run; every file appears complete or not at all."""

    def __init__(self, folder: RunFolder, config: DreamBoothConfig, pipe: Any, world: World = ALONE) -> None:
        self.folder, self.config, self.pipe, self.world = folder, config, pipe, world
        self.fingerprint = ""
        self.report: ld.SaveReport | None = None  # of the adapter that was written last
        self.passed_over: list[str] = []  # damaged checkpoints, in words

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
        """Remember what the run is trained on; refuse to go on with other pictures.

        Raises:
            DatasetError: the pictures are not those of the checkpoint.
        """
        if checkpoint is not None and read_state(checkpoint)["data"] != fingerprint:
            raise DatasetError(
                f"the pictures, captions or masks are not those that {checkpoint} was trained on; put them back, "
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
        """Write the result, `adapter.safetensors`, and a new word once more for tools that load words by themselves."""
        if self.config.placeholder_token is not None:
            write_embeddings(ld.get_adapter(self.pipe), self.folder.path / EMBEDDINGS_FOLDER)
        return checkpoints.replace_file(self.folder.adapter_file, lambda path: self._write_adapter(path, step))

    def save_best(self, step: int, scores: dict[str, Any]) -> Path:
        """Write the adapter as it is now as `best.safetensors`, with what was judged of it."""

        def fill(path: Path) -> None:
            ld.save_adapter(self.pipe, path, metadata={**self._metadata(step), "scores": scores})

        return checkpoints.replace_file(self.folder.path / BEST_FILE, fill)

    def save_card(self, step: int, samples: list[Path]) -> None:
        public = replace_model(self.config)
        latest = [path for path in samples if samples and path.name.split("-")[1] == samples[-1].name.split("-")[1]]
        text = dreambooth_card(public, steps=step, samples=latest)
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
            api.upload_folder(
                repo_id=repository,
                folder_path=self.folder.path,
                allow_patterns=[
                    ADAPTER_FILE,
                    BEST_FILE,
                    "README.md",
                    "config.json",
                    "samples/*.png",
                    f"{EMBEDDINGS_FOLDER}/*",
                ],
            )
            return str(repository)
        except Exception as problem:  # the hub's client raises its own kinds, httpx's and the system's
            raise TrainingError(
                f"the upload failed ({' '.join(str(problem).split())[:200]}); "
                f"the adapter is in {self.folder.adapter_file}"
            ) from problem

    def _write_adapter(self, path: Path, step: int) -> None:
        self.report = ld.save_adapter(self.pipe, path, metadata=self._metadata(step))

    def _metadata(self, step: int) -> dict[str, Any]:
        return adapter_metadata(self.config, step, self.world.size)


def adapter_metadata(config: DreamBoothConfig, step: int, processes: int = 1) -> dict[str, Any]:
    """What travels inside the adapter file: no times and no paths, so that the same run gives the same bytes."""
    public = replace_model(config)
    return {
        "recipe": "dreambooth",
        "base_model": public.pretrained_model_name_or_path,
        "instance_prompt": config.instance_prompt,
        **({"trigger_words": [word]} if (word := config.placeholder_token or config.subject_token) else {}),
        "steps": step,
        **({"processes": processes} if processes > 1 else {}),
        "settings": {name: value for name, value in deciding(public).items() if value is not None},
    }


def deciding(config: DreamBoothConfig) -> dict[str, Any]:
    """The settings that decide the result."""
    values = to_dict(config)
    return {item.name: values[item.name] for item in settings_of(DreamBoothConfig) if item.decides}


def replace_model(config: DreamBoothConfig) -> DreamBoothConfig:
    """The config with a model folder named by its last part only."""
    from dataclasses import replace

    label = model_label(config.pretrained_model_name_or_path)
    return replace(config, pretrained_model_name_or_path=label)


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


def check_same_run(checkpoint: Path, config: DreamBoothConfig, processes: int = 1) -> None:
    """Refuse to continue a run with settings that would have made another one.

    Only the number of steps may grow, and only where the learning rate does not depend on it; and another number of
    processes may share the steps, if a step has as many pictures as before.

    Raises:
        ConfigError: naming the settings that differ, with both values.
    """
    state = read_state(checkpoint)
    old, new = dict(state["config"]), to_dict(config)
    for values in (old, new):
        model = Path(str(values["pretrained_model_name_or_path"])).expanduser()
        if model.is_dir():
            values["pretrained_model_name_or_path"] = str(model.resolve())
    different = differences(old, new, DreamBoothConfig)
    before = int(state.get("processes", 1))
    if before != processes:
        had, has = (_pictures(values, count) for values, count in ((old, before), (new, processes)))
        if had != has:
            raise ConfigError(
                f"{checkpoint} was made by {before} process{'es' * (before > 1)} with {had} pictures in a step, with "
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


def _pictures(values: Mapping[str, Any], processes: int) -> int:
    """Pictures in an optimizer step."""
    return processes * math.prod(int(values[name]) for name in _SHARING)


def _copy(source: Path, to: Path) -> None:
    shutil.copyfile(source, to)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
