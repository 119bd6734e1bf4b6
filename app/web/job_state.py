"""The state of a job, from what lies in its folder and from nothing else: an app that was just started knows as much
as the one that queued the job, and a dead process never counts as a running one."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.web import job_files as files
from app.web.job_events import Follower, Sample, Told, log_tail

ALIVE = ("starting", "running", "stopping")
OVER = ("done", "stopped", "failed", "interrupted")
_SILENT = 60.0  # seconds without a sign of life after which it is said
TIME_LIMIT = "the time limit"  # begins the message of a run that it stopped

_IN_THE_PAGE = (
    (re.compile(r"(?:the same command with )?--resume_from_checkpoint latest"), "Resume"),
    (re.compile(r"(?:start again with )?--overwrite(?=[ ,;.]|$)"), "Start again"),
)


@dataclass(frozen=True)
class JobView:
    """A job as a page shows it.

    Attributes:
        id: the name of its folder.
        status: queued, starting, running, stopping, stopped, done, failed or interrupted.
        position: in the queue, from 1; None if it does not wait.
        speed: steps per second.
        loss_raw, loss_smooth: (step, value), at most `MOST_POINTS`.
        metrics: {"validation/accuracy": [(step, value), …]}.
        memory, planned_memory: bytes.
        message: what is going on or went wrong, and what to do.
        warnings: of this attempt.
        adapter: the file with what was learned, if there is one.
        created, started, ended: seconds since 1970; the last two are those of the last attempt.
        attempt: how often it was begun.
        wishes: of stop, sample, save, those that are yet to be granted.
        can_stop, can_resume, can_ask: whether Stop, Resume and the wishes (sample now, save now) make sense.
        facts: what the run told at its start: model, device, precision, …
    """

    id: str
    folder: Path
    recipe: str
    owner: str | None
    status: str
    message: str
    settings: dict[str, Any]
    position: int | None = None
    step: int = 0
    total: int = 0
    speed: float | None = None
    eta_seconds: float | None = None
    loss_raw: list[tuple[int, float]] = field(default_factory=list)
    loss_smooth: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    memory: int | None = None
    planned_memory: int | None = None
    warnings: list[str] = field(default_factory=list)
    log_tail: list[str] = field(default_factory=list)
    adapter: Path | None = None
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    attempt: int = 0
    wishes: tuple[str, ...] = ()
    can_stop: bool = False
    can_resume: bool = False
    can_ask: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """Where a job stands: its status, and what was read to know it."""

    status: str
    claimed: dict[str, Any]
    worker: dict[str, Any]
    result: dict[str, Any]


def standing(folder: Path, told: Told | None = None) -> Standing:
    """Where the job in a folder stands. Without `told`, a run that has begun counts as running."""
    waits = (folder / files.QUEUED).is_file()  # first: what has taken it since is seen below
    claimed = files.read(folder / files.CLAIMED)
    worker, result = files.read(folder / files.WORKER), files.read(folder / files.RESULT)
    if waits:
        return Standing("queued", claimed, worker, result)
    attempt = claimed.get("attempt")
    if attempt is not None and result.get("attempt") == attempt and result.get("status") in OVER:
        return Standing(str(result["status"]), claimed, worker, result)
    if attempt is not None and worker.get("attempt") == attempt:
        if files.process_of(worker) is None:
            latest = files.read(folder / files.RESULT)  # it may have ended since
            if latest.get("attempt") == attempt and latest.get("status") in OVER:
                return Standing(str(latest["status"]), claimed, worker, latest)
            return Standing(_left_behind(told, claimed), claimed, worker, {})
        return Standing(_alive(folder, told, claimed), claimed, worker, {})
    return Standing("interrupted", claimed, worker, {})


def view_of(folder: Path, follower: Follower, position: int | None = None) -> JobView:
    """The job in a folder, as it is now."""
    told = follower.look()
    job = files.read(folder / files.JOB)
    now = standing(folder, told)
    began = _of_this_attempt(told, now.claimed)
    step = told.step if began or now.status != "starting" else 0
    total = told.total or int(job.get("settings", {}).get("max_train_steps") or 0)
    left = total - told.step
    speed = told.speed if now.status in ALIVE else None
    resumable = now.status in ("stopped", "failed", "interrupted")
    adapter = folder / "adapter.safetensors"
    return JobView(
        id=folder.name, folder=folder, recipe=str(job.get("recipe", "")), owner=job.get("owner"), status=now.status,
        message=_message(now, told, folder, position, began), settings=dict(job.get("settings", {})), position=position,
        step=step, total=total, speed=speed,
        eta_seconds=left / speed if speed and now.status == "running" else None, loss_raw=told.curve.raw(),
        loss_smooth=told.curve.smooth(), metrics={name: list(points) for name, points in told.metrics.items()},
        samples=sorted(told.samples.values(), key=lambda one: (one.step, one.path.name)), memory=told.memory,
        planned_memory=told.planned_memory, warnings=list(told.warnings), log_tail=log_tail(folder / files.LOG),
        adapter=adapter if adapter.is_file() else None, created=float(job.get("created", 0.0)),
        started=_time(now.worker, "since") if now.status != "queued" else None, ended=_ended(now, told),
        attempt=int(now.claimed.get("attempt", 0)),
        wishes=tuple(wish for wish in files.WISHES if now.status in ALIVE and (folder / wish).exists()),
        can_stop=now.status in ("queued", *ALIVE), can_resume=resumable,
        can_ask=now.status == "running", facts=dict(told.facts),
    )  # fmt: skip


def in_words_of_the_page(message: str) -> str:
    """An error that names flags, for one who has buttons."""
    for pattern, words in _IN_THE_PAGE:
        message = pattern.sub(words, message)
    return message


def checkpoint_in(folder: Path) -> int | None:
    """The step of the last checkpoint that is there."""
    from train.checkpoints import steps_in

    return max(steps_in(folder / "checkpoints"), default=None)


def _alive(folder: Path, told: Told | None, claimed: dict[str, Any]) -> str:
    if (folder / "stop").exists():
        return "stopping"
    return "running" if told is None or _of_this_attempt(told, claimed) else "starting"


def _left_behind(told: Told | None, claimed: dict[str, Any]) -> str:
    """How the attempt of a dead worker ended that left no result: as its events say, else without a word."""
    if told is None or not _of_this_attempt(told, claimed):
        return "interrupted"
    if told.ended is not None:
        return "stopped" if told.ended.get("stopped") else "done"
    return "failed" if told.error else "interrupted"


def _of_this_attempt(told: Told, claimed: dict[str, Any]) -> bool:
    return told.started_at + 0.001 >= float(claimed.get("at", 0.0)) > 0  # events are told to the millisecond


def _message(now: Standing, told: Told, folder: Path, position: int | None, began: bool) -> str:
    if now.status == "queued":
        return f"waiting: number {position} in the queue"
    if now.status == "stopping":
        return f"stopping after this step; what was learned is kept{_silence(now)}"
    if now.status == "starting":
        return "loading the model"
    if now.status == "running":
        return (told.preparing or (f"step {told.step} of {told.total}" if told.step else "preparing")) + _silence(now)
    if now.status == "interrupted":
        if not began:
            return f"the process ended before the run had begun; {_resuming(folder)}"
        what = "was killed, ran out of memory, or the machine went down"
        return f"the process ended without a word at step {told.step}: it {what}; {_resuming(folder)}"
    message = in_words_of_the_page(str(now.result.get("message") or told.error or ""))
    if now.status == "done":
        return message or f"done: {told.step} steps"
    if now.status == "stopped":
        return f"{message or f'stopped at step {told.step}'}; {_resuming(folder)}"
    return message if "Resume" in message or "Start again" in message else f"{message}; then: {_resuming(folder)}"


def _resuming(folder: Path) -> str:
    step = checkpoint_in(folder)
    return "Resume starts from the beginning" if step is None else f"Resume goes on from step {step}"


def _silence(now: Standing) -> str:
    seconds = time.time() - float(now.worker.get("time", time.time()))
    return f"; no sign of life for {seconds:.0f} s" if seconds > _SILENT else ""


def _ended(now: Standing, told: Told) -> float | None:
    if now.status not in OVER:
        return None
    if now.result:
        return _time(now.result, "time")
    if told.ended is not None:
        return _time(told.ended, "time")
    return _time(now.worker, "time")


def _time(values: dict[str, Any], name: str) -> float | None:
    value = values.get(name)
    return float(value) if isinstance(value, int | float) else None
