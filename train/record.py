"""A run on disk: one folder that the command line, the app and tests read alike.

config.json          everything that decides the result, resolved
events.jsonl         one JSON object per line, in order: start, step, sample, checkpoint, warning, end, …
checkpoints/step-N/  see `train.checkpoints`
samples/             previews
adapter.safetensors  the result, and README.md about it
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_diffusion.errors import ConfigError, TrainingError
from train import checkpoints

Event = dict[str, Any]
OnEvent = Callable[[Event], None]


class RunFolder:
    """The folder of one run.

    Events go to `events.jsonl` and to `on_event`; each has `event` (its kind) and `time` (seconds since 1970).

    Args:
        writes: False in processes that leave this to another one: nothing is written and nobody told.
    """

    def __init__(self, path: str | Path, on_event: OnEvent | None = None, *, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self._on_event = on_event
        self._log: Any = None

    config_file = property(lambda self: self.path / "config.json")
    events_file = property(lambda self: self.path / "events.jsonl")
    checkpoints = property(lambda self: self.path / "checkpoints")
    samples = property(lambda self: self.path / "samples")
    class_images = property(lambda self: self.path / "class_images")
    adapter_file = property(lambda self: self.path / "adapter.safetensors")
    card_file = property(lambda self: self.path / "README.md")

    def holds_a_run(self) -> bool:
        return self.adapter_file.exists() or bool(checkpoints.steps_in(self.checkpoints))

    def check_usable(self, *, resuming: bool, overwrite: bool) -> None:
        """Refuse a folder in which a run would be mixed with another one.

        Raises:
            ConfigError: it holds a run, and neither resuming nor overwriting was asked for; or it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--output_dir {self.path} is a file; give a folder")
        if self.holds_a_run() and not resuming and not overwrite:
            raise ConfigError(
                f"{self.path} already holds a run: go on with --resume_from_checkpoint latest, start again with "
                "--overwrite, or give another --output_dir"
            )
        if resuming and self.adapter_file.exists() and not checkpoints.steps_in(self.checkpoints):
            raise ConfigError(
                f"{self.path} holds an adapter but no checkpoint to go on from: start again with --overwrite, or give "
                "another --output_dir"
            )

    def open(self, config: Mapping[str, Any], *, fresh: bool, overwrite: bool = False) -> None:
        """Make the folder ready and write the config.

        Args:
            fresh: remove what an earlier run left, but for class pictures.
            overwrite: remove those, too.

        Raises:
            TrainingError: the folder cannot be written to.
        """
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if fresh:
                for folder in (self.checkpoints, self.samples, *([self.class_images] if overwrite else [])):
                    shutil.rmtree(folder, ignore_errors=True)
                for file in (self.events_file, self.adapter_file, self.card_file):
                    file.unlink(missing_ok=True)
            checkpoints.clean(self.checkpoints)
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            checkpoints.replace_file(self.config_file, lambda path: _write_text(path, text))
            _cut_torn_line(self.events_file)
            self._log = self.events_file.open("a", encoding="utf-8")
        except OSError as problem:
            raise TrainingError(f"the folder {self.path} cannot be written to: {problem}") from problem

    def emit(self, event: str, **values: Any) -> None:
        """Record an event and pass it on."""
        if not self.writes:
            return
        line = {"event": event, "time": round(time.time(), 3), **values}
        if self._log is not None:
            self._log.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._log.flush()
        if self._on_event is not None:
            self._on_event(line)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None


def read_events(path: Path) -> list[Event]:
    """The events of a run; a last line that was cut off by a kill is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _cut_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
