"""How an error counts: its weight by the noise of its timestep, and how fast it grows with its size.

Weights: min-SNR (Hang et al., 2023), its smooth kin (Crowson et al., 2024), debiased estimation (Yu et al., 2024).
Distances: squared, pseudo-Huber and smooth L1, whose threshold may follow the timestep, with the names and formulas
of kohya's scripts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_diffusion.errors import ConfigError

SNR_BOUNDS = (1e-4, 1000.0)  # of debiased weights, where a timestep has next to no signal or no noise


@dataclass(frozen=True)
class Weighting:
    """How errors count; by default all alike, and squared.

    Attributes:
        snr_gamma: min-SNR weights with this gamma; None for none.
        soft: let min-SNR's corner be smooth: snr gamma / (snr + gamma) in place of min(snr, gamma).
        debiased: debiased estimation's weights.
        loss_type: `l2`, `huber` or `smooth_l1`.
        huber_c: where squared error turns into absolute error.
        huber_schedule: `constant`; `exponential` and `snr` fall from 1 without noise towards huber_c with all of it.
    """

    snr_gamma: float | None = None
    soft: bool = False
    debiased: bool = False
    loss_type: str = "l2"
    huber_c: float = 0.1
    huber_schedule: str = "snr"

    def check(self, prediction: str) -> None:
        """Raises ConfigError where weights by the SNR are asked for and the model predicts neither noise nor v."""
        if prediction == "flow" and (self.snr_gamma is not None or self.debiased):
            what = "--debiased_estimation_loss" if self.debiased else "--snr_gamma"
            raise ConfigError(f"{what} is made for models that predict noise or v; this one predicts a flow")

    def weights(self, snr: torch.Tensor, prediction: str) -> torch.Tensor:
        """Weights of shape (batch,) for signal-to-noise ratios of that shape.

        Min-SNR: min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v. The former is written as min(1,
        gamma / snr), so that it stays finite where a schedule ends in pure noise (snr = 0). Debiased: 1 / sqrt(snr) for
        epsilon, 1 / (snr + 1) for v.
        """
        if self.snr_gamma is not None:
            gamma = self.snr_gamma
            if prediction == "epsilon":
                return gamma / (snr + gamma) if self.soft else (gamma / snr).clamp(max=1.0)
            # snr / (snr + gamma) is 1 / (1 + gamma / snr), which stays finite without noise (snr = inf)
            least = gamma / (1.0 + gamma / snr) if self.soft else snr.clamp(max=gamma)
            return least / (snr + 1.0)
        if self.debiased:
            bounded = snr.clamp(*SNR_BOUNDS)
            return bounded.rsqrt() if prediction == "epsilon" else 1.0 / (bounded + 1.0)
        return torch.ones(snr.shape, device=snr.device)

    def distance(self, error: torch.Tensor, snr: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """What each element of an error costs, in the error's shape (batch, …).

        Args:
            error: what the model said less what it should have said, fp32.
            snr: (batch,).
            share: (batch,), how far along the schedule the sample is: 0 without noise, 1 at its end.
        """
        if self.loss_type == "l2":
            return error.square()
        c = self._threshold(snr, share).view(-1, *[1] * (error.dim() - 1))
        reach = 2.0 * ((error.square() + c.square()).sqrt() - c)
        return c * reach if self.loss_type == "huber" else reach

    def _threshold(self, snr: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        if self.huber_schedule == "constant":
            return torch.full_like(snr, self.huber_c)
        if self.huber_schedule == "exponential":
            return self.huber_c ** share.to(snr.dtype)
        return (1.0 - self.huber_c) / (1.0 + snr.rsqrt()).square() + self.huber_c


def mean_per_sample(distance: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
    """The mean over all but the first dimension, shape (batch,).

    Args:
        distance: (batch, channels, height, width).
        masks: (batch, 1, height, width) fp32, how much each place counts; a sample without any has a mean of 0.
    """
    if masks is None:
        return distance.mean(dim=(1, 2, 3))
    area = masks.sum(dim=(1, 2, 3)) * distance.shape[1]
    return (distance * masks).sum(dim=(1, 2, 3)) / area.clamp(min=1e-6)
