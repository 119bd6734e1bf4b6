"""What a text run writes beside what every run does: PEFT's folder, metrics, its card, what the adapter's file says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import lora_diffusion as ld
from lora_diffusion.errors import LoraDiffusionError
from train import checkpoints
from train.distributed import ALONE, World
from train.record import RunFolder
from train.saving import RunSaver, deciding, with_label
from train.text_card import text_card
from train.text_config import TextConfig
from train.text_facts import labels_in, task_facts
from train.text_tasks.task import Task
from train.text_template import TextTemplate

METRICS_FILE = "metrics.json"
PEFT_FOLDER = "peft"


class TextSaver(RunSaver):
    """Writes for one text run."""

    data_words: ClassVar[str] = "rows"
    units: ClassVar[str] = "rows"
    uploaded: ClassVar[tuple[str, ...]] = (*RunSaver.uploaded, METRICS_FILE, f"{PEFT_FOLDER}/*")

    def __init__(self, folder: RunFolder, config: TextConfig, model: Any, task: Task, world: World = ALONE) -> None:
        super().__init__(folder, config, model, world)
        self.task = task

    def metadata(self, step: int) -> dict[str, Any]:
        return text_metadata(self.config, self.task, step, self.world.size)

    def save_peft(self) -> str | None:
        """Write the adapter for PEFT as well; returns why that cannot be, in words, where PEFT has no such method."""
        place, unfinished = self.folder.path / PEFT_FOLDER, self.folder.path / f".new-{PEFT_FOLDER}"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            ld.save_adapter(self.target, unfinished, format="peft")
        except LoraDiffusionError as problem:
            shutil.rmtree(unfinished, ignore_errors=True)
            return str(problem)
        shutil.rmtree(place, ignore_errors=True)
        unfinished.rename(place)
        return None

    def save_metrics(self, figures: Mapping[str, Any]) -> None:
        text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
        checkpoints.replace_file(self.folder.path / METRICS_FILE, lambda path: _write(path, text))

    def save_card(self, step: int, figures: Mapping[str, Any], parameters: tuple[int, int]) -> None:
        """parameters: how many are learned, and how many the model has."""
        labels = labels_in(task_facts(self.task)) or []
        self.write_card(
            text_card(with_label(self.config), steps=step, figures=figures, parameters=parameters, labels=labels)
        )


def text_metadata(config: TextConfig, task: Task, step: int, processes: int = 1) -> dict[str, Any]:
    """What travels inside the adapter file: no times and no paths, so that the same run gives the same bytes.

    `template` says how a row became the model's input; see `train.text_facts` for the rest that asking it needs.
    """
    public = with_label(config)
    template: TextTemplate | None = getattr(task, "template", None)
    return {
        "recipe": "text",
        "base_model": public.pretrained_model_name_or_path,
        "task": config.task,
        "method": config.method,
        **({} if template is None else {"template": asdict(template)}),
        **task_facts(task),
        "steps": step,
        **({"processes": processes} if processes > 1 else {}),
        "settings": {name: value for name, value in deciding(public).items() if value is not None},
    }


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
