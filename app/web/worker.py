"""One job in a process of its own, which neither a page nor the app that started it can take down.

    python -m app.web.worker RUNS/NAME

It takes the job that waits in this folder, unless another worker has a turn or has taken it, and leaves behind how it
ended. What it says goes to its output, which is the job's log.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.web import job_files as files
from app.web.job_checks import RECIPES, named
from app.web.job_state import TIME_LIMIT, checkpoint_in
from lora_diffusion.errors import ConfigError, LoraDiffusionError

NOT_MY_TURN = 75
_HEARTBEAT = 2.0  # seconds
_NICE = 5


class Watch:
    """What the run asks and tells while it goes on: wishes are files in its folder, read after each step.

    Args:
        seconds, steps: limits; beyond the first the run stops as if it had been asked to, the second is refused.
    """

    def __init__(self, folder: Path, seconds: float, steps: int, tell: Callable[[dict[str, Any]], None]) -> None:
        self._folder, self._seconds, self._steps, self._tell = folder, seconds, steps, tell
        self._began = time.monotonic()
        self.late = False
        self.asked: Callable[[], bool] = lambda: False

    def should_stop(self) -> bool:
        self.late = self.late or time.monotonic() - self._began > self._seconds
        return self.late or self.asked() or (self._folder / "stop").exists()

    def wishes(self) -> set[str]:
        """Those of `sample` and `save` that are there; asking grants them."""
        found = set()
        for wish in ("sample", "save"):
            try:
                (self._folder / wish).unlink()
            except FileNotFoundError:
                continue
            found.add(wish)
        return found

    def on_event(self, event: dict[str, Any]) -> None:
        self._tell(event)
        if event["event"] == "start" and event["max_steps"] > self._steps:
            raise ConfigError(f"this is {event['max_steps']:,} steps, and {self._steps:,} are the most allowed here")


def main(arguments: list[str]) -> int:
    """Returns 0 where there was nothing to do or it was done, 1 where it failed, `NOT_MY_TURN`."""
    folder = Path(arguments[0]).absolute()
    with files.locked(folder.parent / files.TURN, wait=False) as mine:
        if not mine:
            return NOT_MY_TURN
        attempt, since = files.read(folder / files.QUEUED).get("attempt"), time.time()
        if attempt is None:
            return 0
        files.sign_of_life(folder, attempt, since)  # first, so that nobody looks for who has claimed a job
        order = files.claim(folder)
        return 0 if order is None else _work(folder, attempt, since, bool(order.get("from_start")))


def _work(folder: Path, attempt: int, since: float, from_start: bool) -> int:
    over = threading.Event()
    heart = threading.Thread(target=_live, args=(folder, attempt, since, over), daemon=True)
    heart.start()
    print(f"— attempt {attempt}, {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
    try:
        status, values = _run(folder, from_start)
    except LoraDiffusionError as problem:
        status, values = "failed", {"message": " ".join(str(problem).split())}
        print(f"error: {problem}", flush=True)
    except KeyboardInterrupt:
        status, values = "stopped", {"message": "stopped at once"}
    except Exception as problem:
        traceback.print_exc()
        what = " ".join(str(problem).split())[:300]
        status = "failed"
        values = {"message": f"unexpected: {type(problem).__name__}: {what}; the log below shows where"}
    finally:
        over.set()
        heart.join()
    files.end(folder, attempt, status, **values)
    return 1 if status == "failed" else 0


def _run(folder: Path, from_start: bool) -> tuple[str, dict[str, Any]]:
    from app.console import Console, quieten
    from app.signals import StopWish

    job = files.read(folder / files.JOB)
    limits = job.get("limits", {})
    config = config_of(folder, job, from_start)
    train = named(RECIPES[job["recipe"]][2])
    quieten()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    console = Console(sys.stdout, sys.stdout)
    watch = Watch(folder, float(limits.get("wall_seconds", 1e9)), int(limits.get("steps", 10**9)), console)
    with StopWish() as asked:
        watch.asked = asked
        result = train(config, on_event=watch.on_event, should_stop=watch.should_stop, wishes=watch.wishes)
    if result.adapter is None:
        return "stopped", {"message": "stopped before the first step: there is nothing to keep", "step": 0}
    if result.stopped:
        why = f"{TIME_LIMIT} of {_in_words(limits)} was reached, and the run " if watch.late else ""
        return "stopped", {"message": f"{why}stopped at step {result.steps}, which is kept", "step": result.steps}
    message = f"done: {result.steps} steps in {result.seconds_training:.0f} s"
    return "done", {"message": message, "step": result.steps, "seconds": result.seconds}


def config_of(folder: Path, job: dict[str, Any], from_start: bool) -> Any:
    """The config of a job's next attempt: it goes on from the last checkpoint, or starts where there is none.

    Raises:
        ConfigError: `job.json` is not one.
    """
    from train.config import from_dict

    if job.get("recipe") not in RECIPES or not isinstance(job.get("settings"), dict):
        raise ConfigError(f"{folder / files.JOB} is missing or damaged; make the job again")
    values = {**job["settings"], "output_dir": str(folder)}
    if from_start or checkpoint_in(folder) is None:
        values["overwrite"] = from_start or (folder / "adapter.safetensors").exists()
    else:
        values["resume_from_checkpoint"] = "latest"
    return from_dict(named(RECIPES[job["recipe"]][0]), values)


def _in_words(limits: dict[str, Any]) -> str:
    minutes = float(limits.get("wall_seconds", 0)) / 60
    return f"{minutes:.0f} minutes" if minutes >= 1 else f"{60 * minutes:.0f} seconds"


def _live(folder: Path, attempt: int, since: float, over: threading.Event) -> None:
    while not over.wait(_HEARTBEAT):
        try:
            files.sign_of_life(folder, attempt, since)
        except OSError:  # a full disk: the run itself will say so
            continue


def _step_back() -> None:
    """Let pages and pictures go first."""
    import psutil

    process = psutil.Process()
    if sys.platform == "win32":
        process.nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)
    elif process.nice() < _NICE:
        process.nice(_NICE)


if __name__ == "__main__":
    _step_back()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main(sys.argv[1:]))
