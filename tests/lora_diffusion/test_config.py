"""LoraConfig: what it accepts, what it refuses and in which words."""

from __future__ import annotations

import math

import pytest

import lora_diffusion as ld


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -4),
        ("r", 2.5),
        ("r", True),
        ("r", 10**9),
        ("lora_alpha", 0),
        ("lora_alpha", math.nan),
        ("lora_alpha", "8"),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("target_modules", []),
        ("target_modules", ""),
        ("target_modules", "(to_q"),
        ("target_modules", ["to_q", 3]),
        ("exclude_modules", []),
        ("rank_pattern", {"to_q": 0}),
        ("rank_pattern", ["to_q"]),
        ("rank_pattern", {"(": 4}),
        ("alpha_pattern", {"to_q": math.inf}),
        ("init_lora_weights", "pizza"),
        ("use_rslora", 1),
        ("use_dora", "yes"),
        ("modules_to_save", []),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", []),
        ("layers_pattern", "h"),
        ("bias", "all"),
        ("task_type", 3),
    ],
)
def test_refuses_with_the_field_and_its_value(field: str, value: object) -> None:
    with pytest.raises(ld.ConfigError) as caught:
        ld.LoraConfig(**{field: value})
    assert field in str(caught.value)
    assert caught.value.exit_code == 2


def test_scales() -> None:
    """alpha / r; with rsLoRA alpha / √r; patterns by module, suffix or regex, the first that fits."""
    config = ld.LoraConfig(r=4, lora_alpha=8, rank_pattern={"mid.*to_q": 16, "to_q": 2}, alpha_pattern={"to_k": 1})
    assert config.scale_for("down.to_v") == 2.0
    assert config.scale_for("down.to_k") == 0.25
    assert (config.rank_for("down.to_q"), config.rank_for("mid_block.attn.to_q")) == (2, 16)
    assert config.rank_for("down.into_q") == 4
    assert ld.LoraConfig(r=4, lora_alpha=8, use_rslora=True).scale_for("x") == 4.0


def test_dict_round_trip() -> None:
    config = ld.LoraConfig(r=3, target_modules=("a", "b"), rank_pattern={"a": 2}, exclude_modules="b")
    again = ld.LoraConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_from_dict_names_unknown_fields() -> None:
    with pytest.raises(ld.ConfigError, match="kasa_config"):
        ld.LoraConfig.from_dict({"r": 4, "kasa_config": None})
