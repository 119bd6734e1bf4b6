"""Weights and distances against the formulas written out, and against kohya's where it has them."""

from __future__ import annotations

import math

import pytest
import torch

from train.weighting import Weighting

ALPHAS = [0.999, 0.9, 0.5, 0.0047]
SNR = torch.tensor([alpha / (1 - alpha) for alpha in ALPHAS])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr(prediction: str, gamma: float) -> None:
    weights = Weighting(snr_gamma=gamma).weights(SNR, prediction)
    soft = Weighting(snr_gamma=gamma, soft=True).weights(SNR, prediction)
    for weight, smooth, snr in zip(weights.tolist(), soft.tolist(), SNR.tolist()):
        divisor = snr if prediction == "epsilon" else snr + 1
        assert weight == pytest.approx(min(snr, gamma) / divisor, rel=1e-4)
        assert smooth == pytest.approx(snr * gamma / (snr + gamma) / divisor, rel=1e-4)
    assert torch.equal(Weighting().weights(SNR, prediction), torch.ones(4))


def test_they_are_finite_at_both_ends() -> None:
    ends = torch.tensor([0.0, math.inf])
    assert Weighting(snr_gamma=5.0).weights(ends, "epsilon").tolist() == [1.0, 0.0]
    assert Weighting(snr_gamma=5.0).weights(ends, "v_prediction").tolist() == [0.0, 0.0]
    assert Weighting(snr_gamma=5.0, soft=True).weights(ends, "v_prediction").tolist() == [0.0, 0.0]
    for prediction in ("epsilon", "v_prediction"):
        assert bool(Weighting(debiased=True).weights(ends, prediction).isfinite().all())


def test_debiased_estimation() -> None:
    weighting = Weighting(debiased=True)
    assert weighting.weights(SNR, "epsilon").tolist() == pytest.approx([snr**-0.5 for snr in SNR.tolist()], rel=1e-4)
    by_v = [1 / (snr + 1) for snr in SNR.tolist()]
    assert weighting.weights(SNR, "v_prediction").tolist() == pytest.approx(by_v, rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_huber_and_smooth_l1(schedule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(4, 2, 3, 3, generator=generator)
    share = torch.tensor([0.0, 0.25, 0.5, 0.999])
    huber = Weighting(loss_type="huber", huber_c=0.2, huber_schedule=schedule).distance(error, SNR, share)
    smooth = Weighting(loss_type="smooth_l1", huber_c=0.2, huber_schedule=schedule).distance(error, SNR, share)
    for row, (snr, part) in enumerate(zip(SNR.tolist(), share.tolist())):
        c = {
            "constant": 0.2,
            "exponential": math.exp(math.log(0.2) * part),
            "snr": 0.8 / (1 + snr**-0.5) ** 2 + 0.2,
        }[schedule]
        root = 2 * ((error[row] ** 2 + c**2).sqrt() - c)
        torch.testing.assert_close(huber[row], c * root, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(smooth[row], root, rtol=1e-4, atol=1e-6)


def test_huber_is_squared_for_small_errors_and_straight_for_large_ones() -> None:
    weighting = Weighting(loss_type="huber", huber_c=0.5, huber_schedule="constant")
    one = torch.ones(1)
    small, large, larger = (float(weighting.distance(one * x, one, one)) for x in (1e-2, 100.0, 200.0))
    assert small == pytest.approx(1e-4, rel=1e-2)
    assert larger / large == pytest.approx(2.0, rel=1e-2)
