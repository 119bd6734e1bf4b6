"""The page as it is built: private but for its endpoints, labelled, and its handlers on the core."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio")

import gradio as gr

from app.web.context import Context
from app.web.job_files import JOB
from app.web.limits import PUBLIC, Limits, Place
from app.web.main import launch_options
from app.web.page import build
from app.web.places import Workspace
from app.web.presets import PRESETS, prompts_of, settings_of_preset
from app.web.run_check import check_run, in_lines
from app.web.views.job import Runs
from app.web.views.library import LibraryView
from app.web.views.sample import Sample
from app.web.views.train_pictures import TrainPictures
from app.web.views.train_text import TrainText
from app.web_config import AppConfig, validate
from lora_diffusion.errors import ConfigError
from train import pocket
from train.config import from_dict
from train.dreambooth_checks import validate as validate_dreambooth
from train.dreambooth_config import DreamBoothConfig

KEY = "k" * 20


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(Workspace(tmp_path / "app"))


@pytest.fixture
def in_blocks(context: Context) -> Iterator[tuple[Context, gr.BrowserState]]:
    with gr.Blocks():
        yield context, gr.BrowserState("", storage_key="x", secret="y")


def test_nothing_but_the_named_endpoints_can_be_called_from_outside(context: Context) -> None:
    page = build(context)
    public = {event.api_name for event in page.fns.values() if event.api_visibility == "public"}
    assert public == {"sample", "train", "job", "jobs", "stop", "library"}
    others = {event.api_visibility for event in page.fns.values()} - {"public"}
    assert others == {"private"}


def test_what_computes_shares_one_place_in_the_line(context: Context) -> None:
    page = build(context)
    heavy = [event for event in page.fns.values() if event.concurrency_id == "heavy"]
    names = {event.name for event in heavy}
    assert {"on_draw", "on_compare", "on_grid", "sample", "on_write", "on_combine", "take_photos"} <= names
    assert all(event.concurrency_limit == 1 for event in heavy)


def test_every_control_has_a_label(context: Context) -> None:
    page = build(context)
    kinds = (gr.Textbox, gr.Number, gr.Slider, gr.Dropdown, gr.Radio, gr.Checkbox, gr.File, gr.Gallery, gr.Image,
             gr.ImageSlider, gr.Dataframe, gr.LinePlot)  # fmt: skip
    for part in page.blocks.values():
        if isinstance(part, kinds):
            assert part.label and part.show_label is not False, part
        if isinstance(part, gr.Button):
            assert part.value, part


def test_the_page_is_built_without_torch() -> None:
    code = (
        "import sys, tempfile\n"
        "from app.web.main import make\nfrom app.web_config import AppConfig\n"
        "make(AppConfig(root=tempfile.mkdtemp()))\n"
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_of_the_app_is_served_and_nothing_is_told(context: Context) -> None:
    options = launch_options(context, AppConfig())
    assert options["allowed_paths"] == [] and options["blocked_paths"] == [str(context.workspace.root)]
    assert not options["run_history"] and not options["enable_monitoring"] and not options["show_error"]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", ["pocket", "stable-diffusion-v1-5/stable-diffusion-v1-5"])
def test_presets_are_settings_that_can_be_used(name: str, model: str) -> None:
    prompts = {key: value for key, value in prompts_of("sks", "dog", style=name == "style").items() if value}
    settings = settings_of_preset(name, model)
    config = from_dict(
        DreamBoothConfig,
        {"pretrained_model_name_or_path": model, "instance_data_dir": "photos", **prompts, **settings},
    )
    validate_dreambooth(config)
    assert settings["max_train_steps"] <= PUBLIC.steps and config.rank <= PUBLIC.rank


def test_prompts_are_made_of_the_word_and_its_class() -> None:
    assert prompts_of("sks", "owl") == {"instance_prompt": "a photo of sks owl", "class_prompt": "a photo of an owl"}
    assert prompts_of("sks", "") == {"instance_prompt": "a photo of sks", "class_prompt": None}


def test_photos_are_shown_named_and_become_a_run(in_blocks: tuple[Context, gr.BrowserState]) -> None:
    context, visitor = in_blocks
    view = TrainPictures(context, visitor)
    photos = [str(path) for path in sorted((pocket.subjects_dir() / "zorp" / "photos").glob("*.png"))]
    upload, previews, remarks, table = view.take_photos(photos, "pocket")
    assert len(previews["value"]) == len(table) == 5 and "5 photos will be used" in remarks
    data = {part: getattr(part, "value", None) for part in view.inputs}
    data |= {view.upload: upload, view.word: "sks", view.kind: "creature", view.prompt: "a photo of sks creature",
             view.captions: [[table[0][0], "a photo of sks creature at night"], *table[1:]]}  # fmt: skip
    name = view.start_run(data)
    settings = context.jobs.view(name).settings
    assert name == "creature" and settings["max_train_steps"] == 100 and settings["learning_rate"] == 2e-3
    assert "at night" in (Path(settings["instance_data_dir"]) / table[0][0]).with_suffix(".txt").read_text()


def test_without_photos_the_page_says_what_to_do(in_blocks: tuple[Context, gr.BrowserState]) -> None:
    view = TrainPictures(*in_blocks)
    data = {part: getattr(part, "value", None) for part in view.inputs}
    assert "Add photos first" in view.look(data)
    with pytest.raises(gr.Error, match="There are no photos yet"):
        view.start_run(data)


def test_the_card_says_what_a_run_will_take(context: Context) -> None:
    photos = pocket.subjects_dir() / "zorp" / "photos"
    settings = {
        "pretrained_model_name_or_path": "pocket", "instance_data_dir": str(photos),
        "instance_prompt": "a photo of sks creature", **settings_of_preset("quick", "pocket"),
    }  # fmt: skip
    check = check_run("dreambooth", settings, "dog", context.workspace, context.limits)
    assert check.what == "5 photos" and check.steps == 100 and check.rounds == 40
    assert check.peak and check.room and check.minutes and not check.warnings
    assert check.place == str(context.workspace.runs / "dog") and not list(context.workspace.runs.glob("dog"))
    assert [name for name, _ in in_lines(check)] == ["Learns from", "Steps", "Memory at its peak", "Time", "Result"]


def test_rows_are_shown_as_the_model_sees_them(in_blocks: tuple[Context, gr.BrowserState]) -> None:
    context, visitor = in_blocks
    view = TrainText(context, visitor)
    data = {part: getattr(part, "value", None) for part in view.inputs}
    data |= {view.pasted: 'text,label\n"a <b>good</b> day",good\na bad day,bad', view.model: "pocket-bert",
             view.task: "sequence-classification"}  # fmt: skip
    upload, seen, card = view.take_rows(data)
    assert upload and "2 examples" in seen and "«good»" in seen and "<b>" not in seen and "2 rows" in card
    _, seen, card = view.take_rows({**data, view.pasted: '{"text": "half'})
    assert "Not ready yet" in seen and str(context.workspace.root) not in seen and "Add rows first" in card


def test_a_run_is_shown_once_and_then_only_where_it_has_changed(in_blocks: tuple[Context, gr.BrowserState]) -> None:
    context, visitor = in_blocks
    view = Runs(context, visitor)
    name = _queued(context, "<i>dog</i>")
    first = view.look(None, None, {})
    assert name == "i-dog-i" and f"{name}: queued" in first[view.status]
    assert first[view.stop]["interactive"] is True and first[view.resume]["interactive"] is False
    again = view.look(name, None, first[view.seen])
    assert not isinstance(again, dict) or view.status not in again
    view.on_stop(name, None)
    assert "stopped" in view.look(name, None, first[view.seen])[view.status]
    with pytest.raises(gr.Error, match="No run is chosen"):
        view.on_stop(None, None)
    with pytest.raises(gr.Error, match="cannot be a name"):
        view.on_stop("../dog", None)


def test_a_look_at_the_runs_is_quick(in_blocks: tuple[Context, gr.BrowserState]) -> None:
    context, visitor = in_blocks
    view = Runs(context, visitor)
    name = _queued(context, "dog")
    seen = view.look(name, None, {})[view.seen]
    started = time.perf_counter()
    for _ in range(20):
        view.look(name, None, seen)
    assert (time.perf_counter() - started) / 20 < 0.1


def test_visitors_of_a_public_page_see_their_own_runs_only(tmp_path: Path) -> None:
    context = Context(Workspace(tmp_path), Place(public=True))
    name = _queued(context, "dog", context.owner(KEY))
    with gr.Blocks():
        view = Runs(context, gr.BrowserState(""))
    assert name in str(view.look(None, KEY, {})[view.table])
    assert name not in str(view.look(None, "other" * 5, {}))
    with pytest.raises(gr.Error, match="There is no run"):
        view.on_stop(name, "other" * 5)
    with pytest.raises(ConfigError, match="no key yet"):
        context.owner("")


def test_where_no_training_is_allowed_the_page_says_why(tmp_path: Path) -> None:
    place = Place(is_space=True, public=True, training_allowed=False, reason="all visitors share this Space")
    page = build(Context(Workspace(tmp_path), place))
    said = [part.value for part in page.blocks.values() if isinstance(part, gr.Markdown)]
    assert any("all visitors share this Space" in text for text in said)
    assert any(isinstance(part, gr.DuplicateButton) for part in page.blocks.values())


def test_a_request_is_what_the_fields_say(in_blocks: tuple[Context, gr.BrowserState]) -> None:
    view = Sample(*in_blocks)
    parts = [view.model, view.prompt, view.negative, view.seed, view.steps, view.guidance, view.width, view.height,
             view.count, *view.adapters, *view.weights]  # fmt: skip
    data: dict[Any, Any] = {part: part.value for part in parts}
    data |= {view.prompt: "a cup", view.seed: " 7 ", view.adapters[1]: "cup", view.weights[1]: 0.5}
    request = view.request(data)
    assert (request.prompt, request.seed, request.adapters, request.width) == ("a cup", 7, [("cup", 0.5)], None)
    with pytest.raises(ConfigError, match="the width is 'wide'"):
        view.request({**data, view.width: "wide"})


def test_only_pictures_that_were_given_to_the_page_are_read(in_blocks: tuple[Context, gr.BrowserState]) -> None:
    view = Sample(*in_blocks)
    with pytest.raises(gr.Error, match="not given to the page"):
        view.on_file("/etc/hostname")


def test_what_a_file_says_is_text_on_its_card(context: Context) -> None:
    from app.web.library import Record
    from app.web.views.library import _card

    record = Record(
        "x", "<script>1</script>", Path("x"), "pictures", "<img src=x>", ('"><b>',), 4, 1000, 0.0, None, "<u>", None,
        None, (),
    )  # fmt: skip
    card = _card(record)
    assert not any(tag in card for tag in ("<script", "<img", "<b>", "<u>"))


def test_an_empty_library_says_what_to_do(in_blocks: tuple[Context, gr.BrowserState]) -> None:
    view = LibraryView(*in_blocks)
    assert "Train one, or import" in view.refresh(None, None)[view.cards]
    with pytest.raises(gr.Error, match="No adapter is chosen"):
        view.on_delete(None, None)


def test_the_settings_of_the_app_are_checked() -> None:
    validate(AppConfig())
    with pytest.raises(ConfigError, match="port"):
        validate(AppConfig(port=0))
    with pytest.raises(ConfigError, match="--root is empty"):
        validate(AppConfig(root=" "))


def test_limits_are_those_of_the_place(tmp_path: Path) -> None:
    assert Context(Workspace(tmp_path)).limits == Limits()
    public = Context(Workspace(tmp_path), Place(public=True))
    assert public.limits == PUBLIC and public.models[0] == "pocket" and "pocket-gpt" in public.text_models


def test_on_zero_gpu_what_computes_asks_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def gpu(duration: int) -> Any:
        return lambda work: lambda *args: asked.append((duration, args)) or work(*args)

    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=gpu))
    context = Context(Workspace(tmp_path), Place(is_space=True, public=True, zero_gpu=True, training_allowed=False))
    context.__dict__["pictures"] = SimpleNamespace(draw=lambda request, owner: (request, owner))
    assert context.compute("pictures", "draw", "a cup", "me", on_progress=print) == ("a cup", "me")
    assert asked == [(60, ("pictures", "draw", ("a cup", "me")))]


def _queued(context: Context, name: str, owner: str | None = None) -> str:
    photos = pocket.subjects_dir() / "zorp" / "photos"
    settings = {"pretrained_model_name_or_path": "pocket", "instance_data_dir": str(photos),
                "instance_prompt": "a photo of sks creature", "max_train_steps": 5}  # fmt: skip
    job = context.jobs.submit("dreambooth", settings, name, owner)
    assert (context.workspace.runs / job / JOB).is_file()
    return job
