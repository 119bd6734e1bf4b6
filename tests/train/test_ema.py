"""The average of a run: what it is, what is saved of it, and that looking at it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_diffusion as ld
from lora_diffusion import ConfigError
from train import loop
from train.dreambooth import train
from train.dreambooth_config import DreamBoothConfig
from train.learner import Group, Learner, OptimizerSettings
from train.loop import LoopSettings
from train.preview import Preview

Make = Callable[..., DreamBoothConfig]


def make(decay: float | None = 0.9, *, warmup: bool = False, size: int = 3) -> tuple[torch.nn.Parameter, Learner]:
    parameter = torch.nn.Parameter(torch.zeros(size))
    settings = OptimizerSettings(ema_decay=decay, ema_warmup=warmup)
    return parameter, Learner([Group("unet", {"x.a": parameter}, 0.1)], settings)


def steps(parameter: torch.nn.Parameter, learner: Learner, start: int, stop: int) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    loop.run(
        lambda position: [(parameter - position).square().sum()], learner, LoopSettings(stop, 0), start_step=start,
        after_step=lambda _: seen.append(parameter.detach().clone()),
    )  # fmt: skip
    return seen


@pytest.mark.parametrize("warmup", [False, True])
def test_it_is_the_average_by_hand(warmup: bool) -> None:
    parameter, learner = make(0.6, warmup=warmup)
    expected = torch.zeros(3)
    for number, value in enumerate(steps(parameter, learner, 0, 12)):
        grown = 1 - (1 + number) ** (-2 / 3) if warmup else (1 + number) / (10 + number)
        decay = min(grown, 0.6) if number else 0.0
        expected = decay * expected + (1 - decay) * value
    with learner.averaged():
        torch.testing.assert_close(parameter.detach(), expected)
        assert parameter.dtype == torch.float32


def test_looking_leaves_the_bits_alone() -> None:
    parameter, learner = make()
    steps(parameter, learner, 0, 5)
    before = parameter.detach().clone()
    with learner.averaged():
        assert not torch.equal(parameter, before)
        with learner.averaged():
            assert not torch.equal(parameter, before)
    assert torch.equal(parameter, before)
    with pytest.raises(RuntimeError, match="in between"), learner.averaged():
        raise RuntimeError("in between")
    assert torch.equal(parameter, before)
    plain, other = make(None)
    steps(plain, other, 0, 5)
    with other.averaged():
        assert torch.equal(plain, before)


def test_a_restored_one_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole, learner = make()
    steps(whole, learner, 0, 9)
    with learner.averaged():
        average = whole.detach().clone()
    part, learner = make()
    steps(part, learner, 0, 4)
    with learner.averaged():
        learner.save(tmp_path)
    again, learner = make()
    learner.load(tmp_path)
    steps(again, learner, 4, 9)
    assert torch.equal(whole, again)
    with learner.averaged():
        assert torch.equal(again, average)


def test_a_checkpoint_without_one_is_refused(tmp_path: Path) -> None:
    _, learner = make(None)
    learner.save(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        make()[1].load(tmp_path)


def tensors(path: Path | None) -> dict[str, torch.Tensor]:
    assert path is not None
    return ld.read_adapter(path).flat()


RUN: dict[str, Any] = {"max_train_steps": 6, "use_ema": True, "ema_decay": 0.8, "lora_dropout": 0.1}


def test_the_average_is_saved_and_drawn(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, torch.Tensor]] = []

    def watching(self: Preview, pipe: Any, *_: Any) -> list[Any]:
        drawn.append({name: tensor.clone() for name, tensor in ld.get_adapter(pipe).flat().items()})
        return []

    monkeypatch.setattr(Preview, "draw", watching)
    with_it = train(make_config("with", validation_prompt="x", validation_steps=6, checkpointing_steps=3, **RUN))
    without = train(make_config("without", **{**RUN, "use_ema": False}))
    average, last = tensors(with_it.adapter), tensors(without.adapter)
    assert any(not torch.equal(average[name], last[name]) for name in last)
    assert all(torch.equal(average[name], drawn[-1][name]) for name in average)
    checkpoint = tensors(with_it.output_dir / "checkpoints" / "step-6" / "adapter.safetensors")
    assert all(torch.equal(average[name], checkpoint[name]) for name in average)
    # What is trained is the same with and without it.
    assert with_it.loss == without.loss


def test_killed_and_resumed(make_config: Make) -> None:
    whole = train(make_config("whole", **RUN, checkpointing_steps=100))
    config = make_config("parts", **RUN, checkpointing_steps=2)
    reached: list[int] = []
    train(
        config,
        on_event=lambda event: reached.append(event["step"]) if event["event"] == "step" else None,
        should_stop=lambda: bool(reached) and reached[-1] >= 3,
    )
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert whole.adapter and resumed.adapter and whole.adapter.read_bytes() == resumed.adapter.read_bytes()
