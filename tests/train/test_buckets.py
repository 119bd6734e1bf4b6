"""Buckets: which sizes there are, which picture goes where, and that every picture comes up equally often."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from lora_diffusion import ConfigError
from train.buckets import automatic, bucket_sizes, nearest, parse
from train.dreambooth_checks import validate
from train.dreambooth_config import DreamBoothConfig
from train.latents import Order
from train.randomness import Draws

CONFIG = DreamBoothConfig("pocket", "photos", "a photo of sks dog", aspect_ratio_buckets="auto")
SHAPES = [(8, 8)] * 3 + [(6, 10)] * 2 + [(10, 6)]


def test_automatic_sizes_of_sd_and_sdxl() -> None:
    small, large = bucket_sizes(CONFIG, 512, 8), bucket_sizes(CONFIG, 1024, 8)
    assert small[0] == (512, 512) and {(448, 576), (576, 448), (256, 1024), (384, 640)} <= set(small)
    # Among those that SDXL was trained with (Podell et al., 2023, appendix I).
    assert {(512, 2048), (768, 1344), (832, 1216), (896, 1152), (1024, 1024), (1152, 896)} <= set(large)
    for sizes, side in ((small, 512), (large, 1024)):
        assert len(set(sizes)) == len(sizes)
        assert all((height, width) in sizes for width, height in sizes)
        assert all(w % 64 == h % 64 == 0 and 0.75 * side**2 < w * h <= side**2 for w, h in sizes)


def test_steps_fit_small_pictures_and_odd_factors() -> None:
    assert all(width % 8 == height % 8 == 0 for width, height in bucket_sizes(CONFIG, 64, 8))
    assert (56, 72) in bucket_sizes(CONFIG, 64, 8)
    assert (28, 36) in bucket_sizes(CONFIG, 32, 4)
    assert all(width % 12 == height % 12 == 0 for width, height in bucket_sizes(CONFIG, 96, 12))


def test_limits_and_steps_that_are_asked_for() -> None:
    sizes = bucket_sizes(replace(CONFIG, bucket_reso_steps=32, min_bucket_reso=384, max_bucket_reso=640), 512, 8)
    assert (480, 544) in sizes and min(map(min, sizes)) == 384 and max(map(max, sizes)) == 640
    assert automatic(512, 64, 512, 512) == [(512, 512)]
    with pytest.raises(ConfigError, match="--bucket_reso_steps 12 is not a multiple of 8"):
        bucket_sizes(replace(CONFIG, bucket_reso_steps=12), 512, 8)
    with pytest.raises(ConfigError, match=r"--min_bucket_reso 768 .* must have --resolution 512 between them"):
        bucket_sizes(replace(CONFIG, min_bucket_reso=768), 512, 8)


def test_listed_sizes() -> None:
    assert parse("auto") is None
    assert parse("512,512; 576x448;512,512") == [(512, 512), (448, 576)]  # height first
    assert bucket_sizes(replace(CONFIG, aspect_ratio_buckets="512,512;576,448"), 512, 8) == [(512, 512), (448, 576)]
    assert bucket_sizes(replace(CONFIG, aspect_ratio_buckets=None), 512, 8) == [(512, 512)]
    with pytest.raises(ConfigError, match="the sides of 576,444 must be multiples of 8"):
        bucket_sizes(replace(CONFIG, aspect_ratio_buckets="576,444"), 512, 8)


@pytest.mark.parametrize("text", ["", "512", "512,512;", "a,b", "512,4", "512,512,512", "-512,512", "\u0665,\u0665"])
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--aspect_ratio_buckets .* is no size"):
        validate(replace(CONFIG, aspect_ratio_buckets=text))


def test_every_picture_goes_to_the_nearest_shape() -> None:
    buckets = bucket_sizes(CONFIG, 512, 8)
    assert nearest((3000, 3000), buckets) == (512, 512)
    assert nearest((4032, 3024), buckets) == (576, 448)
    assert nearest((3024, 4032), buckets) == (448, 576)
    assert nearest((100, 9000), buckets) == (256, 1024)
    assert nearest((500, 500), [(256, 256), (512, 512)]) == (512, 512)
    for width in range(200, 2000, 37):  # no other bucket keeps more of the picture
        kept = {
            bucket: min(width / 700 / (bucket[0] / bucket[1]), bucket[0] / bucket[1] * 700 / width)
            for bucket in buckets
        }
        assert kept[nearest((width, 700), buckets)] == max(kept.values())


@pytest.mark.parametrize("group", [1, 2, 4, 5])
def test_every_step_is_of_one_bucket_and_every_picture_comes_equally_often(group: int) -> None:
    order, draws = Order(SHAPES, group, "instance"), Draws(0)
    for round_ in range(3):
        first = round_ * group * len(SHAPES)
        pictures = [order.at(draws, position)[0] for position in range(first, first + group * len(SHAPES))]
        assert Counter(pictures) == dict.fromkeys(range(len(SHAPES)), group)
        for step in range(0, len(pictures), group):
            assert len({SHAPES[picture] for picture in pictures[step : step + group]}) == 1
    steps = [SHAPES[order.at(draws, step * group)[0]] for step in range(len(SHAPES) * 4)]
    rounds = [tuple(steps[start : start + len(SHAPES)]) for start in range(0, len(steps), len(SHAPES))]
    assert len(set(rounds)) > 1  # shuffled anew


def test_turns_count_how_often_a_picture_came_up() -> None:
    order, draws = Order(SHAPES, 2, "instance"), Draws(0)
    seen: Counter[int] = Counter()
    for position in range(96):
        picture, turn = order.at(draws, position)
        assert turn == seen[picture]
        seen[picture] += 1


def test_a_position_has_one_answer_whatever_was_asked_before() -> None:
    order = Order(SHAPES, 4, "instance")
    draws = Draws(3)
    forwards = [order.at(draws, position) for position in range(60)]
    assert [order.at(Draws(3), position) for position in reversed(range(60))] == forwards[::-1]
    assert [order.at(Draws(4), position) for position in range(60)] != forwards


def test_one_bucket_is_as_if_there_were_none() -> None:
    draws = Draws(0)
    order = Order([(8, 8)] * 5, 3, "instance")
    assert [order.at(draws, position)[0] for position in range(40)] == [
        draws.shuffled("instance", position, 5) for position in range(40)
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aspect_ratio_buckets": None, "min_bucket_reso": 256}, "--min_bucket_reso needs --aspect_ratio_buckets auto"),
        ({"aspect_ratio_buckets": "64,64", "bucket_reso_steps": 8}, "--bucket_reso_steps needs"),
    ],
)
def test_limits_without_automatic_buckets(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(replace(CONFIG, **changes))
