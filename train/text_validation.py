"""Validation while a text run trains: which steps, what was found, which step is the best, and when to end early.

What was found is in the run's events, so an interrupted run knows it again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_diffusion.errors import ConfigError
from train.record import RunFolder, read_events
from train.saving import BEST_FILE
from train.text_config import TextConfig

LOWER_IS_BETTER = ("loss", "perplexity")


class Validation:
    """The validations of one run.

    Args:
        figure: the name of the figure that says which step is the best.
        measure: from nothing to figures by name, of the model as it is now.
        save: writes the adapter as it is now as the best; called with the step and its figures.
    """

    def __init__(
        self, config: TextConfig, figure: str, measure: Callable[[], dict[str, float]], folder: RunFolder,
        save: Callable[[int, dict[str, Any]], Path],
    ) -> None:  # fmt: skip
        self._config, self._measure, self._folder, self._save = config, measure, folder, save
        self.figure = figure
        self._known: dict[int, dict[str, float]] = {}

    @property
    def best_step(self) -> int | None:
        """The earliest of the best steps."""
        best: int | None = None
        for step in sorted(self._known):
            if best is None or self._better(self._known[step], self._known[best]):
                best = step
        return best

    @property
    def best(self) -> dict[str, float] | None:
        return None if self.best_step is None else self._known[self.best_step]

    @property
    def file(self) -> Path:
        return self._folder.path / BEST_FILE

    def begin(self, start_step: int) -> None:
        """Remember what an interrupted run found up to `start_step`."""
        if start_step == 0:
            if self._folder.writes:
                self.file.unlink(missing_ok=True)
            return
        if not self._folder.events_file.is_file():
            return
        for event in read_events(self._folder.events_file):
            if event["event"] == "metrics" and event["part"] == "validation" and 0 < event["step"] <= start_step:
                self._known[event["step"]] = event["figures"]

    def due(self, step: int, last_step: int) -> bool:
        return step % (self._config.validation_steps or 1) == 0 or step == last_step

    def missing(self, step: int, last_step: int) -> bool:
        """Whether a run was interrupted between the checkpoint of a step and its validation."""
        return step > 0 and self.due(step, last_step) and step not in self._known

    def judge(self, step: int) -> None:
        """Measure; keep the adapter if there was no better one; tell what was found."""
        figures = self._measure()
        if self.figure not in figures:
            raise ConfigError(
                f"--metric_for_best {self.figure} is no figure of --task {self._config.task}; there are "
                f"{', '.join(figures)}"
            )
        self._known[step] = figures
        best = self.best_step == step
        if best and self._config.keep_best and self._folder.writes:
            self._save(step, figures)
        self._folder.emit("metrics", part="validation", step=step, figures=figures, best=best, figure=self.figure)

    def enough(self) -> bool:
        """Whether the last `--early_stopping_patience` validations were no better than the best before them."""
        patience, best = self._config.early_stopping_patience, self.best_step
        if patience is None or best is None:
            return False
        return sum(step > best for step in self._known) >= patience

    def _better(self, one: dict[str, float], other: dict[str, float]) -> bool:
        a, b = one[self.figure], other[self.figure]
        return a < b if self.figure in LOWER_IS_BETTER else a > b
