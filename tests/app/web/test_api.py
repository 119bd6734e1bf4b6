"""The endpoints as programs meet them: through `gradio_client`, on a page that is served."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

import gradio as gr
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from app.web.api import NAMES, Api, documentation
from app.web.context import Context
from app.web.limits import Place
from app.web.main import launch_options
from app.web.page import build
from app.web.places import Workspace
from app.web_config import AppConfig
from lora_diffusion.errors import ConfigError
from train import pocket

PHOTOS = sorted((pocket.subjects_dir() / "zorp" / "photos").glob("*.png"))
SETTINGS = {
    "pretrained_model_name_or_path": "pocket",
    "instance_prompt": "a photo of sks creature",
    "max_train_steps": 5,
}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Context, str]]:
    """A page whose queue of runs stands still: nothing is trained here."""
    context = Context(Workspace(tmp_path_factory.mktemp("app")))
    page = build(context)
    page.queue()
    _, address, _ = page.launch(**launch_options(context, AppConfig()))
    yield context, address
    page.close(verbose=False)


@pytest.fixture(scope="module")
def client(served: tuple[Context, str]) -> Client:
    return Client(served[1], verbose=False)


def test_there_are_the_named_endpoints_and_no_others(client: Client) -> None:
    told = client.view_api(return_format="dict", print_info=False)
    assert set(told["named_endpoints"]) == {f"/{name}" for name in NAMES} and not told["unnamed_endpoints"]


def test_each_endpoint_is_documented_with_all_that_it_takes() -> None:
    text = documentation()
    for name in NAMES:
        assert f"**/{name}**(" in text and getattr(Api, name).__doc__


def test_pictures_come_as_files_with_their_settings_and_are_the_same_again(
    client: Client, served: tuple[Context, str]
) -> None:
    from train.pictures import read_settings

    first, again = (client.predict("a photo of a cup", seed=3, steps=2, api_name="/sample") for _ in range(2))
    paths = [Path(one["pictures"][0]) for one in (first, again)]
    assert paths[0].read_bytes() == paths[1].read_bytes() and paths[0].read_bytes().startswith(PNG)
    assert first["seed"] == 3 and read_settings(paths[0]) == first["settings"]
    assert len(client.predict("a cup", steps=1, count=2, api_name="/sample")["pictures"]) == 2


def test_photos_that_come_along_become_a_queued_run(client: Client, served: tuple[Context, str]) -> None:
    context, _ = served
    photos = [handle_file(str(path)) for path in PHOTOS]
    job = client.predict("dreambooth", SETTINGS, name="zorp", photos=photos, api_name="/train")
    assert (job["id"], job["status"], job["position"]) == ("zorp", "queued", 1)
    folder = Path(context.jobs.view("zorp").settings["instance_data_dir"])
    assert folder.is_relative_to(context.workspace.uploads) and len(list(folder.glob("*.png"))) == 5
    assert [one["id"] for one in client.predict(api_name="/jobs")] == ["zorp"]
    assert client.predict("zorp", api_name="/stop")["status"] == "stopped"
    assert client.predict("zorp", api_name="/job")["status"] == "stopped"


def test_rows_that_come_along_become_a_queued_run(client: Client, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na good day,good\na bad day,bad\n")
    settings = {"pretrained_model_name_or_path": "pocket-bert", "task": "sequence-classification"}
    job = client.predict("text", settings, name="days", rows=handle_file(str(rows)), api_name="/train")
    assert (job["id"], job["recipe"], job["status"]) == ("days", "text", "queued")
    client.predict("days", api_name="/stop")


@pytest.mark.parametrize(
    ("words", "endpoint", "said"),
    [
        (("../etc",), "/job", "cannot be a name"),
        (("nobody",), "/stop", "no run nobody"),
        (("a cup", {"nobody": 1.0}), "/sample", "nobody"),
        (("a cup", {"nobody": "much"}), "/sample", "weight|nobody"),
        (("a cup", {}, "", 0, 10**9), "/sample", "steps"),
        (("a cup", {}, "", 0, 2, 3.0, 10**6), "/sample", "width"),
        (("cook", SETTINGS), "/train", "no recipe"),
        (("dreambooth", {**SETTINGS, "instance_data_dir": "photos", "rank": 10**6}), "/train", "rank is 1,000,000"),
        (("dreambooth", {**SETTINGS, "ranc": 4}), "/train", "no setting 'ranc'"),
        (("dreambooth", {**SETTINGS, "output_dir": "/etc", "overwrite": True}), "/train", "overwrite"),
    ],
)
def test_what_cannot_be_done_is_an_error_in_words(client: Client, words: Any, endpoint: str, said: str) -> None:
    with pytest.raises(AppError, match=said):
        client.predict(*words, api_name=endpoint)


@pytest.mark.parametrize("path", ["/etc/hostname", "../../etc/hostname", 7, None])
def test_a_path_on_the_server_is_no_upload(served: tuple[Context, str], path: Any) -> None:
    """As one would send it without the client, which uploads what it names."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    api = Api(served[0])
    with pytest.raises(ConfigError, match="come with the request"):
        api.train("dreambooth", dict(SETTINGS), photos=[file])
    with pytest.raises(ConfigError, match="come with the request"):
        api.train("text", {}, rows=file)


def test_nothing_of_the_app_can_be_fetched_by_its_path(served: tuple[Context, str], client: Client) -> None:
    context, address = served
    secret = context.workspace.runs / "secret.txt"
    secret.write_text("secret")
    for path in (secret, Path(__file__)):
        request = urllib.request.Request(f"{address}gradio_api/file={path}")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code in (403, 404)


def test_a_handler_of_the_page_cannot_be_called_by_a_client(client: Client) -> None:
    with pytest.raises((AppError, ValueError)):
        client.predict("zorp", "", api_name="/on_remove")


def test_on_a_public_page_a_key_says_whose_runs_are_whose(tmp_path: Path) -> None:
    api = Api(Context(Workspace(tmp_path), Place(public=True)))
    mine, other = "m" * 20, "o" * 20
    settings = {**SETTINGS, "instance_data_dir": str(PHOTOS[0].parent)}
    job = api.train("dreambooth", settings, "mine", key=mine)
    assert [one["id"] for one in api.jobs(mine)] == [job["id"]] and api.jobs(other) == []
    for call in (api.job, api.stop):
        with pytest.raises(ConfigError, match="no run mine"):
            call("mine", other)
    with pytest.raises(ConfigError, match="gives key="):
        api.jobs()
    json.dumps(api.job("mine", mine), allow_nan=False)


def test_an_unexpected_error_says_its_kind_and_nothing_of_what_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.web import api as module

    def broken() -> None:
        raise RuntimeError("the secret path /home/me")

    with pytest.raises(gr.Error) as told:
        module._answering(broken)()
    assert "RuntimeError" in str(told.value) and "secret" not in str(told.value)
