"""Jobs: what may be queued, in which order it is done, what can be asked of it, and what is told of it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.web import job_files as files
from app.web.job_checks import checked
from app.web.job_events import MOST_POINTS, Curve, Follower, log_tail
from app.web.job_state import in_words_of_the_page, view_of
from app.web.jobs import Jobs, JobView
from app.web.limits import PUBLIC, Limits, Place, where
from app.web.places import Workspace
from app.web.worker import config_of
from lora_diffusion.errors import ConfigError, DatasetError
from train.dreambooth_checks import validate
from train.dreambooth_config import DreamBoothConfig

QUICK = "tests.app.web.quick_worker"


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "space")


@pytest.fixture
def make(space: Workspace) -> Iterator[Callable[..., Jobs]]:
    """Jobs on the same folder, with a recipe that needs no model; closed at the end."""
    made: list[Jobs] = []

    def new(limits: Limits | None = None, place: Place | None = None) -> Jobs:
        made.append(Jobs(space, limits or Limits(), place, worker=QUICK))
        return made[-1]

    yield new
    for jobs in made:
        jobs.close()
        for view in Jobs(space, Limits()).jobs():
            if view.can_stop:
                Jobs(space, Limits()).stop(view.id, at_once=True)


@pytest.fixture
def settings(photos: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": "pocket", "instance_data_dir": str(photos),
        "instance_prompt": "a photo of sks dog", "max_train_steps": 8, "checkpointing_steps": 3,
        "validation_epochs": 5,
    }  # fmt: skip


def until(jobs: Jobs, name: str, *statuses: str, seconds: float = 60) -> JobView:
    end = time.monotonic() + seconds
    while (view := jobs.view(name)).status not in statuses:
        assert time.monotonic() < end, (view.status, view.message, view.log_tail)
        time.sleep(0.02)
    return view


def steps_of(folder: Path) -> list[int]:
    return [int(line.split()[1]) for line in (folder / "steps.txt").read_text().splitlines()]


def test_a_job_is_done_and_told_of(make: Callable[..., Jobs], settings: dict[str, Any]) -> None:
    jobs = make()
    name = jobs.submit("dreambooth", settings, "My dog!")
    assert name == "My-dog"
    view = jobs.view(name)
    assert (view.status, view.position, view.total, view.recipe) == ("queued", 1, 8, "dreambooth")
    assert view.can_stop and not view.can_resume and not view.can_ask and "number 1" in view.message
    jobs.start()
    view = until(jobs, name, "done", "failed")
    assert view.status == "done" and view.step == view.total == 8 and "8 steps" in view.message
    assert [step for step, _ in view.loss_raw] == list(range(1, 9)) and view.loss_raw[3] == (4, 0.25)
    assert view.planned_memory == 123 and view.memory == 1000 and view.adapter == view.folder / "adapter.safetensors"
    assert view.started is not None and view.ended is not None and view.created <= view.started <= view.ended
    assert not view.can_stop and not view.can_resume and view.attempt == 1
    assert any("8/8" in line for line in view.log_tail)
    with pytest.raises(ConfigError, match="done"):
        jobs.resume(name)
    with pytest.raises(ConfigError, match="is done"):
        jobs.stop(name)


def test_jobs_are_done_one_after_the_other_in_their_order(
    make: Callable[..., Jobs], settings: dict[str, Any], space: Workspace
) -> None:
    names = [make().submit("dreambooth", settings, "run") for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]
    jobs = make()  # another app, started later
    assert [(view.id, view.position) for view in jobs.jobs()] == [("run", 1), ("run-2", 2), ("run-3", 3)]
    jobs.stop("run-2")
    assert jobs.view("run-2").status == "stopped" and "queue" in jobs.view("run-2").message
    assert jobs.view("run-3").position == 2
    jobs.start()
    make().start()  # two apps on one folder still do one job at a time
    done = until(jobs, "run-3", "done", "failed")
    first = jobs.view("run")
    assert first.status == "done" and first.ended is not None and done.started is not None
    assert first.ended <= done.started
    assert not (space.runs / "run-2" / "steps.txt").exists()
    assert steps_of(space.runs / "run") == steps_of(space.runs / "run-3") == list(range(1, 9))


def test_stop_keeps_what_was_learned_and_resume_goes_on(make: Callable[..., Jobs], settings: dict[str, Any]) -> None:
    jobs = make()
    jobs.start()
    name = jobs.submit("dreambooth", {**settings, "max_train_steps": 400, "checkpointing_steps": 1000}, "run")
    until(jobs, name, "running")
    jobs.stop(name)
    assert jobs.view(name).status in ("stopping", "stopped")
    view = until(jobs, name, "stopped")
    assert 0 < view.step < 400 and view.can_resume and view.adapter is not None
    assert f"Resume goes on from step {view.step}" in view.message
    jobs.resume(name)
    with pytest.raises(ConfigError, match="already"):
        jobs.resume(name)
    end = until(jobs, name, "done", "failed")
    assert end.status == "done" and end.attempt == 2
    assert steps_of(end.folder) == list(range(1, 401))
    assert [step for step, _ in end.loss_raw] == list(range(1, 401))


def test_start_again_forgets_what_there_is(make: Callable[..., Jobs], settings: dict[str, Any]) -> None:
    jobs = make()
    jobs.start()
    name = jobs.submit("dreambooth", settings, "run")
    until(jobs, name, "done")
    jobs.resume(name, from_start=True)
    view = until(jobs, name, "done", "failed")
    assert view.attempt == 2 and view.status == "done" and steps_of(view.folder) == [*range(1, 9), *range(1, 9)]
    assert [step for step, _ in view.loss_raw] == list(range(1, 9))


def test_sample_now_and_save_now_reach_the_run_once(make: Callable[..., Jobs], settings: dict[str, Any]) -> None:
    jobs = make()
    name = jobs.submit("dreambooth", {**settings, "max_train_steps": 500, "checkpointing_steps": 1000}, "run")
    with pytest.raises(ConfigError, match="is queued"):
        jobs.sample_now(name)
    jobs.start()
    until(jobs, name, "running")
    jobs.sample_now(name)
    jobs.save_now(name)
    end = time.monotonic() + 30
    while (view := jobs.view(name)).wishes:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert [path.name for path in (view.folder / "checkpoints").iterdir()]
    jobs.stop(name)
    view = until(jobs, name, "stopped")
    assert len(view.samples) == 1 and view.samples[0].path == view.folder / "samples" / view.samples[0].path.name


@pytest.mark.parametrize(
    ("seed", "status", "said"),
    [
        (1, "failed", "the loss became nan"),
        (2, "failed", "RuntimeError: a bug"),
        (3, "interrupted", "without a word at step 4"),
    ],
)
def test_what_went_wrong_is_said_with_a_way_on(
    make: Callable[..., Jobs], settings: dict[str, Any], seed: int, status: str, said: str
) -> None:
    jobs = make()
    jobs.start()
    name = jobs.submit("dreambooth", {**settings, "seed": seed}, "run")
    view = until(jobs, name, "failed", "interrupted", "done")
    assert view.status == status and said in view.message and "Resume goes on from step 3" in view.message
    assert view.can_resume and view.ended is not None and view.step == 4
    if seed == 2:
        assert any("Traceback" in line for line in view.log_tail)
    jobs.resume(name)
    again = until(jobs, name, "failed", "interrupted", "done")
    assert again.attempt == 2 and steps_of(view.folder) == [1, 2, 3, 4, 5, 4, 5]
    assert [step for step, _ in again.loss_raw] == [1, 2, 3, 4]


def test_a_worker_that_cannot_be_started_fails_its_job_once(space: Workspace, settings: dict[str, Any]) -> None:
    jobs = Jobs(space, Limits(), worker="tests.app.web.no_such_worker")
    name = jobs.submit("dreambooth", settings, "run")
    jobs.start()
    try:
        view = until(jobs, name, "failed")
    finally:
        jobs.close()
    assert "could not be started" in view.message and any("no_such_worker" in line for line in view.log_tail)


def test_a_run_is_stopped_at_its_time_limit(make: Callable[..., Jobs], settings: dict[str, Any]) -> None:
    jobs = make(Limits(wall_seconds=1))
    jobs.start()
    name = jobs.submit("dreambooth", {**settings, "max_train_steps": 5000}, "run")
    view = until(jobs, name, "stopped", "done", "failed")
    assert view.status == "stopped" and "the time limit" in view.message and 0 < view.step < 5000 and view.adapter


def test_at_once_ends_the_process(make: Callable[..., Jobs], settings: dict[str, Any]) -> None:
    jobs = make()
    jobs.start()
    name = jobs.submit("dreambooth", {**settings, "max_train_steps": 10, "validation_epochs": 60_000}, "run")
    until(jobs, name, "running")
    process = files.process_of(files.read(jobs.view(name).folder / files.WORKER))
    jobs.stop(name, at_once=True)
    assert jobs.view(name).status == "stopped" and process is not None
    assert not process.is_running() or process.status() == "zombie"


def test_a_removed_run_is_in_the_trash(make: Callable[..., Jobs], settings: dict[str, Any], space: Workspace) -> None:
    jobs = make()
    name = jobs.submit("dreambooth", settings, "run")
    place = jobs.remove(name)
    assert place.parent == space.trash and not jobs.jobs() and not (space.runs / name).exists()
    with pytest.raises(ConfigError, match="there is no run"):
        jobs.view(name)
    assert jobs.restore(place.name) == name and jobs.view(name).status == "stopped" and not list(space.trash.iterdir())
    with pytest.raises(ConfigError, match="no longer"):
        jobs.restore(place.name)
    old = jobs.remove(name)
    os.utime(old / "removed", (0, 0))
    jobs.remove(jobs.submit("dreambooth", settings, "other"))
    assert not old.exists() and len(list(space.trash.iterdir())) == 1
    jobs.start()
    name = jobs.submit("dreambooth", {**settings, "max_train_steps": 1000}, "run")
    until(jobs, name, "running")
    with pytest.raises(ConfigError, match="stop it first"):
        jobs.remove(name)


def test_one_visitor_cannot_see_or_touch_anothers_run(space: Workspace, settings: dict[str, Any], photos: Path) -> None:
    limits = replace(PUBLIC, own_files_only=False)
    jobs = Jobs(space, limits, worker=QUICK)
    hers, his = (jobs.submit("dreambooth", settings, "run", owner=owner) for owner in ("her", "him"))
    assert [view.id for view in jobs.jobs("her")] == [hers] and jobs.view(his, "him").position == 2
    assert jobs.jobs() == [] and jobs.jobs("another") == []
    for act in (jobs.view, jobs.stop, jobs.resume, jobs.sample_now, jobs.save_now, jobs.remove):
        for owner in ("her", None, ""):
            with pytest.raises(ConfigError) as caught:
                act(his, owner)
            assert str(caught.value) == f"there is no run {his}; choose one of the list"
        with pytest.raises(ConfigError, match="there is no run nothing"):
            act("nothing", "her")
    assert jobs.view(his, "him").status == "queued"
    jobs.submit("dreambooth", settings, "run", owner="her")
    with pytest.raises(ConfigError, match="you have 2 runs"):
        jobs.submit("dreambooth", settings, "run", owner="her")


def test_the_queue_has_an_end(make: Callable[..., Jobs], settings: dict[str, Any], space: Workspace) -> None:
    jobs = make(Limits(queue_length=2))
    for _ in range(2):
        jobs.submit("dreambooth", settings, "run")
    with pytest.raises(ConfigError, match="the queue is full: 2 runs wait"):
        jobs.submit("dreambooth", settings, "run")
    assert len(list(space.runs.glob("[!.]*"))) == 2


def test_where_no_training_is_allowed_nothing_begins(make: Callable[..., Jobs], settings: dict[str, Any]) -> None:
    make().submit("dreambooth", settings, "run")
    jobs = make(place=where({"SPACE_ID": "a/b"}))
    with pytest.raises(ConfigError, match="duplicate it"):
        jobs.submit("dreambooth", settings, "run")
    jobs.start()
    time.sleep(1.2)
    assert jobs.view("run").status == "queued"


@pytest.mark.parametrize("name", ["..", "../run", "a/b", "run\0", "x" * 10_000, ".new-run", ""])
def test_an_id_that_is_no_name_is_refused(make: Callable[..., Jobs], name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a name"):
        make().view(name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_train_steps": 10**6}, "max_train_steps is 1,000,000, and 50,000 is the most"),
        ({"max_train_steps": 10**30}, "bits"),
        ({"max_train_steps": 0}, "too small"),
        ({"max_train_steps": "8"}, "not a whole number"),
        ({"max_train_steps": 8.5}, "not a whole number"),
        ({"rank": 1000}, "rank is 1,000"),
        ({"resolution": 10**5}, "resolution"),
        ({"train_batch_size": 1000}, "train_batch_size"),
        ({"num_validation_images": 1000}, "num_validation_images"),
        ({"learning_rate": math.inf}, "must be a number"),
        ({"learning_rate": math.nan}, "must be a number"),
        ({"learning_rat": 1}, "did you mean learning_rate"),
        ({"<script>\n\x1b": 1}, "there is no setting"),
        ({"overwrite": True}, "the app takes care"),
        ({"resume_from_checkpoint": "/x"}, "the app takes care"),
        ({"logging_dir": "../../x"}, "the app takes care"),
        ({"instance_prompt": "x" * 5000}, "5,000 characters"),
        ({"instance_prompt": "x\0"}, "NUL"),
        ({"instance_data_dir": "/no/such/folder"}, "there is no folder"),
        ({"with_prior_preservation": True}, "class_prompt"),
        ({"instance_prompt": None}, "instance_prompt"),
    ],
)
def test_settings_are_checked_on_the_server(
    make: Callable[..., Jobs], settings: dict[str, Any], space: Workspace, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((ConfigError, DatasetError)) as caught:
        make().submit("dreambooth", {**settings, **changes}, "run")
    assert said in str(caught.value) and str(caught.value).isprintable()
    assert list(space.runs.glob("[!.]*")) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrained_model_name_or_path": "/etc"},
        {"pretrained_model_name_or_path": "someone/else"},
        {"instance_data_dir": "/etc"},
        {"class_data_dir": "/etc"},
        {"mask_dir": "../.."},
        {"push_to_hub": True},
        {"report_to": "wandb"},
        {"hub_model_id": "a/b"},
        {"validation_image_encoder": "a/b"},
        {"target_modules": "(a+)+$"},
        {"revision": "main"},
        {"caption_template_file": "/etc/passwd"},
    ],
)
def test_a_stranger_reaches_nothing_beyond_the_app(
    space: Workspace, settings: dict[str, Any], photos: Path, changes: dict[str, Any]
) -> None:
    uploaded = space.uploads / "a1"
    uploaded.mkdir()
    for photo in photos.glob("*.png"):
        (uploaded / photo.name).write_bytes(photo.read_bytes())
    good = {**settings, "instance_data_dir": str(uploaded)}
    assert checked("dreambooth", good, space, PUBLIC)["instance_data_dir"] == str(uploaded)
    with pytest.raises(ConfigError):
        checked("dreambooth", {**good, **changes}, space, PUBLIC)


def test_a_stranger_does_not_get_out_by_a_link(space: Workspace, settings: dict[str, Any], photos: Path) -> None:
    (space.uploads / "link").symlink_to(photos)
    with pytest.raises(ConfigError, match="not among the uploads"):
        checked("dreambooth", {**settings, "instance_data_dir": str(space.uploads / "link")}, space, PUBLIC)


def test_what_a_form_sends_for_nothing_is_nothing(space: Workspace, settings: dict[str, Any]) -> None:
    values = {**settings, "max_train_steps": 20.0, "output_dir": "runs/dreambooth", "overwrite": False, "fsdp": False}
    del values["checkpointing_steps"]
    kept = checked("dreambooth", {**values, "resume_from_checkpoint": None}, space, Limits())
    assert kept["max_train_steps"] == 20 and type(kept["max_train_steps"]) is int and "output_dir" not in kept
    assert kept["checkpointing_steps"] == 2


def test_photos_are_counted(space: Workspace, settings: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match="2 photos, and 1 are the most"):
        checked("dreambooth", settings, space, Limits(images=1))


def test_a_text_job_is_checked_too(space: Workspace, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "label": "b"}\n')
    values = {"pretrained_model_name_or_path": "pocket-bert", "task": "sequence-classification",
              "train_file": str(rows)}  # fmt: skip
    kept = checked("text", values, space, Limits())
    assert kept["train_file"] == str(rows) and kept["checkpoints_total_limit"] == 2
    with pytest.raises(DatasetError, match="there is no file"):
        checked("text", {**values, "train_file": str(tmp_path / "none.jsonl")}, space, Limits())
    with pytest.raises(DatasetError, match="MiB"):
        checked("text", values, space, Limits(text_bytes=1))
    with pytest.raises(ConfigError, match="not among the uploads"):
        checked("text", values, space, PUBLIC)
    for recipe in ("shell", "../text", ["text"], None):
        with pytest.raises(ConfigError, match="there is no recipe"):
            checked(recipe, values, space, Limits())  # type: ignore[arg-type]


def test_an_attempt_goes_on_or_starts(space: Workspace, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = space.runs / "run"
    folder.mkdir()
    job = {"recipe": "dreambooth", "settings": checked("dreambooth", settings, space, Limits())}
    first = config_of(folder, job, False)
    validate(first)
    assert isinstance(first, DreamBoothConfig) and first.output_dir == str(folder)
    assert first.resume_from_checkpoint is None and not first.overwrite
    (folder / "adapter.safetensors").touch()
    assert config_of(folder, job, False).overwrite
    (folder / "checkpoints" / "step-3").mkdir(parents=True)
    assert config_of(folder, job, False).resume_from_checkpoint == "latest"
    assert config_of(folder, job, True).overwrite and config_of(folder, job, True).resume_from_checkpoint is None
    with pytest.raises(ConfigError, match="damaged"):
        config_of(folder, {}, False)


def test_another_process_with_the_same_number_is_not_the_worker(space: Workspace) -> None:
    folder = space.runs / "run"
    folder.mkdir()
    files.write(folder / files.JOB, {"recipe": "dreambooth", "settings": {}})
    files.queue(folder)
    files.sign_of_life(folder, 1, time.time())
    files.claim(folder)
    assert view_of(folder, Follower(folder)).status == "starting"
    worker = files.read(folder / files.WORKER)
    files.write(folder / files.WORKER, {**worker, "began": worker["began"] - 100})
    view = view_of(folder, Follower(folder))
    assert view.status == "interrupted" and "before the run had begun" in view.message and view.can_resume
    files.write(folder / files.WORKER, {**worker, "pid": 2**22 + os.getpid()})
    assert view_of(folder, Follower(folder)).status == "interrupted"
    for damaged in ("", "{", "[]", '{"attempt": 1, "pid": "x", "began": null}'):
        (folder / files.WORKER).write_text(damaged)
        assert view_of(folder, Follower(folder)).status == "interrupted"


def test_a_look_costs_what_is_new(tmp_path: Path) -> None:
    count = 20_000
    with (tmp_path / "events.jsonl").open("w") as file:
        file.write(json.dumps({"event": "start", "time": 1.0, "max_steps": 2 * count}) + "\n")
        for step in range(1, count + 1):
            file.write(json.dumps(_step(step, 2 * count)) + "\n")
    files.write(tmp_path / files.JOB, {"recipe": "dreambooth", "settings": {}})
    follower = Follower(tmp_path)
    first = view_of(tmp_path, follower)
    assert first.step == count and len(first.loss_raw) <= MOST_POINTS and first.loss_raw[-1][0] == count
    seconds = []
    for step in range(count + 1, count + 21):
        with (tmp_path / "events.jsonl").open("a") as file:
            file.write(json.dumps(_step(step, 2 * count)) + "\n")
        began = time.perf_counter()
        view = view_of(tmp_path, follower)
        seconds.append(time.perf_counter() - began)
        assert view.step == step
    print(f"a look at {count:,} events: {1000 * sorted(seconds)[10]:.2f} ms")
    assert sorted(seconds)[10] < 0.02


def _step(step: int, total: int) -> dict[str, Any]:
    return {"event": "step", "time": 2.0, "step": step, "max_steps": total, "loss": 1.0, "lr": 1e-4, "grad_norm": 1.0,
            "speed": 2.0, "memory": 5}  # fmt: skip


def test_a_curve_is_thinned_to_means() -> None:
    curve = Curve()
    for step in range(1, 5001):
        curve.add(step, float(step % 2))
    raw, smooth = curve.raw(), curve.smooth()
    assert MOST_POINTS / 2 <= len(raw) <= MOST_POINTS and len(smooth) == len(raw)
    assert raw[-1][0] == 5000 and [step for step, _ in raw] == sorted(step for step, _ in raw)
    assert all(value == pytest.approx(0.5) for _, value in raw[:-1]) and smooth[100][1] == pytest.approx(0.5, abs=0.03)
    curve.cut(1000)
    assert curve.raw()[-1][0] <= 1000
    curve.add(1001, 0.5)
    assert curve.raw()[-1][0] == 1001


def test_the_smoothed_loss_is_a_running_mean_without_a_start() -> None:
    curve = Curve()
    for step in range(1, 30):
        curve.add(step, 3.0)
    assert all(value == pytest.approx(3.0) for _, value in curve.smooth())


def test_a_follower_reads_on_and_notices_another_file(tmp_path: Path) -> None:
    file, follower = tmp_path / "events.jsonl", Follower(tmp_path)
    assert follower.look().step == 0
    whole = json.dumps({"event": "start", "time": 1.0, "max_steps": 9}) + "\n" + json.dumps(_step(1, 9)) + "\n"
    file.write_text(whole + json.dumps(_step(2, 9))[:20])
    assert follower.look().step == 1
    file.write_text(whole + json.dumps(_step(2, 9)) + "\nno event\n[]\n" + '{"event": "step"}\n')
    assert follower.look().step == 2
    other = json.dumps({"event": "start", "time": 5.0, "max_steps": 7}) + "\n" + json.dumps(_step(1, 7)) + "\n"
    file.write_text(other)
    told = follower.look()
    assert (told.step, told.total, len(told.curve.raw())) == (1, 7, 1)
    file.write_text(other.replace("5.0", "6.0") + "".join(json.dumps(_step(n, 7)) + "\n" for n in range(2, 8)))
    assert follower.look().step == 7 and len(follower.look().curve.raw()) == 7
    file.unlink()
    assert follower.look().step == 0


def test_a_log_is_shown_without_control_characters(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert log_tail(log) == []
    log.write_bytes(b"a\x1b[31mred\n10%\r20%\r30%\n\xff\n" + b"x" * 5000 + b"\n")
    lines = log_tail(log)
    assert lines[1] == "30%" and all(line.isprintable() for line in lines) and len(lines[-1]) == 500
    log.write_text("".join(f"line {number}\n" for number in range(10_000)))
    assert log_tail(log, lines=3) == ["line 9997", "line 9998", "line 9999"]


def test_errors_name_buttons_rather_than_flags() -> None:
    said = in_words_of_the_page("every checkpoint is damaged; start again with --overwrite")
    assert said == "every checkpoint is damaged; Start again"
    assert in_words_of_the_page("go on with --resume_from_checkpoint latest") == "go on with Resume"
