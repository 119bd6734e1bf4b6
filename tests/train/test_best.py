"""--keep_best: the step whose previews were judged best is kept, also over interruptions; overfitting is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lora_diffusion as ld
from lora_diffusion import ConfigError, ModelNotFoundError
from train.best import Best
from train.dreambooth import Result, train
from train.dreambooth_config import DreamBoothConfig
from train.encoders import Encoders
from train.metrics import as_unit
from train.preview import Preview
from train.record import RunFolder, read_events

Make = Callable[..., DreamBoothConfig]


@pytest.fixture
def judged(judge_folders: dict[str, Path]) -> dict[str, Any]:
    """Settings of a run that keeps its best step."""
    return {
        "keep_best": True,
        "validation_prompt": "a photo of sks dog at night",
        "validation_steps": 2,
        "validation_inference_steps": 2,
        "num_validation_images": 2,
        "validation_image_encoder": str(judge_folders["dino"]),
        "validation_text_encoder": str(judge_folders["clip"]),
        "max_train_steps": 6,
        "checkpointing_steps": 2,
        "learning_rate": 3e-2,
        "class_prompt": "a photo of a dog",
    }


def scores(result: Result) -> dict[int, dict[str, Any]]:
    """The last score event of each step, without its time."""
    events = [event for event in read_events(result.output_dir / "events.jsonl") if event["event"] == "score"]
    return {event["step"]: {k: v for k, v in event.items() if k != "time"} for event in events}


def test_the_best_step_is_kept_beside_the_last(make_config: Make, judged: dict[str, Any]) -> None:
    result = train(make_config(**judged))
    found = scores(result)
    assert list(found) == [2, 4, 6]
    best = max(found.values(), key=lambda event: (event["score"], -event["step"]))
    assert result.best == result.output_dir / "best.safetensors" and result.best_step == best["step"]
    kept = ld.read_adapter(result.best).metadata
    assert kept["steps"] == best["step"]
    assert kept["scores"] == {
        name: best[name] for name in ("score", "likeness", "prompt_following", "diversity", "copied")
    }
    checkpoint = result.output_dir / "checkpoints" / f"step-{best['step']}" / "adapter.safetensors"
    assert same_tensors(result.best, checkpoint)
    end = read_events(result.output_dir / "events.jsonl")[-1]
    assert end["event"] == "end" and end["best"] == str(result.best) and end["best_step"] == best["step"]
    for event in found.values():
        assert event["likeness_floor"] is not None and event["likeness_ceiling"] is not None


def same_tensors(one: Path, other: Path) -> bool:
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_judging_changes_nothing_in_what_is_trained(make_config: Make, judged: dict[str, Any]) -> None:
    judging = train(make_config("judging", **judged, lora_dropout=0.2))
    plain = train(make_config("plain", **{**judged, "keep_best": False}, lora_dropout=0.2))
    assert judging.adapter is not None and plain.adapter is not None
    assert judging.adapter.read_bytes() == plain.adapter.read_bytes()
    assert plain.best is None and not (plain.output_dir / "best.safetensors").exists() and scores(plain) == {}


@pytest.mark.parametrize("ema", [False, True])
def test_a_resumed_run_keeps_the_best_so_far(make_config: Make, judged: dict[str, Any], ema: bool) -> None:
    judged["use_ema"] = ema
    whole = train(make_config("whole", **judged))
    config = make_config("parts", **judged)
    reached: list[int] = []
    stopped = train(
        config,
        on_event=lambda event: reached.append(event["step"]) if event["event"] == "step" else None,
        should_stop=lambda: bool(reached) and reached[-1] >= 3,
    )
    assert stopped.stopped and stopped.best_step == 2
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert whole.best is not None and resumed.best is not None and whole.best_step == resumed.best_step
    assert resumed.best.read_bytes() == whole.best.read_bytes()
    assert resumed.adapter is not None and whole.adapter is not None
    assert resumed.adapter.read_bytes() == whole.adapter.read_bytes()
    assert scores(resumed) == scores(whole)


def test_killed_between_a_checkpoint_and_its_judging(make_config: Make, judged: dict[str, Any]) -> None:
    whole = train(make_config("whole", **judged))
    config = make_config("killed", **judged)
    reached: list[int] = []
    train(
        config,
        on_event=lambda event: reached.append(event["step"]) if event["event"] == "step" else None,
        should_stop=lambda: bool(reached) and reached[-1] >= 4,
    )
    log = Path(config.output_dir) / "events.jsonl"
    lines = [line for line in log.read_text().splitlines() if json.loads(line).get("step") != 4 or "score" not in line]
    log.write_text("\n".join(lines) + "\n")  # step 4 has its checkpoint, and was never judged
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert scores(resumed) == scores(whole)
    assert resumed.best is not None and whole.best is not None
    assert resumed.best.read_bytes() == whole.best.read_bytes()


def test_started_again_without_it_leaves_no_older_best(make_config: Make, judged: dict[str, Any]) -> None:
    config = make_config(**judged)
    assert train(config).best is not None
    again = train(replace(config, keep_best=False, overwrite=True))
    assert not (again.output_dir / "best.safetensors").exists()


def test_what_it_needs(make_config: Make, judged: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--keep_best judges the pictures of --validation_prompt"):
        train(make_config(keep_best=True))
    with pytest.raises(ModelNotFoundError, match=r"--validation_image_encoder .* no config\.json"):
        train(make_config(**{**judged, "validation_image_encoder": str(tmp_path)}))
    assert not (tmp_path / "run").exists()


class Colours:
    """A judge that reads figures out of a colour, so that a test can say what it finds.

    Two photos have the cosine 0.8: green is 1 in the one and 2 in the other. Of other pictures red is the likeness (255
    gives 0.95 to both photos), green below or above the middle one of two kinds, blue the prompt following.
    """

    name = "colours"

    def embed(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return as_unit(torch.tensor([self._vector(picture) for picture in pictures]))

    def follows(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor | None:
        return torch.tensor([self._colour(picture)[2] / 255 for picture in pictures])

    def _vector(self, picture: Image.Image) -> tuple[float, float, float]:
        red, green, _ = self._colour(picture)
        if green in (1, 2):
            return 0.9**0.5, 0.1**0.5 * (3 - 2 * green), 0.0
        near = red / 255
        return near, 0.0, (1 - near**2) ** 0.5 * (1 if green > 127 else -1)

    def _colour(self, picture: Image.Image) -> tuple[int, ...]:
        colour = picture.getpixel((0, 0))
        assert isinstance(colour, tuple)
        return colour


PHOTOS = ((0, 1, 0), (0, 2, 0))
BASE = ((0, 0, 200), (0, 255, 200))


class Bench:
    """A `Best` with pictures of one colour instead of a model."""

    def __init__(self, folder: Path) -> None:
        self.place = folder
        self.saved: list[int] = []
        self.events: list[dict[str, Any]] = []
        preview = Preview("sks dog", 2, 1, 2, 0, 8, "m")
        config = DreamBoothConfig("m", "d", "sks dog", keep_best=True, validation_prompt="sks dog")
        run = RunFolder(folder, self.events.append)
        judge = Colours()
        self.best = Best(config, Encoders(judge, judge), map(self.plain, PHOTOS), preview, run, self.save)
        self.best.begin(lambda prompt: [self.plain(colour) for colour in BASE], 0)

    def save(self, step: int, scores: dict[str, Any]) -> Path:
        self.saved.append(step)
        return self.place / "best.safetensors"

    def plain(self, colour: tuple[int, int, int]) -> Image.Image:
        return Image.new("RGB", (8, 8), colour)

    def step(self, step: int, *colours: tuple[int, int, int]) -> None:
        files = []
        for number, colour in enumerate(colours):
            files.append(self.place / f"{step}-{number}.png")
            self.plain(colour).save(files[-1])
        self.best.judge(step, files)

    @property
    def warnings(self) -> list[str]:
        return [event["message"] for event in self.events if event["event"] == "warning"]


def test_overfitting_is_said_once_and_not_shipped(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.step(1, (100, 0, 200), (100, 255, 200))
    bench.step(2, (205, 0, 200), (205, 255, 190))
    bench.step(3, (235, 0, 100), (235, 255, 100))  # more like the photos, and the prompt is half lost
    bench.step(4, (236, 0, 90), (236, 255, 90))
    assert bench.saved == [1, 2] and bench.best.best is not None and bench.best.best.step == 2
    found = [event for event in bench.events if event["event"] == "score"]
    assert [event["best"] for event in found] == [True, True, False, False]
    assert found[2]["likeness"] > found[2]["likeness_ceiling"] > found[1]["likeness"] > found[0]["likeness"]
    assert (found[0]["likeness_floor"], found[0]["likeness_ceiling"]) == pytest.approx((0, 0.8), abs=1e-4)
    assert found[2]["score"] == pytest.approx(0.5, abs=1e-3)  # no more for the likeness than the photos have
    assert len(bench.warnings) == 1
    assert "step 3 overfits" in bench.warnings[0] and "prompt following falls (0.76 to 0.39)" in bench.warnings[0]
    assert "best.safetensors keeps step 2" in bench.warnings[0]


def test_copies_of_a_photo_are_not_the_best(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.step(1, (205, 0, 200), (205, 255, 200))
    bench.step(2, (0, 1, 200), (0, 1, 200))
    assert bench.saved == [1]
    assert "2 of 2 pictures are copies" in bench.warnings[0] and "the pictures become one" in bench.warnings[0]


def test_a_step_that_is_only_worse_is_no_overfitting(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.step(1, (205, 0, 200), (205, 255, 200))
    bench.step(2, (150, 0, 100), (150, 255, 100))
    assert bench.saved == [1] and bench.warnings == []


def test_pictures_that_were_not_all_drawn_are_not_judged(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.step(1, (205, 0, 200))
    assert bench.events == [] and bench.saved == []


def test_the_first_of_equals_is_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for step in (1, 2):
        bench.step(step, (190, 0, 200), (190, 255, 200))
    assert bench.saved == [1]
