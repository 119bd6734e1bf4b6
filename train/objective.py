"""The diffusion objective: noise a latent, let the UNet say what was added, weigh the error.

Ho et al., 2020 (epsilon), Salimans & Ho, 2022 (v), Hang et al., 2023 (min-SNR). Which of the two predictions a model
makes, and its noise schedule, are read from the scheduler that comes with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_diffusion.errors import ConfigError

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of a latent is left at each timestep.

    Attributes:
        alphas_cumprod: (timesteps,) fp32, the share of the signal's variance: x_t = sqrt(a) x_0 + sqrt(1 - a) noise.
        prediction: what the model was taught to say, `epsilon` or `v_prediction`.
    """

    alphas_cumprod: torch.Tensor
    prediction: str

    @classmethod
    def of(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule of a diffusers scheduler.

        Raises:
            ConfigError: its model predicts something else (a sample, a flow).
        """
        from diffusers import DDPMScheduler

        training = DDPMScheduler.from_config(scheduler.config)
        prediction = training.config.prediction_type
        if prediction not in PREDICTIONS:
            raise ConfigError(f"the model predicts {prediction!r}; {' and '.join(PREDICTIONS)} can be trained")
        return cls(training.alphas_cumprod.to(torch.float32), prediction)

    def to(self, device: torch.device) -> NoiseSchedule:
        return NoiseSchedule(self.alphas_cumprod.to(device), self.prediction)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t for a batch: (batch, channels, height, width) latents and noise, (batch,) timesteps."""
        signal, spread = self._scales(timesteps)
        return signal * latents + spread * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the model should say: the noise, or v = sqrt(a) noise - sqrt(1 - a) x_0."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._scales(timesteps)
        return signal * noise - spread * latents

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio a / (1 - a), shape (batch,)."""
        alphas = self.alphas_cumprod[timesteps]
        return alphas / (1.0 - alphas)

    def weights(self, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
        """Min-SNR-gamma weights, shape (batch,); ones without gamma (Hang et al., 2023, section 3.4).

        min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v. The former is written as min(1, gamma /
        snr) so that it stays finite where a schedule ends in pure noise (snr = 0).
        """
        if gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        snr = self.snr(timesteps)
        if self.prediction == "epsilon":
            return (gamma / snr).clamp(max=1.0)
        return snr.clamp(max=gamma) / (snr + 1.0)

    def _scales(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt(), (1.0 - alphas).sqrt()


def losses(
    unet: Any,
    schedule: NoiseSchedule,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    *,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """The weighted squared error of each sample, shape (batch,), fp32, with its graph.

    Args:
        unet: a `UNet2DConditionModel`; it is run in its own precision.
        latents: (batch, channels, height, width) fp32, scaled as the UNet expects them.
        noise: like latents.
        timesteps: (batch,) int64.
        conditioning: the UNet's other keyword arguments, `encoder_hidden_states` of (batch, tokens, dim) among them,
            in its precision; see `train.text_states`.
    """
    noisy = schedule.noised(latents, noise, timesteps).to(conditioning["encoder_hidden_states"].dtype)
    if noisy.device.type == "cpu":
        noisy = noisy.contiguous(memory_format=torch.channels_last)
    said = unet(noisy, timesteps, **conditioning, return_dict=False)[0]
    error = (said.to(torch.float32) - schedule.target(latents, noise, timesteps)).square().mean(dim=(1, 2, 3))
    return error * schedule.weights(timesteps, snr_gamma)
