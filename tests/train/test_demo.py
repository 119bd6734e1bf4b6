"""The demo end to end, with fewer steps: its files, the figures in its report, a folder that it may not touch."""

import json

import pytest
from PIL import Image

import lora_diffusion as ld
from lora_diffusion.errors import ConfigError
from train.demo import run_demo
from train.demo_config import DemoConfig


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    events = []
    report = run_demo(DemoConfig(output_dir=str(folder), max_train_steps=3, num_seeds=1), events.append)
    return folder, report, events


def test_report_has_what_is_promised(demo):
    folder, report, _ = demo
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["likeness"].keys() == {"base", "adapted", "real"}
    assert report["prompt_following"].keys() == {"base", "adapted"}
    assert report["seconds"].keys() == {"train", "total"}
    assert report["peak_memory_bytes"] > 50e6
    assert {"seeds", "versions", "machine", "likeness_scale"} <= report.keys()
    assert -1 <= report["likeness"]["base"] < report["likeness"]["real"] <= 1


def test_picture_is_there_to_look_at(demo):
    with Image.open(demo[0] / "comparison.png") as picture:
        assert picture.width > 800
        assert picture.height > 600


def test_adapter_is_small_and_readable(demo):
    adapter = demo[0] / "adapter.safetensors"
    assert adapter.stat().st_size < 3e6
    assert set(ld.read_adapter(adapter).components) == {"unet", "text_encoder"}


def test_the_end_says_in_words_what_happened_and_what_is_next(demo):
    said = "\n".join(e["message"] for e in demo[2] if e["event"] == "note")
    for needed in ("Likeness", "comparison.png", "report.json", "adapter.safetensors", "lora-diffusion sample"):
        assert needed in said


def test_an_older_demo_is_replaced(demo):
    folder, _, _ = demo
    stopped = run_demo(DemoConfig(output_dir=str(folder), max_train_steps=3), lambda e: None, should_stop=lambda: True)
    assert stopped is None
    assert not (folder / "report.json").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not a demo"):
        run_demo(DemoConfig(output_dir=str(tmp_path)), lambda e: None)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_unknown_subject_lists_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match="zorp"):
        run_demo(DemoConfig(output_dir=str(tmp_path / "x"), subject="nobody"), lambda e: None)
