"""What a run has told so far, read as it grows: each look costs what is new, however long the run is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.text import printable

MOST_POINTS = 500
_KEPT = 0.95  # of the smoothed loss at each step
_WARNINGS = 20  # that are kept
_HEAD = 200  # bytes by which a file is known again


@dataclass(frozen=True)
class Sample:
    """A preview: where it is, and what was asked for."""

    path: Path
    step: int
    prompt: str
    seed: int


@dataclass
class _Point:
    """Several steps in a row: the last one's number, their mean loss, and how the smoothed loss stands after them."""

    step: int
    loss: float
    count: int
    sum_smoothed: float
    weight: float


class Curve:
    """Losses by step in at most `MOST_POINTS` points. When there are more, neighbours become one: their mean."""

    def __init__(self) -> None:
        self._points: list[_Point] = []
        self._stride = 1

    def add(self, step: int, loss: float) -> None:
        last = self._points[-1] if self._points else _Point(0, 0.0, self._stride, 0.0, 0.0)
        smoothed = _KEPT * last.sum_smoothed + (1 - _KEPT) * loss
        weight = _KEPT * last.weight + (1 - _KEPT)
        if last.count < self._stride:
            last.loss += (loss - last.loss) / (last.count + 1)
            last.step, last.count, last.sum_smoothed, last.weight = step, last.count + 1, smoothed, weight
            return
        self._points.append(_Point(step, loss, 1, smoothed, weight))
        if len(self._points) > MOST_POINTS:
            self._halve()

    def cut(self, step: int) -> None:
        """Forget what came after a step: a run that goes on from there takes the following ones again."""
        while self._points and self._points[-1].step > step:
            self._points.pop()

    def raw(self) -> list[tuple[int, float]]:
        return [(point.step, point.loss) for point in self._points]

    def smooth(self) -> list[tuple[int, float]]:
        return [(point.step, point.sum_smoothed / point.weight) for point in self._points]

    def _halve(self) -> None:
        points, self._stride = self._points, 2 * self._stride
        self._points = [_joined(one, other) for one, other in zip(points[::2], points[1::2], strict=False)]
        if len(points) % 2:
            self._points.append(points[-1])


def _joined(one: _Point, other: _Point) -> _Point:
    count = one.count + other.count
    loss = (one.loss * one.count + other.loss * other.count) / count
    return _Point(other.step, loss, count, other.sum_smoothed, other.weight)


class Told:
    """What the events of a run say, put together.

    Attributes:
        started_at: when the last attempt had loaded its model; seconds since 1970, 0 for never.
        step, total: optimizer steps, taken and in all.
        speed: steps per second.
        memory, planned_memory: bytes; the plan is that of the run's beginning.
        metrics: {"validation/accuracy": [(step, value), …]}.
        checkpoint: the step of the last one.
        preparing: what is done before the first step, in words.
        error: why the last attempt failed.
        ended: the event that ended it, where it came to that.
        facts: what was told at its start: model, device, precision, …
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.started_at = 0.0
        self.step = self.total = 0
        self.speed: float | None = None
        self.memory: int | None = None
        self.planned_memory: int | None = None
        self.curve = Curve()
        self.metrics: dict[str, list[tuple[int, float]]] = {}
        self.samples: dict[str, Sample] = {}
        self.checkpoint: int | None = None
        self.warnings: list[str] = []
        self.preparing = ""
        self.error = ""
        self.ended: dict[str, Any] | None = None
        self.facts: dict[str, Any] = {}

    def take(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"_on_{event.get('event')}", None)
        if handler is not None:
            handler(event)

    def _on_start(self, event: dict[str, Any]) -> None:
        after = event.get("resumed_from") or 0
        self.started_at, self.step, self.total = event["time"], after, event["max_steps"]
        self.speed, self.ended, self.error, self.preparing, self.warnings = None, None, "", "", []
        self.curve.cut(after)
        self.samples = {name: sample for name, sample in self.samples.items() if sample.step <= after}
        self.metrics = {name: [p for p in points if p[0] <= after] for name, points in self.metrics.items()}
        self.facts = {name: value for name, value in event.items() if name not in ("event", "time")}

    def _on_prepare(self, event: dict[str, Any]) -> None:
        self.preparing = f"{event['what']}: {event['done']} of {event['total']}"

    def _on_step(self, event: dict[str, Any]) -> None:
        self.step, self.total, self.preparing = event["step"], event["max_steps"], ""
        self.speed, self.memory = event.get("speed"), event.get("memory")
        if event.get("loss") is not None:
            self.curve.add(event["step"], event["loss"])

    def _on_plan(self, event: dict[str, Any]) -> None:
        self.planned_memory = event["peak"]

    def _on_sample(self, event: dict[str, Any]) -> None:
        name = Path(event["path"]).name
        path = self._folder / "samples" / name
        self.samples[name] = Sample(path, event["step"], event["prompt"], event["seed"])

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        self.checkpoint = event["step"]

    def _on_metrics(self, event: dict[str, Any]) -> None:
        part = "validation" if event["part"] == "asked" else event["part"]
        for name, value in event["figures"].items():
            self._measured(f"{part}/{name}", event["step"], value)

    def _on_score(self, event: dict[str, Any]) -> None:
        for name in ("score", "likeness", "prompt_following", "diversity"):
            if event.get(name) is not None:
                self._measured(name, event["step"], event[name])

    def _measured(self, name: str, step: int, value: float) -> None:
        points = self.metrics.setdefault(name, [])
        if points and points[-1][0] == step:
            points.pop()
        points.append((step, value))

    def _on_warning(self, event: dict[str, Any]) -> None:
        message = printable(str(event["message"]), 500)
        if message not in self.warnings:
            self.warnings = [*self.warnings, message][-_WARNINGS:]

    def _on_error(self, event: dict[str, Any]) -> None:
        self.error = str(event["message"])

    def _on_end(self, event: dict[str, Any]) -> None:
        self.ended, self.preparing = event, ""
        self.step = event.get("step", self.step)


class Follower:
    """Reads `events.jsonl` as it grows, and from the beginning where it is another file than before."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / "events.jsonl"
        self._read, self._head = 0, b""
        self.told = Told(folder)

    def look(self) -> Told:
        """All that was told up to now."""
        try:
            with self._file.open("rb") as file:
                head = file.read(_HEAD)
                if not head.startswith(self._head) or file.seek(0, 2) < self._read:
                    self._forget()
                self._head = head if len(self._head) < _HEAD else self._head
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            self._forget()
            return self.told
        whole = new.rfind(b"\n") + 1  # a line that is being written is read next time
        self._read += whole
        for line in new[:whole].splitlines():
            self._take(line)
        return self.told

    def _take(self, line: bytes) -> None:
        """A line that is no event of ours, as a disk may make of one, says nothing."""
        try:
            self.told.take(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            return

    def _forget(self) -> None:
        self._read, self._head, self.told = 0, b"", Told(self._folder)


def log_tail(path: Path, lines: int = 40, most: int = 16_384) -> list[str]:
    """The last lines of a log, without control characters; of a line that is written over, what it was last."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - most))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    found = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    if size > most:
        found = found[1:]
    return [printable(line, 500) for line in found if line.strip()][-lines:]
