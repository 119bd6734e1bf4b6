"""The whole app is killed while a run trains: the run goes on, and the next start shows what is so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("gradio")

import gradio_client

from app.web import job_files as files
from tests.app.web.served import Served, served, wait_until

SETTINGS = {
    "instance_prompt": "a photo of sks dog", "checkpointing_steps": 5, "checkpoints_total_limit": 2,
    "train_batch_size": 1, "num_validation_images": 1,
}  # fmt: skip


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path / "app") as running:
        yield running


class Watched:
    """A run as a client sees it."""

    def __init__(self, app: Served, photos: Path, model: Path, steps: int) -> None:
        self.app = app
        settings = {**SETTINGS, "pretrained_model_name_or_path": str(model), "max_train_steps": steps}
        handed = [gradio_client.handle_file(str(path)) for path in sorted(photos.glob("*.png"))]
        self.id = self.client.predict("dreambooth", settings, name="dog", photos=handed, api_name="/train")["id"]

    @property
    def client(self) -> Any:
        return gradio_client.Client(self.app.url, verbose=False, analytics_enabled=False)

    def now(self) -> dict[str, Any]:
        return dict(self.client.predict(self.id, api_name="/job"))

    def until(self, *statuses: str, step: int = 0) -> dict[str, Any]:
        wait_until(lambda: (told := self.now())["status"] in statuses and told["step"] >= step, 180, every=0.5)
        return self.now()

    @property
    def worker(self) -> int:
        return int(files.read(self.app.root / "runs" / self.id / files.WORKER)["pid"])


@pytest.mark.slow
def test_a_run_goes_on_without_its_app_and_is_found_again(app: Served, photos: Path, tiny_pipeline_dir: Path) -> None:
    run = Watched(app, photos, tiny_pipeline_dir, steps=400)
    before = run.until("running", step=2)
    worker = run.worker
    app.kill()
    assert psutil.pid_exists(worker)
    app.start()
    after = run.now()
    assert after["status"] in ("running", "done") and after["step"] >= before["step"]
    done = run.until("done")
    assert run.worker == worker and [step for step, _ in done["loss_raw"]] == list(range(1, 401))
    assert done["adapter"] is not None
    wait_until(lambda: not app.workers(), 60)


@pytest.mark.slow
def test_app_and_run_are_killed_together_and_the_next_start_says_so(
    app: Served, photos: Path, tiny_pipeline_dir: Path
) -> None:
    run = Watched(app, photos, tiny_pipeline_dir, steps=5000)
    waiting = Watched(app, photos, tiny_pipeline_dir, steps=6)
    run.until("running", step=12)
    assert waiting.now()["status"] == "queued" and waiting.now()["position"] == 1
    app.kill()
    psutil.Process(run.worker).kill()
    app.start()
    told = run.now()
    assert told["status"] == "interrupted" and "Resume goes on from step" in told["message"]
    assert told["step"] >= 12 and told["eta_seconds"] is None
    assert waiting.until("done")["step"] == 6  # what waited has its turn
    assert {one["id"]: one["status"] for one in run.client.predict(api_name="/jobs")} == {
        run.id: "interrupted", waiting.id: "done"
    }  # fmt: skip


def test_ctrl_c_ends_the_page_and_says_so(tmp_path: Path) -> None:
    with served(tmp_path / "app") as app:
        assert app.answer_seconds() < 10
        assert app.interrupt() == 0
        assert "stopped; a training that runs goes on" in app.log and "Traceback" not in app.log
