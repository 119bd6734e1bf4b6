"""The queue on disk, and who looks after it: a thread of an app that starts the next job when none runs."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from app.web import job_files as files
from app.web.job_state import ALIVE, standing
from app.web.worker import NOT_MY_TURN

_LOOK = 0.5  # seconds between two looks at the queue
_TAKES = 60.0  # seconds in which a worker takes its job
_TRIES = 5  # workers that may be killed before they take it
_GRACE = 300.0  # seconds beyond the time limit after which a run that does not stop is ended
_SOURCE = Path(__file__).resolve().parents[2]  # where `app` can be imported from
_log = logging.getLogger(__name__)


def folders(runs: Path) -> list[Path]:
    """The folders of all jobs."""
    return [file.parent for file in runs.glob(f"[A-Za-z0-9]*/{files.JOB}")]


def waiting(runs: Path) -> list[Path]:
    """The jobs that wait, the longest first."""
    orders = {}
    for folder in folders(runs):
        if (folder / files.QUEUED).exists():
            orders[folder] = files.read(folder / files.QUEUED).get("order", 0)
    return sorted(orders, key=lambda folder: (orders[folder], folder.name))


def end_worker(folder: Path, status: str, message: str) -> None:
    """End the process that works on a job, now, and say how that attempt ended."""
    now = standing(folder)
    process = files.process_of(now.worker)
    if process is None or now.status not in ALIVE:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(10)
    attempt = int(now.claimed.get("attempt", 1))
    if files.read(folder / files.RESULT).get("attempt") != attempt:  # it may have ended by itself just now
        files.end(folder, attempt, status, message)


class Starter:
    """Starts workers, one at a time; of several apps on one folder, one does at any moment.

    Args:
        module: what is run for a job.
    """

    def __init__(self, runs: Path, module: str) -> None:
        self._runs, self._module = runs, module
        self._workers: list[subprocess.Popen[bytes]] = []
        self._killed: dict[str, int] = {}  # workers that were, before they took their job
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._closing.clear()
            self._thread = threading.Thread(target=self._look_after, name="jobs", daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Look at the queue now."""
        self._wake.set()

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _look_after(self) -> None:
        while not self._closing.is_set():
            try:
                self._workers = [worker for worker in self._workers if worker.poll() is None]
                self._end_what_is_late()
                self._start_next()
            except Exception:  # the queue must not stand still because of one folder
                _log.exception("looking after the queue failed; trying again")
            self._wake.wait(_LOOK)
            self._wake.clear()

    def _start_next(self) -> None:
        """Start the job that waits longest, if none runs and no other app is starting one."""
        if not waiting(self._runs):
            return
        with files.locked(self._runs / files.STARTER, wait=False) as mine:
            if not mine or not self._nobody_works():
                return
            first = waiting(self._runs)[:1]
            if first:
                self._start(first[0])

    def _nobody_works(self) -> bool:
        with files.locked(self._runs / files.TURN, wait=False) as free:
            return free

    def _start(self, folder: Path) -> None:
        """Start a worker and wait until it has taken the job."""
        with (folder / files.LOG).open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", self._module, str(folder)], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, cwd=_SOURCE,
            )  # fmt: skip
        self._workers.append(worker)
        give_up = time.monotonic() + _TAKES
        while (folder / files.QUEUED).exists() and time.monotonic() < give_up and not self._closing.is_set():
            code = worker.poll()
            if code is not None:
                self._was_not_taken(folder, code)
                return
            time.sleep(0.02)

    def _was_not_taken(self, folder: Path, code: int) -> None:
        """A worker ended before it took its job. One that was killed, or had no turn, is followed by another."""
        self._killed[folder.name] = self._killed.get(folder.name, 0) + (code < 0)
        if code == NOT_MY_TURN or (code < 0 and self._killed[folder.name] < _TRIES):
            return
        order = files.claim(folder)
        if order is not None:
            what = f"the process could not be started (exit code {code}); the log below shows why"
            files.end(folder, int(order.get("attempt", 1)), "failed", what)

    def _end_what_is_late(self) -> None:
        """End runs that are far beyond their time and do not stop by themselves."""
        if self._nobody_works():
            return
        for folder in folders(self._runs):
            now = standing(folder)
            seconds = files.read(folder / files.JOB).get("limits", {}).get("wall_seconds")
            since = now.worker.get("since")
            if now.status not in ALIVE or not seconds or not since:
                continue
            if time.time() - since > seconds + _GRACE:
                end_worker(folder, "failed", "the time limit was reached and the run did not stop: it was ended")
