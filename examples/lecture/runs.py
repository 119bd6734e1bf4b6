"""What the lecture's comparisons share: a run of the recipe on a pocket task, a file of finished runs, an interval.

A sweep that is killed goes on where it stopped: every finished run is in the file, and two processes may fill one file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.pocket_text import data_dir
from train.text_models import resolve_text_model

RESULTS = Path(__file__).with_name("results")
README = Path(__file__).with_name("README.md")
BATCH = 16

# Student's 97.5 % quantile for 2, 3, … values
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % t interval; half is None for a single seed."""

    mean: float
    half: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of 1 to 10 values."""
        count = len(values)
        if count == 1:
            return cls(values[0], None, 1)
        half = _STUDENT[count - 2] * statistics.stdev(values) / math.sqrt(count)
        return cls(statistics.mean(values), half, count)

    def percent(self) -> str:
        """Fractions as "98.2 ± 0.4"."""
        return f"{100 * self.mean:.1f}" + ("" if self.half is None else f" ± {100 * self.half:.1f}")


class Results:
    """A JSON file of finished runs of one model: {"model", "weights", "machine", "runs": [{"settings", …figures}]}.

    Runs of other weights are forgotten: the figures are those of the model as it is shipped.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.model = path, model
        self.weights = weights_of(model)

    def runs(self) -> list[dict[str, Any]]:
        """What is finished for these weights."""
        found = self.read()
        return list(found["runs"]) if found.get("weights") == self.weights else []

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The finished run of these settings."""
        return next((run for run in self.runs() if run["settings"] == settings), None)

    def add(self, settings: dict[str, Any], figures: dict[str, Any]) -> None:
        """Keep a run. Raises RuntimeError where the model was replaced while it was trained."""
        if weights_of(self.model) != self.weights:
            raise RuntimeError(f"{self.model} has other weights than when this sweep began: start it again")
        with _locked(self.path.parent):
            runs = [run for run in self.runs() if run["settings"] != settings]
            whole = {
                "model": self.model, "weights": self.weights, "machine": machine(),
                "runs": [*runs, {"settings": settings, **figures}],
            }  # fmt: skip
            lines = ",\n  ".join(json.dumps(run) for run in whole.pop("runs"))
            text = json.dumps(whole, indent=1).removesuffix("\n}") + f',\n "runs": [\n  {lines}\n ]\n}}\n'
            new = self.path.with_suffix(".new")
            new.write_text(text, encoding="utf-8")
            new.replace(self.path)


def classify(model: str, task: str, settings: dict[str, Any], *, keep: Path | None = None) -> dict[str, Any]:
    """Train a classification with the recipe.

    Args:
        task: a folder of the pocket data.
        settings: of `TextConfig`: method, seed, max_train_steps, learning_rate …
        keep: where the adapter file is copied to.

    Returns:
        accuracy on "validation" and "test" rows after the last step, loss on the former, learned parameters with the
        head, seconds.
    """
    from train.text import train
    from train.text_config import TextConfig

    begun: dict[str, Any] = {}

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            begun.update(event)

    files = {f"{part}_file": str(data_dir() / task / f"{part}.jsonl") for part in ("train", "validation", "test")}
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            TextConfig(
                model, "sequence-classification", output_dir=f"{folder}/run", plan=False, save_peft=False,
                checkpointing_steps=10**6, train_batch_size=BATCH, validation_batch_size=100,
                validation_steps=settings["max_train_steps"], lr_warmup_steps=settings["max_train_steps"] // 10,
                device="cpu", **files, **settings,
            ),
            on_event=listen,
        )  # fmt: skip
        if keep is not None and result.adapter is not None:
            keep.write_bytes(Path(result.adapter).read_bytes())
    figures = {part: round(result.figures[part]["accuracy"], 4) for part in ("validation", "test")}
    return {
        **figures,
        "validation_loss": round(result.figures["validation"]["loss"], 5),
        "learned": begun["learned_parameters"],
        "seconds": round(result.seconds_training, 1),
    }


def head_parameters(model: str, labels: int) -> int:
    """Of a BERT's pooler and classifier, which every method learns."""
    config = json.loads((Path(resolve_text_model(model)) / "config.json").read_text(encoding="utf-8"))
    width = int(config["hidden_size"])
    return width * width + width + width * labels + labels


def labels_of(task: str) -> int:
    """How many labels a pocket task has."""
    lines = (data_dir() / task / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return len({json.loads(line)["label"] for line in lines})


def weights_of(model: str) -> str:
    """The first 12 digits of the SHA-256 of a model's weights."""
    file = Path(resolve_text_model(model)) / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def machine() -> str:
    import torch

    names = [line for line in _cpu_lines() if line.startswith("model name")]
    name = names[0].split(":", 1)[1].strip() if names else platform.machine()
    return f"{name}, {torch.get_num_threads()} thread, torch {torch.__version__}"


def share_of(text: str, jobs: Sequence[Any]) -> list[Any]:
    """The jobs of one of several processes: "2/3" has the second, the fifth …"""
    number, _, count = text.partition("/")
    return list(jobs[int(number) - 1 :: int(count)])


def put_into_readme(name: str, table: str) -> None:
    """Put a table between the marks that this folder's README has for it."""
    text = README.read_text(encoding="utf-8")
    README.write_text(with_table(text, name, table), encoding="utf-8")


def with_table(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{table.strip()}\n\n{end}{rest.split(end)[1]}"


def _cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
