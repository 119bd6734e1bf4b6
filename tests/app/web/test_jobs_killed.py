"""Processes die at any moment; what is said of jobs stays true, no job is lost and none is done twice."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.web import job_files as files
from app.web.job_state import ALIVE, OVER
from app.web.jobs import Jobs
from app.web.limits import Limits
from app.web.places import Workspace
from train import checkpoints

REPOSITORY = Path(__file__).resolve().parents[3]
SEEDS = [11, 12, 13, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(14, 34))]
STEPS = 30


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "space")


class App:
    """An app in a process of its own, which can be killed and started again."""

    def __init__(self, space: Workspace) -> None:
        self._space = space
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.app.web.quick_app", str(self._space.root)], cwd=REPOSITORY,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None and self._process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()


@pytest.fixture
def app(space: Workspace) -> Iterator[App]:
    running = App(space)
    yield running
    running.kill()
    for process in workers(space.runs):
        process.kill()


def workers(place: Path) -> list[psutil.Process]:
    """The processes that were told this folder, or one in it, found without looking at any file."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            told = [word for word in words[-1:] if Path(word) == place or place in Path(word).parents]
            if told and any(word.endswith("worker") for word in words) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def check_picture(space: Workspace) -> None:
    """An app that was just started says of every job what is so."""
    jobs = Jobs(space, Limits())
    for view in jobs.jobs():
        before = {process.pid for process in workers(view.folder)}
        status = jobs.view(view.id).status
        after = {process.pid for process in workers(view.folder)}
        if before != after:
            continue  # something happened just now
        assert status in ("queued", *ALIVE, *OVER)
        if status in ALIVE:
            assert after, f"{view.id} is said to be {status}, and no process works on it"
        if after and status not in ALIVE:  # on its way in, or out
            assert status in ("queued", "done", "stopped", "failed")
        if status == "done":
            assert (view.folder / "adapter.safetensors").exists()
    alive = [view.id for view in jobs.jobs() if view.status in ALIVE]
    assert len(alive) <= 1, f"{alive} go on at once"


def check_steps(folder: Path) -> None:
    """No two processes took steps at the same time, each went on from a checkpoint, and the end was reached."""
    lines = [tuple(map(int, line.split())) for line in (folder / "steps.txt").read_text().splitlines()]
    runs = [[step for _, step in group] for _, group in groupby(lines, key=lambda line: line[0])]
    assert len(runs) == len({pid for pid, _ in lines}), "two processes took turns"
    for steps in runs:
        assert steps == list(range(steps[0], steps[0] + len(steps)))
    for before, after in pairwise(runs):
        assert after[0] <= before[-1] + 1 and (after[0] - 1) % 4 == 0
    assert runs[0][0] == 1 and runs[-1][-1] == STEPS
    assert len(runs) <= files.attempt_of(folder)


@pytest.mark.parametrize("seed", SEEDS)
def test_after_any_kill_the_picture_is_true_and_the_work_is_done(
    seed: int, space: Workspace, app: App, photos: Path
) -> None:
    chance = random.Random(seed)
    settings = {
        "pretrained_model_name_or_path": "pocket", "instance_data_dir": str(photos), "checkpointing_steps": 4,
        "instance_prompt": "a photo of sks dog", "max_train_steps": STEPS, "validation_epochs": 15,
    }  # fmt: skip
    jobs = Jobs(space, Limits())
    names = [jobs.submit("dreambooth", settings, "run") for _ in range(2)]
    kills = []
    for _ in range(5):
        time.sleep(chance.choice([chance.uniform(0.0, 0.3), chance.uniform(0.4, 1.2)]))
        victim = chance.choice(["worker", "app", "both"])
        kills.append(victim)
        if victim != "worker":
            app.kill()
        if victim != "app":
            for process in workers(space.runs):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        check_picture(space)
        if victim != "worker":
            app.start()
            check_picture(space)
        for view in Jobs(space, Limits()).jobs():
            if view.status == "interrupted":
                assert view.can_resume and view.message and view.ended is not None
                jobs.resume(view.id)
    print(f"seed {seed}: killed {', '.join(kills)}; attempts {[jobs.view(name).attempt for name in names]}")
    end = time.monotonic() + 60
    while any(view.status != "done" for view in jobs.jobs()):
        assert time.monotonic() < end, [(view.id, view.status, view.message, view.log_tail) for view in jobs.jobs()]
        check_picture(space)
        for view in jobs.jobs():
            if view.status == "interrupted":
                jobs.resume(view.id)
        time.sleep(0.1)
    for name in names:
        check_steps(space.runs / name)
        view = Jobs(space, Limits()).view(name)
        assert [step for step, _ in view.loss_raw] == list(range(1, STEPS + 1)) and not view.can_resume


def test_a_worker_outlives_its_app(space: Workspace, app: App, photos: Path) -> None:
    settings = {
        "pretrained_model_name_or_path": "pocket", "instance_data_dir": str(photos), "checkpointing_steps": 4,
        "instance_prompt": "a photo of sks dog", "max_train_steps": STEPS, "validation_epochs": 50,
    }  # fmt: skip
    jobs = Jobs(space, Limits())
    name = jobs.submit("dreambooth", settings, "run")
    _until(jobs, name, "running")
    pid = files.read(space.runs / name / files.WORKER)["pid"]
    app.kill()
    assert Jobs(space, Limits()).view(name).status == "running"
    app.start()
    view = _until(jobs, name, "done")
    assert view.attempt == 1 and {line.split()[0] for line in (view.folder / "steps.txt").read_text().splitlines()} == {
        str(pid)
    }
    app.kill()
    app.start()


@pytest.mark.slow
def test_a_real_run_is_killed_and_goes_on(space: Workspace, tiny_pipeline_dir: Path, photos: Path) -> None:
    """A DreamBooth worker on a tiny pipeline is killed while it trains, and goes on from its checkpoint."""
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": str(tiny_pipeline_dir), "instance_data_dir": str(photos),
        "instance_prompt": "a photo of sks dog", "max_train_steps": 60, "checkpointing_steps": 5,
        "checkpoints_total_limit": 2,
    }  # fmt: skip
    jobs = Jobs(space, Limits())
    jobs.start()
    try:
        name = jobs.submit("dreambooth", settings, "run")
        _until(jobs, name, "running", seconds=200)
        _wait(lambda: (jobs.view(name).step or 0) > 7, 100)
        psutil.Process(files.read(space.runs / name / files.WORKER)["pid"]).kill()
        view = _until(jobs, name, "interrupted")
        latest = max(checkpoints.steps_in(view.folder / "checkpoints"))
        assert f"Resume goes on from step {latest}" in view.message
        jobs.resume(name)
        view = _until(jobs, name, "done", seconds=200)
        assert view.facts["resumed_from"] == latest and view.adapter is not None
        assert [step for step, _ in view.loss_raw] == list(range(1, 61))
    finally:
        jobs.close()
        for process in workers(space.runs):
            process.kill()


@pytest.mark.slow
def test_a_real_text_run_answers_wishes(space: Workspace, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [
        f'{{"text": "The sky is {("blue", "green")[n % 2]} .", "label": "{("a", "b")[n % 2]}"}}' for n in range(16)
    ]
    rows.write_text("\n".join(lines) + "\n")
    settings = {
        "pretrained_model_name_or_path": "pocket-bert", "task": "sequence-classification", "train_file": str(rows),
        "validation_file": str(rows), "max_train_steps": 4000, "validation_steps": 4000,
    }  # fmt: skip
    jobs = Jobs(space, Limits())
    jobs.start()
    try:
        name = jobs.submit("text", settings, "run")
        _until(jobs, name, "running", "failed", seconds=200)
        _wait(lambda: jobs.view(name).step > 2, 100)
        jobs.sample_now(name)
        jobs.save_now(name)
        _wait(lambda: "validation/accuracy" in jobs.view(name).metrics, 60)
        jobs.stop(name)
        view = _until(jobs, name, "stopped")
        assert view.adapter is not None and 2 < view.step < 4000 and not view.wishes
        assert len(checkpoints.steps_in(view.folder / "checkpoints")) == 2
    finally:
        jobs.close()
        for process in workers(space.runs):
            process.kill()


def _until(jobs: Jobs, name: str, *statuses: str, seconds: float = 60) -> Any:
    _wait(lambda: jobs.view(name).status in statuses, seconds)
    return jobs.view(name)


def _wait(what: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)
