"""The files by which an app and its workers know of each other. All that is true of a job is in its folder:

job.json      what is to be done: recipe, settings, owner, limits
queued.json   it waits: when it came, which attempt, whether it starts again from the beginning
claimed.json  the same file after one process, and no other, has taken it: renaming is what makes it one
worker.json   who works on it: process id, when that process began, a sign of life
stop, sample, save   wishes of a page
result.json   how an attempt ended
log.txt       what the workers said

Beside them lies what the run itself writes (`train.record`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

JOB, QUEUED, CLAIMED, WORKER, RESULT = "job.json", "queued.json", "claimed.json", "worker.json", "result.json"
LOG = "log.txt"
WISHES = ("stop", "sample", "save")
DOOR, STARTER, TURN = ".door", ".starter", ".turn"  # locks in the folder of all runs
_SAME = 1.0  # seconds by which two answers to "when did this process begin" differ, as clocks are set


def read(path: Path) -> dict[str, Any]:
    """A small JSON file; empty if it is not there or is not ours."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Write a small JSON file so that a reader sees the old one or the new one, never half of one."""
    unfinished = path.with_name(f".new-{os.getpid()}-{path.name}")
    unfinished.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def claim(folder: Path) -> dict[str, Any] | None:
    """Take a waiting job; of several that try, one gets it. Returns what it waited with, or None."""
    try:
        (folder / QUEUED).replace(folder / CLAIMED)
    except OSError:
        return None
    return read(folder / CLAIMED)


def attempt_of(folder: Path) -> int:
    """The number of the last attempt that was claimed, from 1; 0 before the first."""
    return int(read(folder / CLAIMED).get("attempt", 0))


def queue(folder: Path, *, from_start: bool = False) -> None:
    """Let a job wait for its next attempt; wishes that were meant for the last one are void."""
    for wish in WISHES:
        (folder / wish).unlink(missing_ok=True)
    values = {"order": time.time_ns(), "at": time.time(), "attempt": attempt_of(folder) + 1, "from_start": from_start}
    write(folder / QUEUED, values)


def end(folder: Path, attempt: int, status: str, message: str, **values: Any) -> None:
    """Say how an attempt ended: done, stopped or failed."""
    result = {"attempt": attempt, "status": status, "message": message, "time": time.time(), **values}
    write(folder / RESULT, result)


def sign_of_life(folder: Path, attempt: int, since: float) -> None:
    """Say that this process works on the job, and since when. When it began is asked anew each time: clocks are set."""
    began, now = psutil.Process().create_time(), time.time()
    write(folder / WORKER, {"attempt": attempt, "pid": os.getpid(), "began": began, "since": since, "time": now})


def process_of(worker: Mapping[str, Any]) -> psutil.Process | None:
    """The process that a `worker.json` is about, if it lives: that number, begun at that time, and no zombie."""
    try:
        process = psutil.Process(int(worker["pid"]))
        same = abs(process.create_time() - float(worker["began"])) < _SAME
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (KeyError, TypeError, ValueError, psutil.Error):
        return None


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock that the system takes back when this process dies, however it dies.

    Yields:
        Whether it is held; always True with `wait`.
    """
    with path.open("ab") as file:
        yield _lock(file.fileno(), wait)


def _lock(handle: int, wait: bool) -> bool:
    if sys.platform == "win32":
        import msvcrt

        while True:
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(0.01)
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
