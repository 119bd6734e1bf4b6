"""The repository as a Hugging Face Space: its front matter, and the file that is started, in the environments there."""

from __future__ import annotations

import json
import re
import tomllib
import urllib.request
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

import gradio_client
from gradio_client.exceptions import AppError

from app.web.main import make
from app.web_config import AppConfig
from tests.app.web.served import REPOSITORY, Served, served

FRONT = REPOSITORY / "docs" / "space" / "README.md"
MAIN = REPOSITORY / "app" / "web" / "main.py"
SPACE = {"SPACE_ID": "somebody/lora-diffusion", "SYSTEM": "spaces"}
ZERO = {**SPACE, "SPACES_ZERO_GPU": "true"}
KEY = "a key of a visitor alone"


def front_matter() -> dict[str, str]:
    text = FRONT.read_text(encoding="utf-8")
    assert text.startswith("---\n"), "the front matter has to be the first bytes"
    lines = [line for line in text.split("---\n")[1].splitlines() if line.strip() and not line.startswith(" ")]
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_the_front_matter_says_what_is_so() -> None:
    said = front_matter()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert said["sdk"] == "gradio" and (REPOSITORY / said["app_file"]) == MAIN
    assert said["sdk_version"] == version("gradio") and f"gradio=={version('gradio')}" in (
        REPOSITORY / "constraints.txt"
    ).read_text(encoding="utf-8")
    lowest = re.search(r"(\d+)\.(\d+)", project["requires-python"])
    assert lowest is not None
    assert tuple(map(int, said["python_version"].strip('"').split(".")[:2])) >= tuple(map(int, lowest.groups()))
    assert len(said["short_description"]) <= 60 and said["license"] == "apache-2.0"
    assert said["colorFrom"] in said["colorTo"] or {said["colorFrom"], said["colorTo"]} <= {
        "red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"
    }  # fmt: skip


def test_requirements_are_those_of_the_project() -> None:
    """A Space installs requirements.txt alone, before the repository is there, and Gradio by its sdk_version."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    assert set(project["dependencies"]) <= set(wanted)
    assert not [line for line in wanted if line.startswith((".", "-", "gradio"))]


def start(tmp_path: Path, environment: Mapping[str, str]) -> Any:
    """As a Space starts it: the file, by Python, from a folder that the app may write into."""
    return served(
        tmp_path / "lora-diffusion-app", command=[str(MAIN)], cwd=tmp_path, environment=environment
    )  # fmt: skip


def shown(app: Served) -> str:
    """All that the page says before anybody touches it."""
    with urllib.request.urlopen(f"{app.url}/config", timeout=30) as answer:
        return json.dumps(json.load(answer))


def test_a_space_for_all_draws_and_does_not_train(tmp_path: Path) -> None:
    with start(tmp_path, SPACE) as app:
        page = shown(app)
        assert "all visitors share this Space" in page and "Duplicate this Space" in page
        client = gradio_client.Client(app.url, verbose=False, analytics_enabled=False)
        drawn = client.predict("a photo of a ball", seed=1, steps=2, key=KEY, api_name="/sample")
        assert len(drawn["pictures"]) == 1
        with pytest.raises(AppError, match="all visitors share this Space"):
            client.predict("dreambooth", {"instance_prompt": "a dog"}, key=KEY, api_name="/train")
        with pytest.raises(AppError, match="key"):
            client.predict("a photo of a ball", api_name="/sample")
        with pytest.raises(AppError, match="steps"):
            client.predict("a photo of a ball", steps=51, key=KEY, api_name="/sample")
        with pytest.raises(AppError, match="model"):
            client.predict("a photo of a ball", model="somebody/else", key=KEY, api_name="/sample")
        assert (tmp_path / "lora-diffusion-app").is_dir() and "unexpected" not in app.log


@pytest.mark.parametrize(
    ("environment", "reason"),
    [(ZERO, "training takes minutes"), ({**ZERO, "LORA_DIFFUSION_TRAINING": "1"}, "training takes minutes"),
     ({**SPACE, "LORA_DIFFUSION_TRAINING": "1"}, None)],
    ids=["zero-gpu", "zero-gpu-wished", "a copy"],
)  # fmt: skip
def test_who_may_train(
    environment: dict[str, str], reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    context, page = make(AppConfig(host="0.0.0.0", root=str(tmp_path / "app")))
    text = str(page.get_config_file())
    assert context.place.training_allowed is (reason is None)
    assert ("Duplicate this Space" in text) is (reason is not None)
    assert reason is None or reason in text
    assert context.limits.private_runs and context.limits.models is not None


# What a Space with ZeroGPU has under this name: each call in a process of its own, arguments and results are sent, and
# of an error that is not Gradio's only its kind comes back.
_SPACES = """
import functools, multiprocessing, pickle

gradio_auto_wrap = lambda function: function

def GPU(duration):
    def declare(function):
        @functools.wraps(function)
        def call(*words):
            words = pickle.loads(pickle.dumps(words))
            here, there = multiprocessing.Pipe()

            def work():
                try:
                    there.send((True, function(*words)))
                except Exception as problem:
                    there.send((False, type(problem).__name__))

            process = multiprocessing.get_context("fork").Process(target=work)
            process.start()
            there.close()
            good, found = here.recv()
            process.join()
            print("the GPU was lent", flush=True)
            if not good:
                import gradio
                raise gradio.Error(found, title="ZeroGPU worker error")
            return found
        return call
    return declare
"""


def test_zero_gpu_lends_its_gpu_to_drawing_alone(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "spaces.py").write_text(_SPACES, encoding="utf-8")
    with start(tmp_path, {**ZERO, "PYTHONPATH": str(tmp_path / "site")}) as app:
        page = shown(app)
        assert "training takes minutes" in page and "Duplicate this Space" in page
        client = gradio_client.Client(app.url, verbose=False, analytics_enabled=False)
        with pytest.raises(AppError, match="training takes minutes"):
            client.predict("dreambooth", {"instance_prompt": "a dog"}, key=KEY, api_name="/train")
        assert "lent" not in app.log
        drawn = client.predict("a photo of a ball", seed=1, steps=2, key=KEY, api_name="/sample")
        [picture] = drawn["pictures"]
        assert Path(picture if isinstance(picture, str) else picture["path"]).read_bytes().startswith(b"\x89PNG")
        assert app.log.count("lent") == 1
        with pytest.raises(AppError, match="steps"):
            client.predict("a photo of a ball", steps=51, key=KEY, api_name="/sample")
