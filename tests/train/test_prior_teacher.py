"""The base model as the teacher of what the class looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_diffusion as ld
from lora_diffusion import ConfigError
from train.dreambooth import train
from train.dreambooth_checks import validate
from train.dreambooth_config import DreamBoothConfig
from train.dreambooth_learn import BatchLoss
from train.record import read_events

Make = Callable[..., DreamBoothConfig]
TEACHER: dict[str, Any] = {
    "with_prior_preservation": True,
    "prior_mode": "teacher",
    "class_prompt": "a photo of a dog",
}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The losses of every micro-batch, part by part."""
    seen: list[list[float]] = []
    original = BatchLoss.__call__

    def watching(self: BatchLoss, position: int) -> Iterator[torch.Tensor]:
        seen.append([])
        for loss in original(self, position):
            assert loss.requires_grad
            seen[-1].append(loss.item())
            yield loss

    monkeypatch.setattr(BatchLoss, "__call__", watching)
    return seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_text_encoder": True, "lora_dropout": 0.3, "gradient_checkpointing": True},
        {"mixed_precision": "bf16", "train_batch_size": 2},
        {"loss_type": "huber", "snr_gamma": 5.0, "input_perturbation": 0.1, "multires_noise_iterations": 4},
    ],
)
def test_at_first_there_is_nothing_to_correct(make_config: Make, parts: list[list[float]], changes: dict) -> None:
    result = train(make_config(max_train_steps=3, text_encoder_lr=1e-3, **TEACHER, **changes))
    assert all(len(losses) == 2 and losses[0] > 0 for losses in parts)
    assert parts[0][1] == 0.0
    assert all(losses[1] > 0 for losses in parts[1:])
    assert not (result.output_dir / "class_images").exists()


def test_it_holds_the_class_where_it_was(make_config: Make, parts: list[list[float]]) -> None:
    settings: dict[str, Any] = {"max_train_steps": 24, "train_text_encoder": True, "learning_rate": 3e-3, **TEACHER}
    ends = []
    for weight in (0.0, 10.0):
        parts.clear()
        train(make_config(f"weight{weight}", prior_loss_weight=weight or 1e-9, **settings))
        ends.append(sum(losses[1] for losses in parts[-10:]) / (weight or 1e-9))
    assert ends[1] < 0.5 * ends[0]


def test_the_text_encoder_of_the_base_is_asked(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher reads the class prompt with the text encoder as it was, not as it has become."""
    asked: list[tuple[bool, torch.Tensor]] = []
    original = BatchLoss._mean

    def watching(self: BatchLoss, *args: Any, **options: Any) -> torch.Tensor:
        states = self.texts.states

        def noting(captions: list[str], *rest: Any, **more: Any) -> Any:
            made = states(captions, *rest, **more)
            if options.get("taught"):
                asked.append((torch.is_grad_enabled(), made["encoder_hidden_states"].detach().clone()))
                assert set(captions) == {"a photo of a dog"}
            return made

        monkeypatch.setattr(self.texts, "states", noting)
        try:
            return original(self, *args, **options)
        finally:
            monkeypatch.setattr(self.texts, "states", states)

    monkeypatch.setattr(BatchLoss, "_mean", watching)
    train(make_config(max_train_steps=3, train_text_encoder=True, text_encoder_lr=1e-2, **TEACHER))
    base = [states for grad, states in asked if not grad]
    now = [states for grad, states in asked if grad]
    assert len(base) == len(now) == 3
    assert torch.equal(base[0], base[2]) and torch.equal(base[0], now[0]) and not torch.equal(base[2], now[2])


def test_stopped_and_resumed(make_config: Make) -> None:
    settings: dict[str, Any] = {
        "max_train_steps": 6, "checkpointing_steps": 2, "lora_dropout": 0.2, "train_text_encoder": True, **TEACHER,
    }  # fmt: skip
    whole = train(make_config("whole", **settings))
    config = make_config("parts", **settings)
    reached: list[int] = []
    train(
        config,
        on_event=lambda event: reached.append(event["step"]) if event["event"] == "step" else None,
        should_stop=lambda: bool(reached) and reached[-1] >= 3,
    )
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert whole.adapter and resumed.adapter and whole.adapter.read_bytes() == resumed.adapter.read_bytes()


def test_accumulation_equals_a_bigger_batch(make_config: Make) -> None:
    settings: dict[str, Any] = {
        "max_train_steps": 3, "train_text_encoder": True, "adam_epsilon": 1e-3, "input_perturbation": 0.1,
        "multires_noise_iterations": 3, "loss_type": "smooth_l1", "debiased_estimation_loss": True, **TEACHER,
    }  # fmt: skip
    big = train(make_config("a", train_batch_size=4, **settings))
    small = train(make_config("b", gradient_accumulation_steps=4, **settings))
    assert big.adapter and small.adapter
    left, right = ld.read_adapter(big.adapter).flat(), ld.read_adapter(small.adapter).flat()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-6)


def test_class_pictures_are_not_used(make_config: Make, tmp_path: Path) -> None:
    result = train(make_config(max_train_steps=1, class_data_dir=str(tmp_path / "none"), **TEACHER))
    messages = [event.get("message", "") for event in read_events(result.output_dir / "events.jsonl")]
    assert any("--class_data_dir is not used" in message for message in messages)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="needs --with_prior_preservation"):
        validate(make_config(prior_mode="teacher"))
