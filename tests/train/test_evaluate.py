"""Evaluations end to end on the tiny pipeline and on pocket: figures, files, sweeps, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lora_diffusion as ld
from lora_diffusion import AdapterMismatchError, ConfigError, DatasetError
from train import evaluate_report, sweep
from train.evaluate import evaluate
from train.evaluate_config import EvaluateConfig, validate
from train.evaluate_plan import make_plan
from train.metrics import Figure
from train.models import load_pipeline
from train.pictures import read_settings
from train.subjects import load_subject
from train.sweep_picture import nice_ticks, pushed_apart

Make = Callable[..., EvaluateConfig]


def write_adapter(model: str, file: Path, seed: int = 0) -> Path:
    """An adapter that has learned noise."""
    pipe = load_pipeline(model)
    ld.add_adapter(pipe, ld.LoraConfig(r=2, target_modules="attention"), components=["unet"])
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (one for part in ld.adapter_parameters(pipe).values() for one in part):
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.3)
    ld.save_adapter(pipe, file)
    return file


@pytest.fixture(scope="module")
def adapter(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(str(tiny_pipeline_dir), tmp_path_factory.mktemp("adapters") / "noise.safetensors")


@pytest.fixture
def make(tiny_pipeline_dir: Path, adapter: Path, photos: Path, judge_folders: dict[str, Path], tmp_path: Path) -> Make:
    (tmp_path / "prompts.txt").write_text("{}\n\n{} on a beach\n", encoding="utf-8")
    (tmp_path / "others.txt").write_text("a red car\n", encoding="utf-8")

    def config(**changes: Any) -> EvaluateConfig:
        values: dict[str, Any] = {
            "model": str(tiny_pipeline_dir),
            "adapter": (str(adapter),),
            "instance_data_dir": str(photos),
            "instance_prompt": "a photo of sks dog",
            "class_prompt": "a photo of a dog",
            "prompts": str(tmp_path / "prompts.txt"),
            "unrelated_prompts": str(tmp_path / "others.txt"),
            "seeds": 3,
            "num_inference_steps": 2,
            "image_encoder": str(judge_folders["dino"]),
            "text_encoder": str(judge_folders["clip"]),
            "output_dir": str(tmp_path / "out"),
        }
        return EvaluateConfig(**{**values, **changes})

    return config


def test_an_evaluation_end_to_end(make: Make, adapter: Path) -> None:
    config = make(adapter=(str(adapter), f"{adapter}:0"))
    events: list[dict[str, Any]] = []
    report = evaluate(config, on_event=events.append)
    folder = Path(config.output_dir)
    assert report is not None and json.loads((folder / "report.json").read_text()) == report
    assert [one["name"] for one in report["adapters"]] == ["noise", "noise:0"]
    assert report["prompts"] == ["a photo of sks dog", "a photo of sks dog on a beach"]
    assert report["encoders"] == {"image": "dino", "text": "clip"}
    strong, idle = (one["figures"] for one in report["adapters"])
    assert set(strong) == set(evaluate_report.TITLES) and None not in strong.values()
    for figure in strong.values():
        assert figure["low"] <= figure["mean"] <= figure["high"]
        assert figure["floor"] is not None and figure["ceiling"] is not None
    # Where nothing was added, nothing has changed, and figures of the class are those of the base model.
    assert idle["class_drift"]["mean"] == pytest.approx(0, abs=1e-5)
    assert idle["unrelated_drift"]["mean"] == pytest.approx(0, abs=1e-5)
    assert idle["class_likeness"]["mean"] == pytest.approx(idle["class_likeness"]["floor"], abs=2e-4)
    assert strong["class_drift"]["mean"] > 1e-3 and strong["unrelated_drift"]["mean"] > 1e-3
    # The scale is the same for all, and is what the table shows for the base model and the photos.
    assert strong["likeness"]["floor"] == idle["likeness"]["floor"] == report["base"]["likeness"]["mean"]
    assert strong["likeness"]["ceiling"] == report["photos"]["likeness"]
    assert report["base"]["class_drift"]["mean"] == pytest.approx(0, abs=1e-5)
    table = (folder / "report.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["base model", "noise", "noise:0", "photos"]
    assert any(event["event"] == "prepare" and event["done"] == event["total"] == 12 for event in events)


def test_pictures_say_how_they_were_made(make: Make) -> None:
    config = make(class_prompt=None, seeds=2, seed=5)
    evaluate(config)
    pictures = Path(config.output_dir) / "pictures"
    assert sorted(path.name for path in (pictures / "1").iterdir()) == [
        "subject-1-seed5.png", "subject-1-seed6.png", "subject-2-seed5.png", "subject-2-seed6.png",
        "unrelated-1-seed5.png", "unrelated-1-seed6.png",
    ]  # fmt: skip
    made = read_settings(pictures / "1" / "subject-2-seed6.png")
    assert (made["prompt"], made["seed"]) == ("a photo of sks dog on a beach", 6)
    assert made["adapters"][0]["file"] == "noise.safetensors"
    assert read_settings(pictures / "base" / "subject-1-seed5.png")["adapters"] == []
    with Image.open(Path(config.output_dir) / "comparison.png") as picture:
        assert picture.width > 400


def test_the_same_evaluation_gives_the_same_figures_and_replaces_the_first(make: Make) -> None:
    config = make()
    first = evaluate(config)
    again = evaluate(config)
    timeless = [{k: v for k, v in (report or {}).items() if k not in ("seconds",)} for report in (first, again)]
    assert timeless[0] == timeless[1]


def test_what_cannot_be_measured_is_left_out(make: Make, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "0.png").write_bytes((photos / "0.png").read_bytes())
    said: list[str] = []
    report = evaluate(
        make(instance_data_dir=str(tmp_path / "one"), class_prompt=None, seeds=1, text_encoder="none"),
        on_event=lambda event: said.append(event.get("message", "")),
    )
    assert report is not None
    figures = report["adapters"][0]["figures"]
    for name in ("prompt_following", "diversity", "class_likeness", "class_drift"):
        assert figures[name] is None
    assert figures["likeness"]["ceiling"] is None and figures["likeness"]["low"] is None
    assert report["copy_limit"] is None and report["adapters"][0]["likeness_gap_closed"] is None
    assert any("one photo" in text for text in said) and any("too few for intervals" in text for text in said)
    assert "no scale to be judged on" in "\n".join(evaluate_report.in_words(report))


def test_pocket_is_judged_by_its_own_judge(tmp_path: Path) -> None:
    subject = load_subject("zorp")
    (tmp_path / "prompts.txt").write_text("{} on a beach\n")
    config = EvaluateConfig(
        model="pocket", adapter=(str(write_adapter("pocket", tmp_path / "noise.safetensors")),),
        instance_data_dir=str(subject.photos_dir), instance_prompt=subject.instance_prompt,
        class_prompt=subject.class_prompt, prompts=str(tmp_path / "prompts.txt"), seeds=3, num_inference_steps=6,
        unrelated_prompts=str(tmp_path / "prompts.txt"), output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    report = evaluate(config)
    assert report is not None and report["guidance"] == 3.0
    assert report["encoders"] == {"image": "pocket's judge", "text": "pocket's judge"}
    assert report["photos"]["likeness"] == pytest.approx(0.72, abs=0.01)
    assert report["base"]["likeness"]["mean"] < 0.3
    assert report["base"]["prompt_following"]["mean"] > 0.6


def test_a_sweep_draws_every_weight_and_rank(make: Make) -> None:
    config = make(sweep_weights="1,0", sweep_ranks="1,2")
    report = sweep.sweep(config)
    folder = Path(config.output_dir)
    assert report is not None and json.loads((folder / "report.json").read_text()) == report
    assert [(one["rank"], one["weight"]) for one in report["points"]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    at = {(one["rank"], one["weight"]): one["figures"]["likeness"]["mean"] for one in report["points"]}
    assert at[1, 0] == at[2, 0] and len({at[1, 0], at[1, 1], at[2, 1]}) == 3
    assert len(list(folder.glob("pictures/rank-2-weight-1/*.png"))) == 6
    with Image.open(folder / "sweep.png") as picture:
        assert picture.width > 800 and picture.height > 600
    table = sweep.table(report).splitlines()
    assert len(table) == 7 and sum("←" in line for line in table) == 1
    assert "does best with weight" in sweep.in_words(report)[0]


def test_a_rank_that_the_adapter_has_changes_nothing(make: Make) -> None:
    swept, judged = sweep.sweep(make(sweep_ranks="2")), evaluate(make(unrelated_prompts=None, class_prompt=None))
    plain = sweep.sweep(make(sweep_weights="1"))
    assert swept is not None and plain is not None and judged is not None
    for name in ("likeness", "prompt_following", "nearest_photo"):
        at_rank, as_it_is = (one["points"][0]["figures"][name]["mean"] for one in (swept, plain))
        assert at_rank == pytest.approx(as_it_is, abs=2e-3)
    likeness = plain["points"][0]["figures"]["likeness"]["mean"]
    assert likeness == judged["adapters"][0]["figures"]["likeness"]["mean"]


def test_a_stop_gives_no_figures(make: Make) -> None:
    assert evaluate(make(), should_stop=lambda: True) is None
    assert sweep.sweep(make(sweep_weights="0,1"), should_stop=lambda: True) is None


def test_prompts_of_the_plan(make: Make) -> None:
    plan = make_plan(make())
    assert plan.plain == ("a photo of a dog", "a photo of a dog on a beach")
    assert plan.kind == ("a photo of a dog",) and plan.seeds == (0, 1, 2)
    default = make_plan(make(prompts=None, unrelated_prompts=None, class_prompt="a photo of a cup"))
    assert default.subject[1] == "a photo of sks dog on a beach"
    assert len(default.unrelated) == 7 and not any("cup" in prompt for prompt in default.unrelated)
    assert make_plan(make(class_prompt=None)).plain == plan.subject


def test_mistakes_are_found_before_anything_is_drawn(make: Make, tmp_path: Path, photos: Path) -> None:
    def refused(kind: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            evaluate(make(**changes))
        assert not (tmp_path / "out").exists()

    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n \n")
    refused(DatasetError, "no image in", instance_data_dir=str(tmp_path / "empty"))
    refused(DatasetError, "no folder", instance_data_dir=str(tmp_path / "nowhere"))
    refused(ConfigError, "is empty", prompts=str(tmp_path / "blank.txt"))
    refused(ConfigError, "cannot be read", prompts=str(tmp_path / "nowhere.txt"))
    refused(ConfigError, "instance_prompt is empty", instance_prompt=" ")
    refused(ConfigError, "--adapter is missing", adapter=())
    other = write_adapter("pocket", tmp_path / "of_pocket.safetensors")
    refused(AdapterMismatchError, "of_pocket", adapter=(str(other),))


def test_a_folder_with_something_else_is_left_alone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not an evaluation"):
        evaluate(make(output_dir=str(tmp_path / "thesis")))
    with pytest.raises(ConfigError, match="is a file"):
        evaluate(make(output_dir=str(tmp_path / "thesis" / "thesis.txt")))
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sweep_weights": "0,a"}, "numbers with commas"),
        ({"sweep_weights": "0,nan"}, "finite"),
        ({"sweep_ranks": "0,4"}, "at least 1"),
        ({"sweep_ranks": "1.5"}, "whole numbers"),
        ({"sweep_weights": ",".join(str(k) for k in range(201))}, "200 is the limit"),
        ({"sweep_weights": "1", "adapter": ("a", "b")}, "one --adapter"),
        ({"seeds": 0}, "--seeds"),
    ],
)
def test_settings_that_cannot_be_meant(make: Make, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        validate(replace(make(), **changes))


def test_copies_are_reported_as_memorised() -> None:
    one = {
        "name": "dog", "likeness_gap_closed": 1.0, "prompt_following_kept": 0.9, "memorised": True,
        "copies": [{"prompt": 0, "seed": 0, "photo": 1, "similarity": 0.99}],
        "figures": {"class_likeness": Figure(0.1, floor=0.0, ceiling=0.7).rounded()},
    }  # fmt: skip
    said = evaluate_report.in_words({"adapters": [one], "pictures_of_the_subject": 8, "copy_limit": 0.93})
    assert "closes 100% of the gap" in said[0] and "its 8 pictures: 1 (cosine above 0.93)" in said[1] and len(said) == 2
    collapsed = {**one, "figures": {"class_likeness": Figure(0.6, floor=0.0, ceiling=0.7).rounded()}}
    said = evaluate_report.in_words({"adapters": [collapsed], "pictures_of_the_subject": 8, "copy_limit": 0.93})
    assert "the class has become the subject" in said[1] and "--with_prior_preservation" in said[1]


def test_cells_and_tables() -> None:
    assert evaluate_report.cell(Figure(0.5, 0.4, 0.6).rounded()) == "0.50 [0.40, 0.60]"
    assert evaluate_report.cell(Figure(-0.001).rounded()) == "0.00"
    assert evaluate_report.cell(None) == "–"
    assert (
        evaluate_report.markdown([["", "a"], ["base", "1.00"]]) == "|      | a    |\n|------|------|\n| base | 1.00 |"
    )


@pytest.mark.parametrize(("low", "high"), [(-0.14, 0.72), (0.27, 0.31), (0, 1), (0.5, 0.5), (-1, -0.9)])
def test_ticks_are_round_and_reach_over_the_curves(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7
    assert all(len(f"{tick:g}") <= 9 for tick in ticks)


def test_labels_do_not_cover_one_another() -> None:
    black = (0, 0, 0)
    placed = pushed_apart([(100, "a", black), (101, "b", black), (199, "c", black), (200, "d", black)], 17, 0, 200)
    places = [place for place, _, _ in placed]
    assert [name for _, name, _ in placed] == ["a", "b", "c", "d"]
    assert all(later - earlier >= 17 for earlier, later in pairwise(places)) and places[-1] <= 200
