"""What is wished for while a run goes on is granted after the step, and changes nothing of what is learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train import dreambooth, text
from train.dreambooth_config import DreamBoothConfig
from train.text_config import TextConfig


class Wisher:
    """Wishes by the number of the time that it is asked."""

    def __init__(self, wishes: dict[int, set[str]]) -> None:
        self._wishes, self.asked = wishes, 0
        self.events: list[dict[str, Any]] = []

    def __call__(self) -> set[str]:
        self.asked += 1
        return self._wishes.get(self.asked, set())

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


def test_pictures_are_drawn_and_checkpoints_made_when_wished_for(make_config: Callable[..., DreamBoothConfig]) -> None:
    plain = dreambooth.train(make_config("plain"))
    wisher = Wisher({2: {"sample", "save"}, 3: {"save"}})
    config = make_config("wished", num_validation_images=1, validation_inference_steps=2)
    result = dreambooth.train(config, on_event=wisher.events.append, wishes=wisher)
    assert wisher.asked == 4
    assert [(event["step"], event["prompt"]) for event in wisher.told("sample")] == [(2, config.instance_prompt)]
    assert all(Path(event["path"]).is_file() for event in wisher.told("sample"))
    assert [event["step"] for event in wisher.told("checkpoint")] == [2, 3, 4]
    assert plain.adapter is not None and result.adapter is not None
    assert plain.adapter.read_bytes() == result.adapter.read_bytes()


def test_previews_that_were_due_are_not_drawn_twice(make_config: Callable[..., DreamBoothConfig]) -> None:
    wisher = Wisher({1: {"sample"}, 2: {"sample"}})
    config = make_config(
        num_validation_images=1, validation_inference_steps=2, validation_prompt="a sks dog", validation_steps=2
    )
    dreambooth.train(config, on_event=wisher.events.append, wishes=wisher)
    assert [event["step"] for event in wisher.told("sample")] == [1, 2, 4]


@pytest.mark.parametrize("judged", [True, False])
def test_a_text_run_measures_and_saves_when_wished_for(
    make_text_config: Callable[..., TextConfig], text_files: dict[str, Path], judged: bool
) -> None:
    files = {"validation_file": str(text_files["pairs"])} if judged else {}
    plain = text.train(make_text_config(name="plain", **files))
    wisher = Wisher({1: {"sample", "save"}})
    result = text.train(make_text_config(name="wished", **files), on_event=wisher.events.append, wishes=wisher)
    measured = [event for event in wisher.told("metrics") if event["part"] == "asked"]
    assert [event["step"] for event in measured] == ([1] if judged else [])
    assert judged == bool(measured and measured[0]["figures"])
    if not judged:
        assert any("nothing to judge by" in event["message"] for event in wisher.told("note"))
    assert [event["step"] for event in wisher.told("checkpoint")] == [1, 4]
    assert plain.adapter is not None and result.adapter is not None
    assert plain.adapter.read_bytes() == result.adapter.read_bytes()
