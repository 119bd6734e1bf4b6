"""TensorBoard and Weights & Biases, through accelerate's trackers, for those who have them installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lora_diffusion.errors import ConfigError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_trackers(report_to: str | None) -> list[str]:
    """The trackers that `--report_to` stands for.

    Raises:
        ConfigError: one was named that is not installed.
    """
    if report_to in (None, "none"):
        return []
    installed = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is not None]
    if report_to == "all":
        return installed
    if report_to not in installed:
        raise ConfigError(
            f"--report_to {report_to} needs the package {PACKAGES[str(report_to)]}: pip install "
            f"{PACKAGES[str(report_to)]}, or leave it out (events.jsonl is always written)"
        )
    return [str(report_to)]


class Trackers:
    """The trackers of one run; none of them is fine, too."""

    def __init__(self, names: list[str], folder: Path, config: dict[str, Any]) -> None:
        self._open: list[Any] = []
        if not names:
            return
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        PartialState()  # the trackers ask it whether they are on the main process
        for name in names:
            if name == "tensorboard":
                folder.mkdir(parents=True, exist_ok=True)
                tracker: Any = TensorBoardTracker("lora_diffusion", logging_dir=str(folder))
            else:
                tracker = WandBTracker("lora_diffusion")
            if hasattr(tracker, "start"):
                tracker.start()
            tracker.store_init_configuration({k: v for k, v in config.items() if isinstance(v, str | int | float)})
            self._open.append(tracker)

    def log(self, values: dict[str, float], step: int) -> None:
        for tracker in self._open:
            tracker.log(values, step=step)

    def finish(self) -> None:
        for tracker in self._open:
            tracker.finish()
