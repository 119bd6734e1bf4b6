"""From a config class to controls and back: the config says it all, and nothing gets lost on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from app.web.forms import Form, help_of, in_labels, label_of, shown_value, value_of
from lora_diffusion.errors import ConfigError
from train.config import Setting, setting, settings_of
from train.dreambooth_config import DreamBoothConfig
from train.text_config import TextConfig

gr = pytest.importorskip("gradio")


@dataclass(frozen=True)
class _Config:
    rate: float = setting(1e-4, "how fast", group="speed", above=0)
    steps: int | None = setting(None, "how many", minimum=1, maximum=10)
    kind: str = setting("a", "which", choices=("a", "b"))
    other: str | None = setting(None, "which else", choices=("x", "y"))
    on: bool = setting(True, "whether (--no_on: do not)")
    words: tuple[str, ...] = setting((), "several")


def _item(name: str) -> Setting:
    return next(item for item in settings_of(_Config) if item.name == name)


def test_names_become_plain_words() -> None:
    assert label_of("lora_alpha") == "LoRA alpha"
    assert label_of("gradient_checkpointing") == "Gradient checkpointing"
    assert label_of("max_train_steps") == "Steps"


def test_an_error_names_labels_and_not_flags() -> None:
    assert in_labels("--rank 0 is too small") == "“Rank” 0 is too small"
    assert in_labels("leave --use_ema out") == "leave “Average over the run (EMA)” out"


def test_a_help_has_the_range_and_no_way_of_the_command_line() -> None:
    assert help_of(_item("steps")) == "How many (1 to 10)"
    assert help_of(_item("rate")) == "How fast (above 0)"
    assert help_of(_item("on")) == "Whether"


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("steps", "7", 7), ("steps", 7.0, 7), ("steps", "", None), ("steps", None, None), ("rate", "2e-3", 2e-3),
        ("rate", 1, 1.0), ("kind", "b", "b"), ("other", "", None), ("on", False, False),
        ("words", "a\n\nb", ("a", "b")),
        ("words", "", ()), ("words", ["a"], ("a",)),
    ],
)  # fmt: skip
def test_what_a_control_sends_becomes_a_value(name: str, raw: Any, value: Any) -> None:
    got = value_of(_item(name), raw)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "raw"),
    [("steps", "many"), ("steps", 1.5), ("steps", True), ("rate", "nan"), ("rate", "<b>"), ("on", "yes"), ("kind", 3)],
)
def test_what_is_of_another_kind_is_refused_by_its_label(name: str, raw: Any) -> None:
    with pytest.raises(ConfigError, match=f"“{label_of(name)}” is"):
        value_of(_item(name), raw)


@pytest.mark.parametrize("config", [DreamBoothConfig, TextConfig, _Config])
def test_every_default_survives_the_way_to_the_page_and_back(config: type) -> None:
    for item in settings_of(config):
        if not item.required:
            assert value_of(item, shown_value(item, item.default)) == item.default, item.name


@pytest.mark.parametrize("config", [DreamBoothConfig, TextConfig])
def test_a_form_has_a_labelled_control_for_every_setting_but_those_left_out(config: type) -> None:
    with gr.Blocks():
        form = Form(config, ("output_dir",))
        form.draw()
    names = {item.name for item in settings_of(config)}
    assert set(form.components) == names - {"output_dir"}
    labels = [part.label for part in form.components.values()]
    assert all(labels) and len(set(labels)) == len(labels), sorted(one for one in labels if labels.count(one) > 1)
    assert all(part.info for part in form.components.values())
    assert list(form.groups) == list(dict.fromkeys(item.group for item in form.items))


def test_a_form_gives_what_differs_from_the_defaults_and_nothing_else() -> None:
    with gr.Blocks():
        form = Form(_Config, start={"kind": "b"})
        form.draw()
    data = {part: part.value for part in form.components.values()}
    assert form.read(data) == {"kind": "b"}
    data[form.components["steps"]] = "3"
    assert form.read(data) == {"kind": "b", "steps": 3}


def test_filling_a_form_puts_all_others_back() -> None:
    with gr.Blocks():
        form = Form(_Config, start={"kind": "b"})
        form.draw()
    filled = form.filled({"steps": 5})
    assert form.read(filled) == {"steps": 5}


def test_a_choice_that_may_be_left_open_says_so() -> None:
    with gr.Blocks():
        form = Form(_Config)
        form.draw()
    assert [value for _, value in form.components["other"].choices] == ["", "x", "y"]
    assert [value for _, value in form.components["kind"].choices] == ["a", "b"]
