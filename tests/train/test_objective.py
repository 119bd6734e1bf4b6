"""The diffusion objective against diffusers' own scheduler and against the formulas written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

import lora_diffusion as ld
from lora_diffusion import ConfigError
from train.dreambooth import train
from train.dreambooth_checks import validate
from train.dreambooth_config import DreamBoothConfig
from train.objective import FlowMatching, NoiseSchedule, Objective, losses, objective_of, predicted, with_zero_snr
from train.randomness import Draws, derive_seed
from train.weighting import Weighting

T = torch.tensor([0, 1, 250, 999])
STATES = {"encoder_hidden_states": torch.zeros(4, 1, 1)}


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
def test_losses_by_hand(batch: tuple[torch.Tensor, torch.Tensor], prediction: str) -> None:
    latents, noise = batch
    schedule = NoiseSchedule.of(scheduler(prediction))

    def silent(noisy: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        return (torch.zeros_like(noisy),)

    weighting = Weighting(snr_gamma=5.0)
    each = losses(silent, schedule, latents, noise, T, STATES, weighting=weighting)
    target = schedule.target(latents, noise, T)
    plain = target.square().flatten(1).mean(1)
    torch.testing.assert_close(each, plain * weighting.weights(schedule.snr(T), prediction))
    torch.testing.assert_close(losses(silent, schedule, latents, noise, T, STATES), plain)


def test_a_perturbed_input_is_not_asked_for(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    latents, noise = batch
    schedule = NoiseSchedule.of(scheduler())
    shown: list[torch.Tensor] = []

    def watching(noisy: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        shown.append(noisy)
        return (noise,)

    extra = 0.1 * torch.ones_like(noise)
    assert losses(watching, schedule, latents, noise, T, STATES, perturbation=extra).tolist() == [0.0] * 4
    torch.testing.assert_close(shown[0], schedule.noised(latents, noise + extra, T))


def test_masks_say_what_counts(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    latents, noise = batch
    schedule = NoiseSchedule.of(scheduler())

    def silent(noisy: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        return (torch.zeros_like(noisy),)

    masks = torch.ones(4, 1, 8, 8)
    everywhere = losses(silent, schedule, latents, noise, T, STATES, masks=masks)
    torch.testing.assert_close(everywhere, losses(silent, schedule, latents, noise, T, STATES))
    masks[0, :, :, :4] = 0.0
    masks[1] *= 0.25
    masks[2] = 0.0
    each = losses(silent, schedule, latents, noise, T, STATES, masks=masks)
    torch.testing.assert_close(each[0], noise[0, :, :, 4:].square().mean())
    torch.testing.assert_close(each[1], everywhere[1])
    assert each[2] == 0.0


def test_timesteps_may_be_a_part(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    part = objective_of(scheduler(), first=200, last=300)
    assert len(part) == 100 and part.times(torch.tensor([0, 99])).tolist() == [200, 299]
    assert len(objective_of(scheduler())) == 1000 and torch.equal(objective_of(scheduler()).times(T), T)
    assert len(part.to(torch.device("cpu"))) == 100
    for first, last in ((300, 300), (0, 1001)):
        with pytest.raises(ConfigError, match=r"leave no timestep: the model has 0 to 1000"):
            objective_of(scheduler(), first=first, last=last)


def test_zero_terminal_snr_is_diffusers() -> None:
    bent = objective_of(scheduler("v_prediction"), zero_snr=True)
    assert isinstance(bent, NoiseSchedule) and bent.alphas_cumprod[-1] == 0.0
    theirs = DDPMScheduler.from_config(scheduler("v_prediction").config, rescale_betas_zero_snr=True)
    assert torch.equal(bent.alphas_cumprod, theirs.alphas_cumprod)
    last = torch.tensor([999])
    for weighting in (Weighting(snr_gamma=5.0), Weighting(debiased=True), Weighting(snr_gamma=5.0, soft=True)):
        assert bool(weighting.weights(bent.snr(last), "v_prediction").isfinite().all())
    with pytest.raises(ConfigError, match="needs a model that predicts v"):
        objective_of(scheduler(), zero_snr=True)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_a_sampler_follows_the_bent_schedule(kind: type) -> None:
    before = kind.from_config(scheduler("v_prediction").config)
    after = with_zero_snr(before)
    assert isinstance(after, DDIMScheduler if kind is PNDMScheduler else kind)
    assert after.config.prediction_type == "v_prediction" and not after.config.get("clip_sample", False)
    assert after.alphas_cumprod[-1] < 1e-6 < before.alphas_cumprod[-1]
    after.set_timesteps(5)
    assert int(after.timesteps[0]) == 999


def test_pictures_are_drawn_on_the_bent_schedule(tiny_pipeline: StableDiffusionPipeline) -> None:
    tiny_pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    tiny_pipeline.scheduler = with_zero_snr(tiny_pipeline.scheduler)
    picture = tiny_pipeline("sks", num_inference_steps=3, output_type="np").images
    assert picture.shape == (1, 32, 32, 3) and bool((picture == picture).all())


def test_flow_matching_is_diffusers(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    latents, noise = batch
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = objective_of(theirs)
    assert isinstance(ours, FlowMatching) and ours.shift == 3.0 and ours.prediction == "flow"
    sigmas = theirs.sigmas[[0, 100, 500, 999]]
    torch.testing.assert_close(
        ours.noised(latents, noise, sigmas), theirs.scale_noise(latents, theirs.timesteps[[0, 100, 500, 999]], noise)
    )
    torch.testing.assert_close(ours.told(sigmas), theirs.timesteps[[0, 100, 500, 999]])
    assert torch.equal(ours.target(latents, noise, sigmas), noise - latents)
    assert objective_of(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)) == FlowMatching()
    with pytest.raises(ConfigError, match="belong to noise schedules"):
        objective_of(theirs, first=3)
    with pytest.raises(ConfigError, match="--snr_gamma is made for models that predict noise or v"):
        Weighting(snr_gamma=5.0).check("flow")


def test_flow_times_are_logit_normal() -> None:
    flow = FlowMatching(mean=0.3, std=0.8)
    times = flow.times(torch.arange(len(flow)))
    assert times.dtype == torch.float32 and 0.0 < float(times.min()) < float(times.max()) < 1.0
    assert bool((times[1:] >= times[:-1]).all())
    logits = torch.logit(times.double())
    assert float(logits.mean()) == pytest.approx(0.3, abs=1e-3) and float(logits.std()) == pytest.approx(0.8, abs=1e-3)
    shifted = FlowMatching(shift=3.0).times(torch.tensor([2**15]))
    assert float(shifted) == pytest.approx(0.75, abs=1e-4)


def test_a_flow_is_learned(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The straight way's direction, said by one who knows it, has no loss; silence has that of noise and latents."""
    latents, noise = batch
    flow: Objective = FlowMatching()
    times = flow.times(torch.tensor([0, 20_000, 40_000, 65_535]))

    def knowing(noisy: torch.Tensor, timestep: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        t = (timestep / 1000.0).view(-1, 1, 1, 1)
        return ((noisy - latents) / t,)

    for loss_type in ("l2", "huber", "smooth_l1"):
        for schedule in ("constant", "exponential", "snr"):
            weighting = Weighting(loss_type=loss_type, huber_schedule=schedule)
            each = losses(knowing, flow, latents, noise, times, STATES, weighting=weighting)
            assert float(each.max()) < 1e-3
    said = predicted(knowing, flow, flow.noised(latents, noise, times), times, STATES)
    torch.testing.assert_close(said, noise - latents, rtol=1e-2, atol=1e-2)


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


def test_a_run_on_the_bent_schedule(
    make_config: Callable[..., DreamBoothConfig], tiny_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="needs a model that predicts v"):
        train(make_config(rescale_betas_zero_snr=True))
    assert not (tmp_path / "run").exists()
    tiny_pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    tiny_pipeline.save_pretrained(tmp_path / "model")
    looks = {"validation_prompt": "x", "validation_steps": 2, "num_validation_images": 1}
    made = {}
    for bent in (False, True):
        made[bent] = train(
            make_config(
                f"bent-{bent}",
                pretrained_model_name_or_path=str(tmp_path / "model"),
                rescale_betas_zero_snr=bent,
                validation_inference_steps=2,
                max_train_steps=2,
                learning_rate=1e-9,
                **looks,
            )
        )
    assert made[True].samples[0].read_bytes() != made[False].samples[0].read_bytes()
    assert made[True].loss != made[False].loss
    assert ld.read_adapter(made[True].adapter).metadata["settings"]["rescale_betas_zero_snr"] is True
    cards = {bent: (made[bent].output_dir / "README.md").read_text() for bent in made}
    assert 'rescale_betas_zero_snr=True, timestep_spacing="trailing"' in cards[True]
    assert "DDIMScheduler" in cards[True] and "DDIMScheduler" not in cards[False]
    code = cards[True].split("```python")[1].split("```")[0]
    compile(code, "card", "exec")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"debiased_estimation_loss": True, "snr_gamma": 5.0}, "two weightings"),
        ({"soft_min_snr": True}, "needs --snr_gamma"),
        ({"noise_offset": 0.1, "multires_noise_iterations": 6}, "give one of them"),
        ({"loss_type": "l1"}, "not one of l2, huber, smooth_l1"),
        ({"huber_c": 0.0}, "must be above 0"),
    ],
)
def test_what_does_not_go_together(make_config: Callable[..., DreamBoothConfig], changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(make_config(**changes))


def test_each_setting_changes_what_is_learned(make_config: Callable[..., DreamBoothConfig]) -> None:
    plain = train(make_config("plain", max_train_steps=4)).loss
    ways: list[dict[str, Any]] = [
        {"debiased_estimation_loss": True}, {"snr_gamma": 5.0}, {"snr_gamma": 5.0, "soft_min_snr": True},
        {"loss_type": "huber"}, {"loss_type": "smooth_l1"}, {"loss_type": "huber", "huber_schedule": "exponential"},
        {"multires_noise_iterations": 6}, {"input_perturbation": 0.1}, {"min_timestep": 900}, {"max_timestep": 100},
    ]  # fmt: skip
    results = [train(make_config(f"way{number}", max_train_steps=4, **way)).loss for number, way in enumerate(ways)]
    assert len({plain, *results}) == 1 + len(ways)


def test_edm_schedulers_are_refused() -> None:
    from diffusers import EDMEulerScheduler

    with pytest.raises(ConfigError, match="EDMEulerScheduler is of the EDM kind"):
        NoiseSchedule.of(EDMEulerScheduler())
