"""Jobs: a queue on disk, one worker at a time, and what a page may ask of them.

    jobs = Jobs(Workspace("lora-diffusion"), Limits())
    jobs.start()
    name = jobs.submit("dreambooth", {"pretrained_model_name_or_path": "pocket", …}, "dog")
    jobs.view(name).status

Nothing is kept in memory that is not on disk: an app that is killed and started again, or a second one on the same
folder, sees the same jobs and goes on with the queue.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from app.web import job_files as files
from app.web.job_checks import checked
from app.web.job_events import Follower
from app.web.job_queue import Starter, end_worker, folders, waiting
from app.web.job_state import ALIVE, JobView, standing, view_of
from app.web.limits import Limits, Place
from app.web.places import Workspace, free_name, inside, suggested_name
from lora_diffusion.errors import ConfigError

__all__ = ["JobView", "Jobs"]

WORKER = "app.web.worker"
_REMOVED = "removed"  # a file in a run's folder that is in the trash
_KEPT = 24 * 3600.0  # seconds


class Jobs:
    """The jobs of a workspace.

    Where the limits say `private_runs`, an owner sees and touches their own only, and what is another's is answered as
    if it were not there. Elsewhere `owner` is written down and not asked for.

    Args:
        place: where the app runs; where no training is allowed, nothing is queued or resumed.
        worker: the module that is run for a job.
    """

    def __init__(
        self, workspace: Workspace, limits: Limits, place: Place | None = None, worker: str = WORKER
    ) -> None:  # fmt: skip
        self.workspace, self.limits, self.place = workspace, limits, place or Place()
        self._followers: dict[str, tuple[threading.Lock, Follower]] = {}
        self._starter = Starter(workspace.runs, worker)
        with self._door():
            for unfinished in self.workspace.runs.glob(".new-*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def submit(self, recipe: str, settings: Mapping[str, Any], name: str = "", owner: str | None = None) -> str:
        """Queue a job; returns its id, the name of its folder.

        Args:
            recipe: dreambooth or text.
            settings: fields of DreamBoothConfig or TextConfig, without output_dir.
            name: what the run is to be called; made usable, and another where it is taken.

        Raises:
            ConfigError, DatasetError: a setting that cannot be used or is beyond a limit; the queue is full.
        """
        self._check_allowed()
        values = checked(recipe, settings, self.workspace, self.limits)
        runs = self.workspace.runs
        with self._door():
            self._check_room(owner)
            job_id = free_name(runs, suggested_name(str(name or ""), recipe))
            unfinished = runs / f".new-{job_id}"
            unfinished.mkdir()
            job = {
                "recipe": recipe,
                "settings": values,
                "owner": owner,
                "created": time.time(),
                "name": str(name)[:200],
            }
            job["limits"] = {"wall_seconds": self.limits.wall_seconds, "steps": self.limits.steps}
            files.write(unfinished / files.JOB, job)
            files.queue(unfinished)
            unfinished.rename(runs / job_id)
        self._starter.wake()
        return job_id

    def jobs(self, owner: str | None = None) -> list[JobView]:
        """What goes on, then what waits in its order, then the rest, the newest first."""
        views = [self._view(folder) for folder in folders(self.workspace.runs) if self._may(folder, owner)]
        order = dict.fromkeys(ALIVE, 0) | {"queued": 1}
        return sorted(views, key=lambda view: (order.get(view.status, 2), view.position or 0, -view.created, view.id))

    def view(self, job_id: str, owner: str | None = None) -> JobView:
        """Raises ConfigError where there is no such job."""
        return self._view(self._folder(job_id, owner))

    def stop(self, job_id: str, owner: str | None = None, *, at_once: bool = False) -> None:
        """Let a job end after its step and keep what it learned; take it from the queue if it waits there.

        Args:
            at_once: end the process now. What was learned since the last checkpoint is lost.

        Raises:
            ConfigError: there is no such job, or it is over.
        """
        folder = self._folder(job_id, owner)
        with self._door():
            order = files.claim(folder)
            if order is not None:
                files.end(folder, int(order.get("attempt", 1)), "stopped", "taken from the queue before it began")
                return
            now = standing(folder)
            if now.status not in ALIVE:
                raise ConfigError(f"{job_id} is not running: it is {now.status}")
            (folder / "stop").touch()
        if at_once:
            end_worker(folder, "stopped", "stopped at once")

    def resume(self, job_id: str, owner: str | None = None, *, from_start: bool = False) -> None:
        """Queue a job again that was stopped, failed or was interrupted: it goes on from its last checkpoint, or starts
        where there is none.

        Args:
            from_start: start again from the beginning, whatever there is.

        Raises:
            ConfigError: there is no such job, it goes on, is done, or the queue is full.
        """
        self._check_allowed()
        folder = self._folder(job_id, owner)
        with self._door():
            status = self._status(folder)
            if status in ("queued", *ALIVE):
                raise ConfigError(f"{job_id} is {status} already")
            if status == "done" and not from_start:
                raise ConfigError(f"{job_id} is done; start again, or make a new run with more steps")
            self._check_room(files.read(folder / files.JOB).get("owner"))
            files.queue(folder, from_start=from_start)
        self._starter.wake()

    def sample_now(self, job_id: str, owner: str | None = None) -> None:
        """Let a run draw its previews, or measure its validation, after this step. Raises ConfigError."""
        self._wish(job_id, owner, "sample")

    def save_now(self, job_id: str, owner: str | None = None) -> None:
        """Let a run make a checkpoint after this step. Raises ConfigError."""
        self._wish(job_id, owner, "save")

    def remove(self, job_id: str, owner: str | None = None) -> Path:
        """Move a job's folder to the trash, for a day; returns where it is now.

        Raises:
            ConfigError: there is no such job, or it is running.
        """
        folder = self._folder(job_id, owner)
        with self._door():
            order = files.claim(folder)  # so that nobody starts it now
            if order is not None:
                files.end(folder, int(order.get("attempt", 1)), "stopped", "taken from the queue before it began")
            now = standing(folder)
            if files.process_of(now.worker) is not None and now.status in ALIVE:
                raise ConfigError(f"{job_id} is {now.status}; stop it first")
            place = self.workspace.trash / free_name(self.workspace.trash, job_id)
            (folder / _REMOVED).touch()
            folder.rename(place)
        self._followers.pop(job_id, None)
        self._empty_trash()
        return place

    def restore(self, name: str, owner: str | None = None) -> str:
        """Bring back a run that was removed; returns its id.

        Args:
            name: that of the folder which `remove` returned.

        Raises:
            ConfigError: it is not there any more.
        """
        folder = inside(self.workspace.trash, name)
        with self._door():
            if not (folder / _REMOVED).is_file() or not self._may(folder, owner):
                raise ConfigError(f"the run {name} can no longer be brought back: removed runs are kept for a day")
            job_id = free_name(self.workspace.runs, name)
            (folder / _REMOVED).unlink()
            folder.rename(self.workspace.runs / job_id)
        return job_id

    def start(self) -> None:
        """Begin to look after the queue, in a thread. Jobs that were started go on whether it runs or not."""
        if self.place.training_allowed:
            self._starter.start()

    def close(self) -> None:
        """Stop looking after the queue. A job that runs goes on."""
        self._starter.close()

    def _empty_trash(self) -> None:
        for mark in self.workspace.trash.glob(f"*/{_REMOVED}"):
            if time.time() - mark.stat().st_mtime > _KEPT:
                shutil.rmtree(mark.parent, ignore_errors=True)

    def _wish(self, job_id: str, owner: str | None, wish: str) -> None:
        folder = self._folder(job_id, owner)
        status = self._status(folder)
        if status != "running":
            raise ConfigError(f"{job_id} is {status}; this can be asked of a run that is running")
        (folder / wish).touch()

    def _check_allowed(self) -> None:
        if not self.place.training_allowed:
            raise ConfigError(f"no training here: {self.place.reason}")

    def _check_room(self, owner: str | None) -> None:
        count = len(waiting(self.workspace.runs))
        if count >= self.limits.queue_length:
            raise ConfigError(f"the queue is full: {count} runs wait; try again when one of them has begun")
        if not self.limits.private_runs:
            return
        own = [
            folder for folder in folders(self.workspace.runs) if files.read(folder / files.JOB).get("owner") == owner
        ]
        going = [folder.name for folder in own if standing(folder).status in ("queued", *ALIVE)]
        if len(going) >= self.limits.runs_each:
            raise ConfigError(f"you have {len(going)} runs that wait or go on ({', '.join(going)}); stop one, or wait")

    def _view(self, folder: Path) -> JobView:
        lock, follower = self._followers.setdefault(folder.name, (threading.Lock(), Follower(folder)))
        queue = [one.name for one in waiting(self.workspace.runs)] if (folder / files.QUEUED).exists() else []
        position = queue.index(folder.name) + 1 if folder.name in queue else None
        with lock:
            return view_of(folder, follower, position)

    def _status(self, folder: Path) -> str:
        return self._view(folder).status

    def _folder(self, job_id: str, owner: str | None) -> Path:
        """Raises ConfigError where there is no such job, or it is another's: in the same words."""
        folder = inside(self.workspace.runs, job_id)
        if not (folder / files.JOB).is_file() or not self._may(folder, owner):
            raise ConfigError(f"there is no run {job_id}; choose one of the list")
        return folder

    def _may(self, folder: Path, owner: str | None) -> bool:
        if not self.limits.private_runs:
            return True
        return owner is not None and files.read(folder / files.JOB).get("owner") == owner

    @contextlib.contextmanager
    def _door(self) -> Iterator[None]:
        """One change at a time, of all threads and apps."""
        with files.locked(self.workspace.runs / files.DOOR, wait=True):
            yield
