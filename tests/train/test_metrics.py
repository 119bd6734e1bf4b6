"""Figures on embeddings made by hand, whose values are known; intervals that cover as often as they say."""

import math

import pytest
import torch

from train import metrics
from train.metrics import Figure


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane."""
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def test_likeness_is_the_mean_cosine_to_all_photos():
    found = metrics.likeness(at(0, 90), at(0, 60))
    assert found.tolist() == pytest.approx([0.75, (0 + math.cos(math.pi / 6)) / 2])


def test_the_ceiling_leaves_each_photo_itself_out():
    assert metrics.likeness_among(at(0, 60)) == pytest.approx(0.5)
    assert metrics.likeness_among(at(0, 60, 120)) == pytest.approx((0.5 + 0.5 - 0.5) / 3)
    assert metrics.likeness_among(at(0)) is None


def test_nearest_and_the_limit_of_copies():
    real = at(0, 60, 180)
    assert metrics.nearest(at(50, 170), real).tolist() == pytest.approx([math.cos(math.pi / 18)] * 2)
    assert metrics.nearest_among(real) == pytest.approx(0.5)
    assert metrics.copy_limit(real) == pytest.approx(0.75)
    assert metrics.copy_limit(at(0)) is None and metrics.nearest_among(at(0)) is None


def test_distance_is_zero_for_the_same_picture_and_never_below():
    pictures = metrics.as_unit(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
    assert float(metrics.distance(pictures, pictures).min()) >= 0
    assert float(metrics.distance(pictures, pictures).max()) < 1e-6
    assert metrics.distance(at(0), at(60)).tolist() == pytest.approx([0.5])


def test_diversity_is_over_pairs_of_the_same_prompt():
    pictures = torch.stack([at(0, 60), at(0, 180)])  # distances 0.5 and 2
    found = metrics.diversity(pictures)
    assert found is not None and found.mean == pytest.approx(1.25)
    assert metrics.diversity(pictures[:, :1]) is None


def test_diversity_of_equal_pictures_is_zero_with_its_interval():
    found = metrics.diversity(at(10, 10, 10, 10).unsqueeze(0))
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-6)


def test_over_seeds_is_the_mean_and_leaves_out_prompts_without_a_value():
    values = torch.tensor([[0.2, 0.4, 0.6], [0.5, math.nan, 0.1]])
    found = metrics.over_seeds(values)
    assert found is not None and found.mean == pytest.approx(0.4)
    assert metrics.over_seeds(values[1:]) is None


def test_prompts_do_not_widen_the_interval_seeds_do():
    prompts_differ = metrics.over_seeds(torch.tensor([[0.0] * 5, [1.0] * 5]))
    seeds_differ = metrics.over_seeds(torch.tensor([[0.0, 0.2, 0.5, 0.8, 1.0]] * 2))
    assert prompts_differ is not None and prompts_differ.low == prompts_differ.high == 0.5
    assert seeds_differ is not None and seeds_differ.low is not None and seeds_differ.low < 0.2


def test_the_same_values_give_the_same_interval_and_few_seeds_none():
    values = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    assert metrics.over_seeds(values) == metrics.over_seeds(values)
    two = metrics.over_seeds(values[:, :2])
    assert two is not None and two.low is None and two.high is None


@pytest.mark.parametrize("seeds", [4, 10])
def test_intervals_cover_the_truth_about_as_often_as_they_say(seeds):
    draws = torch.Generator().manual_seed(2)
    covered = narrow = 0
    for _ in range(200):
        found = metrics.over_seeds(torch.randn(1, seeds, generator=draws) + 3)
        assert found is not None and found.low is not None and found.high is not None
        covered += found.low <= 3 <= found.high
        narrow += found.high - found.low < 8
    assert 180 <= covered <= 198  # 95 % of 200 is 190; plain percentiles of four values give about 160
    assert narrow > 190


def test_intervals_of_diversity_cover_too():
    """Pairs share seeds: an interval that took them for independent would be half as wide."""
    draws = torch.Generator().manual_seed(3)
    many = metrics.as_unit(torch.randn(4000, 3, generator=draws) + torch.tensor([1.5, 0, 0]))
    mean = many.mean(dim=0)
    truth = 1 - float(mean @ mean)
    covered = 0
    for k in range(150):
        found = metrics.diversity(many[8 * k : 8 * k + 8].unsqueeze(0))
        assert found is not None and found.low is not None and found.high is not None
        covered += found.low <= truth <= found.high
    assert 128 <= covered <= 150


def test_the_gap_that_is_closed():
    assert metrics.gap_closed(Figure(0.5, floor=0.2, ceiling=0.8)) == pytest.approx(0.5)
    assert metrics.gap_closed(Figure(0.5, floor=0.8, ceiling=0.2)) is None
    assert metrics.gap_closed(Figure(0.5)) is None


def test_the_score_falls_with_lost_prompts_and_copies_and_ends_at_the_photos():
    like, follow = Figure(0.8, floor=0.2, ceiling=0.8), Figure(0.9, floor=0.0, ceiling=0.9)
    assert metrics.score(like, follow, 0) == pytest.approx(1)
    assert metrics.score(Figure(0.95, floor=0.2, ceiling=0.8), follow, 0) == pytest.approx(1)
    assert metrics.score(like, Figure(0.45, floor=0.0, ceiling=0.9), 0) == pytest.approx(0.5)
    assert metrics.score(like, follow, 0.25) == pytest.approx(0.75)
    assert metrics.score(Figure(0.1, floor=0.2, ceiling=0.8), follow, 0) == 0
    assert metrics.score(Figure(0.6, floor=0.2), None, 0) == pytest.approx(0.5)  # one photo: 1 is the ceiling


def test_a_figure_is_rounded_for_the_report():
    assert Figure(0.123456, floor=None, ceiling=1).rounded() == {
        "mean": 0.1235, "low": None, "high": None, "floor": None, "ceiling": 1,
    }  # fmt: skip
