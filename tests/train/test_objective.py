"""The diffusion objective against diffusers' own scheduler and against the formulas written out."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from lora_diffusion import ConfigError
from train.objective import NoiseSchedule, losses
from train.randomness import Draws, derive_seed

T = torch.tensor([0, 1, 250, 999])


def scheduler(prediction: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False
    )


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, 8, 8, generator=generator), torch.randn(4, 4, 8, 8, generator=generator)


def test_noising_and_targets_are_diffusers(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    latents, noise = batch
    theirs = DDPMScheduler.from_config(scheduler("v_prediction").config)
    ours = NoiseSchedule.of(scheduler("v_prediction"))
    torch.testing.assert_close(ours.noised(latents, noise, T), theirs.add_noise(latents, noise, T))
    torch.testing.assert_close(ours.target(latents, noise, T), theirs.get_velocity(latents, noise, T))
    assert NoiseSchedule.of(scheduler()).target(latents, noise, T) is noise


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights(prediction: str, gamma: float) -> None:
    schedule = NoiseSchedule.of(scheduler(prediction))
    weights = schedule.weights(T, gamma)
    for weight, t in zip(weights.tolist(), T.tolist()):
        alpha = float(schedule.alphas_cumprod[t])
        snr = alpha / (1 - alpha)
        divisor = snr if prediction == "epsilon" else snr + 1
        assert weight == pytest.approx(min(snr, gamma) / divisor, rel=1e-4)
    assert torch.equal(schedule.weights(T, None), torch.ones(4))


def test_min_snr_is_finite_at_pure_noise() -> None:
    for prediction, expected in (("epsilon", 1.0), ("v_prediction", 0.0)):
        schedule = NoiseSchedule(torch.tensor([0.9, 0.0]), prediction)
        assert schedule.weights(torch.tensor([1]), 5.0).item() == expected


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_losses_by_hand(batch: tuple[torch.Tensor, torch.Tensor], prediction: str) -> None:
    latents, noise = batch
    schedule = NoiseSchedule.of(scheduler(prediction))

    def silent(noisy: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        return (torch.zeros_like(noisy),)

    each = losses(silent, schedule, latents, noise, T, {"encoder_hidden_states": torch.zeros(4, 1, 1)}, snr_gamma=5.0)
    target = schedule.target(latents, noise, T)
    expected = target.square().flatten(1).mean(1) * schedule.weights(T, 5.0)
    torch.testing.assert_close(each, expected)


def test_other_predictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="sample"):
        NoiseSchedule.of(scheduler("sample"))


def test_draws_have_addresses() -> None:
    draws = Draws(5)
    first = torch.randn(3, generator=draws.at("x", 7))
    torch.randn(3, generator=draws.at("y"))
    assert torch.equal(first, torch.randn(3, generator=draws.at("x", 7)))
    assert derive_seed(5, "x", 7) != derive_seed(5, "x", 8) != derive_seed(6, "x", 7)
    for epoch in range(3):
        assert sorted(draws.shuffled("s", epoch * 5 + place, 5) for place in range(5)) == list(range(5))
