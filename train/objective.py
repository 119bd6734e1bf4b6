"""The diffusion objective: noise a latent, let the model say what was added, weigh the error.

Ho et al., 2020 (epsilon), Salimans & Ho, 2022 (v), Lin et al., 2023 (schedules that end in pure noise), Lipman et al.,
2023, and Esser et al., 2024 (flow matching). Which of them a model was made with is read from its scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from lora_diffusion.errors import ConfigError
from train.weighting import Weighting, mean_per_sample

PREDICTIONS = ("epsilon", "v_prediction")
QUANTILES = 2**16


class Objective(Protocol):
    """What a denoiser is asked while it learns. Latents and noise are (batch, channels, height, width), times (batch,).

    `len(objective)` is the number of equally likely draws of a timestep; `times` says which time each stands for.
    """

    @property
    def prediction(self) -> str:
        """`epsilon`, `v_prediction` or `flow`."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Objective: ...

    def times(self, drawn: torch.Tensor) -> torch.Tensor:
        """The times that integers from 0 to below `len` stand for."""

    def told(self, times: torch.Tensor) -> torch.Tensor:
        """Times as the model is told them."""

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """What the model is shown."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """What it should say."""

    def snr(self, times: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio, shape (batch,)."""

    def share(self, times: torch.Tensor) -> torch.Tensor:
        """How far along the schedule the times are: 0 without noise, 1 at its end."""


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of a latent is left at each timestep.

    Attributes:
        alphas_cumprod: (timesteps,) fp32, the share of the signal's variance: x_t = sqrt(a) x_0 + sqrt(1 - a) noise.
        prediction: what the model was taught to say, `epsilon` or `v_prediction`.
        first, last: timesteps are drawn from `first` to below `last` (default: all).
    """

    alphas_cumprod: torch.Tensor
    prediction: str
    first: int = 0
    last: int | None = None

    @classmethod
    def of(
        cls, scheduler: Any, *, zero_snr: bool = False, first: int | None = None, last: int | None = None
    ) -> NoiseSchedule:
        """The schedule of a diffusers scheduler.

        Args:
            zero_snr: bend the schedule so that its last timestep is pure noise.
            first, last: see the class.

        Raises:
            ConfigError: its model predicts something else (a sample, a flow); pure noise is asked of a model that
                predicts noise; no timestep is left to draw from.
        """
        from diffusers import DDPMScheduler

        changes = {"rescale_betas_zero_snr": True} if zero_snr else {}
        if "sigma_data" in scheduler.config:
            raise ConfigError(
                f"the model's {type(scheduler).__name__} is of the EDM kind, which cannot be trained; take a model "
                "that predicts noise or v"
            )
        training = DDPMScheduler.from_config(scheduler.config, **changes)
        prediction = training.config.prediction_type
        if prediction not in PREDICTIONS:
            raise ConfigError(f"the model predicts {prediction!r}; {' and '.join(PREDICTIONS)} can be trained")
        if zero_snr and prediction == "epsilon":
            raise ConfigError(
                "--rescale_betas_zero_snr needs a model that predicts v; this one predicts noise, and in pure noise "
                "there is nothing to be learned from naming it"
            )
        count = len(training.alphas_cumprod)
        begin, end = first or 0, count if last is None else last
        if not 0 <= begin < end <= count:
            raise ConfigError(
                f"--min_timestep {begin} and --max_timestep {end} leave no timestep: the model has 0 to {count}"
            )
        return cls(training.alphas_cumprod.to(torch.float32), prediction, begin, end)

    def to(self, device: torch.device) -> NoiseSchedule:
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def __len__(self) -> int:
        return (len(self.alphas_cumprod) if self.last is None else self.last) - self.first

    def times(self, drawn: torch.Tensor) -> torch.Tensor:
        return drawn + self.first

    def told(self, times: torch.Tensor) -> torch.Tensor:
        return times

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        signal, spread = self._scales(times)
        return signal * latents + spread * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The noise, or v = sqrt(a) noise - sqrt(1 - a) x_0."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._scales(times)
        return signal * noise - spread * latents

    def snr(self, times: torch.Tensor) -> torch.Tensor:
        """a / (1 - a)."""
        alphas = self.alphas_cumprod[times]
        return alphas / (1.0 - alphas)

    def share(self, times: torch.Tensor) -> torch.Tensor:
        return times / len(self.alphas_cumprod)

    def _scales(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas = self.alphas_cumprod[times].view(-1, 1, 1, 1)
        return alphas.sqrt(), (1.0 - alphas).sqrt()


@dataclass(frozen=True)
class FlowMatching:
    """A straight way from latents to noise, x_t = (1 - t) x_0 + t noise, whose direction the model should say.

    Times are drawn from a logit-normal distribution (Esser et al., 2024, section 3.1): t is the sigmoid of a normal
    variable, so that the middle of the way, where the task is hardest, comes up most often. A draw is the number of a
    quantile of it.

    Attributes:
        shift: moves times towards noise, t → shift t / (1 + (shift - 1) t), as schedulers for large pictures do.
        mean, std: of the normal variable.
    """

    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    prediction = "flow"

    @classmethod
    def of(cls, scheduler: Any) -> FlowMatching:
        """The way of a diffusers scheduler for flows. One that shifts by the size of a picture trains unshifted."""
        return cls(1.0 if scheduler.config.get("use_dynamic_shifting") else float(scheduler.config.get("shift", 1.0)))

    def to(self, device: torch.device) -> FlowMatching:
        return self

    def __len__(self) -> int:
        return QUANTILES

    def times(self, drawn: torch.Tensor) -> torch.Tensor:
        """Times in (0, 1), fp32."""
        quantile = (drawn.to(torch.float64) + 0.5) / QUANTILES
        normal = math.sqrt(2.0) * torch.erfinv(2.0 * quantile - 1.0)
        times = torch.sigmoid(self.mean + self.std * normal)
        return (self.shift * times / (1.0 + (self.shift - 1.0) * times)).to(torch.float32)

    def told(self, times: torch.Tensor) -> torch.Tensor:
        """In thousandths, as the models of diffusers count."""
        return times * 1000.0

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        t = times.view(-1, 1, 1, 1)
        return (1.0 - t) * latents + t * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """noise - x_0."""
        return noise - latents

    def snr(self, times: torch.Tensor) -> torch.Tensor:
        """((1 - t) / t)²."""
        return ((1.0 - times) / times).square()

    def share(self, times: torch.Tensor) -> torch.Tensor:
        return times


def objective_of(
    scheduler: Any, *, zero_snr: bool = False, first: int | None = None, last: int | None = None
) -> Objective:
    """The objective that a model's scheduler stands for; see `NoiseSchedule.of` for arguments and errors."""
    if not type(scheduler).__name__.startswith("FlowMatch"):
        return NoiseSchedule.of(scheduler, zero_snr=zero_snr, first=first, last=last)
    if zero_snr or first is not None or last is not None:
        raise ConfigError(
            "--rescale_betas_zero_snr, --min_timestep and --max_timestep belong to noise schedules; "
            "this model predicts a flow"
        )
    return FlowMatching.of(scheduler)


def with_zero_snr(scheduler: Any) -> Any:
    """The sampler for a model that was trained on the schedule of `NoiseSchedule.of(…, zero_snr=True)`.

    Its steps are counted from the end, so that the first is the pure noise that sampling begins with (Lin et al., 2023,
    section 3.3). A scheduler that cannot be bent so gives way to DDIM.
    """
    from diffusers import DDIMScheduler

    changes: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if "rescale_betas_zero_snr" in scheduler.config:
        return type(scheduler).from_config(scheduler.config, **changes)
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, **changes)


def predicted(
    model: Any, objective: Objective, noised: torch.Tensor, times: torch.Tensor, conditioning: Mapping[str, Any]
) -> torch.Tensor:
    """What the model says of noised latents, in fp32 and their shape.

    Args:
        model: a `UNet2DConditionModel`; it is run in its own precision.
        noised: (batch, channels, height, width) fp32.
        times: (batch,).
        conditioning: the model's other keyword arguments, `encoder_hidden_states` of (batch, tokens, dim) among them,
            in its precision; see `train.text_states`.
    """
    noised = noised.to(conditioning["encoder_hidden_states"].dtype)
    return model(noised, timestep=objective.told(times), **conditioning, return_dict=False)[0].to(torch.float32)


def losses(
    model: Any,
    objective: Objective,
    latents: torch.Tensor,
    noise: torch.Tensor,
    times: torch.Tensor,
    conditioning: Mapping[str, Any],
    *,
    weighting: Weighting | None = None,
    masks: torch.Tensor | None = None,
    perturbation: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted error of each sample, shape (batch,), fp32, with its graph.

    Args:
        model, conditioning: see `predicted`.
        latents: (batch, channels, height, width) fp32, scaled as the model expects them.
        noise: like latents.
        times: (batch,), of `objective.times`.
        weighting: how errors count (default: all alike, squared).
        masks: (batch, 1, height, width) fp32, how much each place counts (default: all alike).
        perturbation: like noise; what is added to the noise in the model's input, but not to what it should say.
        target: what the model should say, where that is not the objective's to know.
    """
    weighting = weighting or Weighting()
    shown = noise if perturbation is None else noise + perturbation
    said = predicted(model, objective, objective.noised(latents, shown, times), times, conditioning)
    wanted = objective.target(latents, noise, times) if target is None else target
    snr = objective.snr(times)
    distance = weighting.distance(said - wanted, snr, objective.share(times))
    return mean_per_sample(distance, masks) * weighting.weights(snr, objective.prediction)
