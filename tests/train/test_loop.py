"""The loop on a problem of four numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler

from lora_diffusion import ConfigError, TrainingError
from train import loop
from train.dreambooth import train
from train.dreambooth_config import DreamBoothConfig
from train.dreambooth_learn import BatchLoss
from train.learner import Group, Learner, OptimizerSettings
from train.loop import Diverged, LoopSettings
from train.record import read_events

Make = Callable[..., DreamBoothConfig]


def make(rate: float = 0.1, *, scale: bool = False, **settings: object) -> tuple[torch.nn.Parameter, Learner]:
    parameter = torch.nn.Parameter(torch.ones(4))
    group = Group("unet", {"layer.a": parameter}, rate)
    return parameter, Learner([group], OptimizerSettings(**settings), scale_gradients=scale)


def target(position: int) -> torch.Tensor:
    return torch.arange(4.0) * (position % 3)


def test_it_learns_and_reports() -> None:
    parameter, learner = make(rate=0.05)
    reports: list[loop.StepReport] = []
    end = loop.run(lambda _: [(parameter - 2).square().mean()], learner, LoopSettings(60, 0), on_step=reports.append)
    assert end == loop.LoopEnd(60, stopped=False)
    assert [report.step for report in reports] == list(range(1, 61))
    assert reports[-1].loss < reports[0].loss / 10
    assert reports[0].grad_norm == pytest.approx(1.0)
    assert reports[0].learning_rates == {"unet": 0.05}


def test_accumulation_is_a_bigger_batch() -> None:
    results = []
    for accumulation in (1, 4):
        parameter, learner = make()

        def micro_losses(position: int, parameter=parameter, accumulation=accumulation) -> list[torch.Tensor]:
            size = 4 // accumulation
            rows = torch.stack([target(position * size + row) for row in range(size)])
            return [(parameter - rows).square().mean()]

        loop.run(micro_losses, learner, LoopSettings(5, 0, accumulation))
        results.append(parameter.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stops_before_anything_moves(bad: float) -> None:
    parameter, learner = make()

    def micro_losses(position: int) -> list[torch.Tensor]:
        return [(parameter - 2).square().mean() * (bad if position == 3 else 1.0)]

    seen: list[torch.Tensor] = []
    with pytest.raises(Diverged, match=r"at step 4 with a learning rate of 0\.1") as caught:
        loop.run(
            micro_losses, learner, LoopSettings(9, 0), after_step=lambda _: seen.append(parameter.detach().clone())
        )
    assert caught.value.step == 4 and isinstance(caught.value, TrainingError)
    assert torch.equal(parameter, seen[2])
    learner.step_back()
    assert torch.equal(parameter, seen[1])


def test_overflow_with_a_scaler_is_skipped_and_ends_at_last() -> None:
    parameter, learner = make(scale=True)
    reports: list[loop.StepReport] = []

    def micro_losses(position: int) -> list[torch.Tensor]:
        return [(parameter - 2).square().mean() * (math.inf if position in (1, 2) else 1.0)]

    end = loop.run(micro_losses, learner, LoopSettings(5, 0), on_step=reports.append)
    assert end == loop.LoopEnd(5, stopped=False, skipped=2)
    assert [report.skipped for report in reports] == [False, True, True, False, False]
    assert learner.is_finite()
    with pytest.raises(Diverged, match=r"the loss became nan at step 26 .* and so for 26 steps in a row"):
        loop.run(lambda _: [parameter.mean() * math.nan], learner, LoopSettings(100, 0))


def test_stopping_after_a_step() -> None:
    parameter, learner = make()
    asked = iter([False, True])
    end = loop.run(lambda _: [parameter.square().mean()], learner, LoopSettings(9, 0), should_stop=lambda: next(asked))
    assert end == loop.LoopEnd(2, stopped=True)


def test_clipping() -> None:
    parameter, learner = make()
    (parameter * 100).sum().backward()
    assert learner.gradient_norm(1.0).item() == pytest.approx(200.0)
    assert parameter.grad is not None and parameter.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_schedules_are_diffusers(name: str) -> None:
    parameter, learner = make(schedule=name, warmup_steps=3, total_steps=12, cycles=2, power=2.0)
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    expected = get_scheduler(name, other, num_warmup_steps=3, num_training_steps=12, num_cycles=2, power=2.0)
    rates: list[float] = []
    loop.run(
        lambda _: [parameter.square().mean()],
        learner,
        LoopSettings(12, 0),
        on_step=lambda report: rates.append(report.learning_rates["unet"]),
    )
    for rate in rates:
        assert rate == pytest.approx(other.param_groups[0]["lr"], abs=1e-12)
        other.step()
        expected.step()


def test_a_restored_learner_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    def run(learner: Learner, parameter: torch.nn.Parameter, start: int, stop: int) -> None:
        loop.run(lambda p: [(parameter - target(p)).square().mean()], learner, LoopSettings(stop, 0), start_step=start)

    settings = {"schedule": "cosine", "total_steps": 10}
    whole, learner = make(**settings)
    run(learner, whole, 0, 10)
    first, learner = make(**settings)
    run(learner, first, 0, 4)
    learner.save(tmp_path)
    second, learner = make(**settings)
    learner.load(tmp_path)
    run(learner, second, 4, 10)
    assert torch.equal(whole, second)


def test_nothing_that_is_not_finite_is_saved(tmp_path: Path) -> None:
    parameter, learner = make()
    with torch.no_grad():
        parameter[1] = math.nan
    with pytest.raises(TrainingError, match="finite"):
        learner.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_and_one_of_other_layers(tmp_path: Path) -> None:
    _, learner = make()
    learner.save(tmp_path)
    other = Learner([Group("unet", {"layer.b": torch.nn.Parameter(torch.ones(2))}, 0.1)], OptimizerSettings())
    with pytest.raises(ConfigError, match="other layers"):
        other.load(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match="cannot be read"):
        learner.load(tmp_path)


def test_layers_without_a_gradient_are_found() -> None:
    used, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    learner = Learner([Group("unet", {"x.a": used, "y.a": idle}, 0.1)], OptimizerSettings())
    used.sum().backward()
    assert learner.layers_without_gradient() == (["unet.y"], 2)


def test_a_run_tells_what_it_skipped(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    original = BatchLoss.__call__
    bad = {2}

    def overflowing(self: BatchLoss, position: int) -> Iterator[torch.Tensor]:
        for loss in original(self, position):
            yield loss * (math.inf if position in bad else 1.0)

    monkeypatch.setattr(BatchLoss, "__call__", overflowing)
    config = make_config(mixed_precision="fp16", max_train_steps=5)
    events = read_events(train(config).output_dir / "events.jsonl")
    assert [event.get("skipped", False) for event in events if event["event"] == "step"] == [i == 2 for i in range(5)]
    assert events[-1]["event"] == "end" and events[-1]["skipped_steps"] == 1
    bad.update(range(3, 99))
    with pytest.raises(TrainingError, match=r"in a row: .* kept: .* step 26 .* \(--mixed_precision bf16 or no"):
        train(replace(config, overwrite=True, max_train_steps=99, checkpointing_steps=2))
