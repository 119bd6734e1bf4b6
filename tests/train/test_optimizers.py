"""Every optimizer by its name: it learns, says its rate, and goes on after a restore with the same bits."""

from __future__ import annotations

import math
import sys
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
from train.dreambooth_checks import validate
from train.dreambooth_config import OPTIMIZERS, DreamBoothConfig
from train.learner import Group, Learner, OptimizerSettings
from train.loop import LoopSettings
from train.optimizers import lora_plus
from train.record import read_events

Make = Callable[..., DreamBoothConfig]
PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule-free-adamw": "schedulefree"}
RATES = {"prodigy": 1.0}


def needed(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])


def make(name: str, **settings: Any) -> tuple[list[torch.nn.Parameter], Learner]:
    """Two layers, large enough for 8-bit state, in two groups; B begins at zero."""
    needed(name)
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.Parameter(torch.randn(4, 2048, generator=generator))
    b = torch.nn.Parameter(torch.zeros(2048, 4))
    rate = RATES.get(name, 0.05)
    groups = [Group("unet", {"x.lora_A": a}, rate), Group("unet", {"x.lora_B": b}, rate, "lora_B")]
    return [a, b], Learner(groups, OptimizerSettings(name, total_steps=40, **settings))


def goal(parameters: list[torch.nn.Parameter], position: int) -> list[torch.Tensor]:
    a, b = parameters
    wanted = torch.linspace(-1, 1, 4) + 0.1 * math.sin(position)
    return [((b @ wanted) - a.sum(0) - 2).square().mean()]


def steps(parameters: list[torch.nn.Parameter], learner: Learner, start: int, stop: int) -> list[loop.StepReport]:
    reports: list[loop.StepReport] = []
    loop.run(
        lambda p: goal(parameters, p), learner, LoopSettings(stop, 0), start_step=start, on_step=reports.append
    )  # fmt: skip
    return reports


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns_and_says_its_rate(name: str) -> None:
    parameters, learner = make(name)
    reports = steps(parameters, learner, 0, 200 if name == "prodigy" else 40)
    assert reports[-1].loss < 0.7 * reports[0].loss
    for report in reports:
        assert set(report.learning_rates) == {"unet", "unet/lora_B"}
        assert all(rate > 0 for rate in report.learning_rates.values())
    if name == "prodigy":  # the rate is what it has found, from 1e-6 on
        assert reports[0].learning_rates["unet"] == pytest.approx(1e-6)
        assert reports[-1].learning_rates["unet"] > 1e-4
    else:
        assert reports[0].learning_rates["unet"] == 0.05


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_one_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    settings = {"schedule": "constant_with_warmup", "warmup_steps": 6}
    whole, learner = make(name, **settings)
    reports = steps(whole, learner, 0, 12)
    with learner.averaged():
        result = [parameter.detach().clone() for parameter in whole]
    for cut in (3, 8):
        first, learner = make(name, **settings)
        steps(first, learner, 0, cut)
        with learner.averaged():  # looking changes nothing, nor what is saved meanwhile
            learner.save(tmp_path)
        second, learner = make(name, **settings)
        learner.load(tmp_path)
        again = steps(second, learner, cut, 12)
        assert again[0].learning_rates == reports[cut].learning_rates
        assert all(torch.equal(one, two) for one, two in zip(whole, second))
        with learner.averaged():
            assert all(torch.equal(one, two) for one, two in zip(result, second))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_warmup_is_reported(name: str) -> None:
    parameters, learner = make(name, schedule="constant_with_warmup", warmup_steps=4)
    rates = [report.learning_rates["unet"] for report in steps(parameters, learner, 0, 6)]
    if name == "schedule-free-adamw":
        assert rates == pytest.approx([0.0125, 0.025, 0.0375, 0.05, 0.05, 0.05])
    elif name != "prodigy":
        assert rates == pytest.approx([0.0, 0.0125, 0.025, 0.0375, 0.05, 0.05])


def test_schedule_free_shows_the_average_and_trains_beside_it() -> None:
    parameters, learner = make("schedule-free-adamw")
    with learner.averaged():
        assert learner.is_finite()  # before the first step there is none
    steps(parameters, learner, 0, 10)
    live = [parameter.detach().clone() for parameter in parameters]
    z = [learner.optimizer.state[parameter]["z"] for parameter in parameters]
    with learner.averaged():
        for shown, here, end in zip(parameters, live, z):
            # y = beta1 x + (1 - beta1) z, where x is the average
            torch.testing.assert_close(0.9 * shown + 0.1 * end, here, rtol=1e-4, atol=1e-5)
            assert not torch.equal(shown, here)
        with learner.averaged():
            assert not torch.equal(parameters[0], live[0])
        assert not torch.equal(parameters[0], live[0])
    assert all(torch.equal(one, two) for one, two in zip(parameters, live))
    steps(parameters, learner, 10, 11)


def test_lora_plus_is_two_rates() -> None:
    a, b, m = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    group = Group("unet", {"x.part.lora_A": a, "x.part.lora_B": b, "x.part.lora_magnitude_vector": m}, 1e-4)
    assert lora_plus(group, None) == [group]
    rest, second = lora_plus(group, 16.0)
    assert list(second.parameters) == ["x.part.lora_B"] and second.learning_rate == pytest.approx(1.6e-3)
    assert list(rest.parameters) == ["x.part.lora_A", "x.part.lora_magnitude_vector"] and rest.learning_rate == 1e-4
    assert [rest.label, second.label] == ["unet", "unet/lora_B"]
    learner = Learner([rest, second], OptimizerSettings())
    (a.sum() * 0 + b.sum() + m.sum()).backward()
    assert learner.layers_without_gradient() == ([], 1)
    assert [group.label for group in lora_plus(Group("words", {"vector": a}, 1.0), 16.0)] == ["words"]


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    group = Group("unet", {"x": torch.nn.Parameter(torch.ones(1))}, 1.0)
    with pytest.raises(ConfigError, match=rf"--optimizer {name} .*: pip install {package}"):
        Learner([group], OptimizerSettings(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_8bit_adam": True, "optimizer": "prodigy"}, "two optimizers"),
        ({"optimizer": "prodigy", "learning_rate": 1.0, "train_text_encoder": True}, "--text_encoder_lr the value"),
        ({"optimizer": "prodigy", "loraplus_lr_ratio": 16.0}, "--loraplus_lr_ratio asks for two"),
        ({"optimizer": "schedule-free-adamw", "lr_scheduler": "cosine"}, "needs no --lr_scheduler cosine"),
        ({"optimizer": "schedule-free-adamw", "use_ema": True}, "leave --use_ema out"),
        ({"optimizer": "schedule-free-adamw", "adam_beta1": 0.0}, "--adam_beta1 above 0"),
        ({"optimizer": "sgd"}, "not one of adamw"),
    ],
)
def test_what_does_not_go_together(make_config: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(make_config(**changes))
    validate(make_config(use_8bit_adam=True, optimizer="adamw8bit"))


RUN: dict[str, Any] = {
    "max_train_steps": 6,
    "checkpointing_steps": 100,
    "lora_dropout": 0.2,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 2,
    "train_text_encoder": True,
    "gradient_accumulation_steps": 2,
    "text_encoder_lr": 1e-3,
}


def tensors(path: Path | None) -> dict[str, torch.Tensor]:
    assert path is not None
    return ld.read_adapter(path).flat()


@pytest.mark.parametrize("name", OPTIMIZERS[1:])
def test_a_run_that_is_stopped_and_goes_on_ends_with_the_same_bytes(make_config: Make, name: str) -> None:
    needed(name)
    settings = {**RUN, "optimizer": name}
    if name == "prodigy":
        settings |= {"learning_rate": 1.0, "text_encoder_lr": 1.0}
    whole = train(make_config("whole", **settings))
    # A preview and a checkpoint on the way look at the average; that must not be seen in the result.
    looks = {"checkpointing_steps": 1, "validation_prompt": "x", "validation_steps": 2, "num_validation_images": 1,
             "validation_inference_steps": 1}  # fmt: skip
    config = make_config("parts", **{**settings, **looks})
    reached: list[int] = []
    stopped = train(
        config,
        on_event=lambda event: reached.append(event["step"]) if event["event"] == "step" else None,
        should_stop=lambda: bool(reached) and reached[-1] >= 3,
    )
    assert stopped.stopped and stopped.steps == 3
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert whole.adapter and resumed.adapter and resumed.adapter.read_bytes() == whole.adapter.read_bytes()
    events = read_events(whole.output_dir / "events.jsonl")
    rates = [event["lr"] for event in events if event["event"] == "step"]
    assert len(rates) == 6 and rates[-1] > 0
    assert events[-1]["event"] == "end" and events[-1]["skipped_steps"] == 0


def test_prodigy_with_a_small_rate_is_warned_of(make_config: Make) -> None:
    needed("prodigy")
    result = train(make_config(optimizer="prodigy", max_train_steps=1))
    warnings = [
        event["message"] for event in read_events(result.output_dir / "events.jsonl") if event["event"] == "warning"
    ]
    assert any("0.001 here; 1 is usual" in warning for warning in warnings)


def test_lora_plus_moves_b_farther(make_config: Make) -> None:
    plain = train(make_config("plain", max_train_steps=2))
    plus = train(make_config("plus", max_train_steps=2, loraplus_lr_ratio=4.0))
    for name, tensor in tensors(plain.adapter).items():
        if ".lora_B" in name or "lora_up" in name:
            assert float(tensors(plus.adapter)[name].abs().max()) > 2.5 * float(tensor.abs().max())
    step = next(event for event in read_events(plus.output_dir / "events.jsonl") if event["event"] == "step")
    assert step["lr"] == 1e-3 and step["lr/unet/lora_B"] == pytest.approx(4e-3)


def test_eight_bit_adam_has_two_names(make_config: Make) -> None:
    needed("adamw8bit")
    old = train(make_config("old", max_train_steps=2, use_8bit_adam=True))
    new = train(make_config("new", max_train_steps=2, optimizer="adamw8bit"))
    for name, tensor in tensors(old.adapter).items():
        assert torch.equal(tensor, tensors(new.adapter)[name])
