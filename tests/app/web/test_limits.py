"""What is allowed follows from the place, and the place from the environment."""

from __future__ import annotations

from dataclasses import fields

import pytest

from app.web.limits import PUBLIC, Limits, where
from lora_diffusion.errors import ConfigError


def test_ones_own_machine_may_train() -> None:
    place = where({})
    assert place.training_allowed and not place.public and not place.is_space and place.limits == Limits()
    assert place.limits.models is None and not place.limits.own_files_only


def test_a_space_does_not_train_unless_its_owner_says_so() -> None:
    place = where({"SPACE_ID": "someone/space"})
    assert place.is_space and place.public and not place.training_allowed and "duplicate" in place.reason
    assert where({"SYSTEM": "spaces"}).is_space
    place = where({"SPACE_ID": "someone/space", "LORA_DIFFUSION_TRAINING": "1"})
    assert place.training_allowed and place.limits == PUBLIC and place.limits.private_runs and not place.reason


def test_zero_gpu_never_trains() -> None:
    place = where({"SPACE_ID": "a/b", "SPACES_ZERO_GPU": "true", "LORA_DIFFUSION_TRAINING": "1"})
    assert place.zero_gpu and not place.training_allowed and "seconds" in place.reason


def test_training_can_be_turned_off_anywhere() -> None:
    assert not where({"LORA_DIFFUSION_TRAINING": "off"}).training_allowed
    with pytest.raises(ConfigError, match="LORA_DIFFUSION_TRAINING"):
        where({"LORA_DIFFUSION_TRAINING": "perhaps"})


def test_a_page_that_others_reach_has_a_strangers_limits() -> None:
    place = where({}, shared=True)
    assert place.public and place.training_allowed and place.limits == PUBLIC


def test_no_public_limit_is_beyond_a_private_one() -> None:
    for field in fields(Limits):
        if type(field.default) is int:
            assert getattr(PUBLIC, field.name) <= getattr(Limits(), field.name), field.name


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "5"])
def test_a_limit_is_a_number_of_one_or_more(value: object) -> None:
    with pytest.raises(ConfigError, match="steps"):
        Limits(steps=value)  # type: ignore[arg-type]
