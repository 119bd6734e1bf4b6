"""Programs on the endpoints, through gradio_client: one, and ten at once while a run trains."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

import gradio_client
from gradio_client.exceptions import AppError

from tests.app.web.drawing import put_adapter
from tests.app.web.served import Served, served, wait_until
from train import pocket

CLIENTS = 10
PHOTOS = sorted((pocket.subjects_dir() / "zorp" / "photos").glob("*.png"))
PROMPTS = ("a photo of a red ball", "a photo of a creature in a forest", "a photo of a blue cube on the grass")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("clients") / "app"
    for number, name in enumerate(("rex", "ink", "fox")):
        put_adapter(root / "adapters", name, "pocket", number)
    with served(root) as running:
        yield running


def client_of(app: Served, folder: Path) -> Any:
    return gradio_client.Client(app.url, verbose=False, download_files=folder, analytics_enabled=False)


def asked_by(number: int) -> dict[str, Any]:
    """What a client asks for: each something else, some with one adapter, some with two or none."""
    chosen = [{"rex": 0.8}, {"ink": 1.0}, {"rex": 0.5, "fox": -0.7}, {}, {"fox": 1.2}]
    return {
        "prompt": PROMPTS[number % 3], "adapters": chosen[number % 5], "seed": 100 + number, "steps": 4,
        "api_name": "/sample",
    }  # fmt: skip


def picture_of(drawn: dict[str, Any]) -> bytes:
    [file] = drawn["pictures"]
    return Path(file if isinstance(file, str) else file["path"]).read_bytes()


def test_a_client_draws_and_is_told_what_is_wrong(app: Served, tmp_path: Path) -> None:
    client = client_of(app, tmp_path)
    drawn = client.predict(**asked_by(0))
    assert picture_of(drawn).startswith(b"\x89PNG") and drawn["seed"] == 100
    assert [one["name"] for one in drawn["settings"]["adapters"]] == ["rex"]
    assert picture_of(client.predict(**asked_by(0))) == picture_of(drawn)
    assert {one["name"] for one in client.predict(api_name="/library")} == {"rex", "ink", "fox"}
    assert client.predict(api_name="/jobs") == []
    for wrong, said in (
        ({"adapters": {"../../etc/passwd": 1.0}}, "adapter"), ({"steps": 10**9}, "steps"), ({"count": 0}, "count"),
        ({"width": 10**6}, "width"), ({"adapters": {"rex": "much"}}, "weight"),
    ):  # fmt: skip
        with pytest.raises(AppError, match=said):
            client.predict(**{**asked_by(0), **wrong})
    with pytest.raises(AppError, match=r"no run|there is no|not here"):
        client.predict("nothing", api_name="/job")
    assert "Traceback" not in app.log


def test_a_client_cannot_name_a_file_of_the_server(app: Served, tmp_path: Path) -> None:
    client = client_of(app, tmp_path)
    settings = {"pretrained_model_name_or_path": "pocket", "instance_prompt": "a photo of sks", "max_train_steps": 2}
    inside = {"path": str(app.root / "adapters" / "rex.safetensors"), "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(AppError):
        client.predict("dreambooth", settings, photos=[inside], api_name="/train")
    assert client.predict(api_name="/jobs") == []


@pytest.mark.slow
def test_ten_clients_draw_while_a_run_trains(app: Served, tmp_path: Path) -> None:
    """No error, no adapter of another's, the bytes that each gets alone; and the page answers throughout."""
    clients = [client_of(app, tmp_path / str(number)) for number in range(CLIENTS)]
    alone = [picture_of(client.predict(**asked_by(number))) for number, client in enumerate(clients)]
    assert len(set(alone)) == CLIENTS
    for path in (app.root / "gallery").glob("*.png"):
        path.unlink()
    settings = {
        "pretrained_model_name_or_path": "pocket", "instance_prompt": "a photo of sks creature",
        "max_train_steps": 5000, "train_batch_size": 1, "checkpointing_steps": 1000,
    }  # fmt: skip
    photos = [gradio_client.handle_file(str(path)) for path in PHOTOS]
    job = clients[0].predict("dreambooth", settings, name="busy", photos=photos, api_name="/train")["id"]

    def state() -> dict[str, Any]:
        return dict(clients[0].predict(job, api_name="/job"))

    wait_until(lambda: state()["step"] > 0, 180, every=0.5)
    before = state()["step"]
    with answering(app) as seconds, ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(2):
            drawn = list(pool.map(lambda number: clients[number].predict(**asked_by(number)), range(CLIENTS)))
            assert [picture_of(one) for one in drawn] == alone
    after = state()
    assert after["status"] == "running" and after["step"] > before, after["message"]
    median = sorted(seconds)[len(seconds) // 2]
    print(
        f"{len(seconds)} looks at the page: {median:.3f} s, {max(seconds):.3f} s at most, load {os.getloadavg()[0]:.1f}"
    )
    alone_here = os.getloadavg()[0] <= 3 + (os.cpu_count() or 1)  # else the machine is what is measured
    assert len(seconds) >= 10 and median < 1.0 and (max(seconds) < 1.0 or not alone_here)
    assert clients[1].predict(job, api_name="/stop")["status"] in ("stopping", "stopped")
    wait_until(lambda: state()["status"] == "stopped", 60, every=0.5)
    assert state()["adapter"] is not None
    learned = clients[2].predict(**{**asked_by(0), "adapters": {f"runs/{job}": 1.0}})
    assert picture_of(learned) != alone[0]
    assert "Traceback" not in app.log


@contextmanager
def answering(app: Served) -> Iterator[list[float]]:
    """Ask for the page all the time; gives the seconds that each answer took."""
    seconds: list[float] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.1):
            try:
                seconds.append(app.answer_seconds())
            except OSError:
                seconds.append(float("inf"))
                time.sleep(0.5)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield seconds
    finally:
        over.set()
        thread.join()
