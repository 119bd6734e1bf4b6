"""What an adapter says of itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import lora_diffusion as ld
from lora_diffusion.adapter import Prompt
from lora_diffusion.describe import base_of, describe, trigger_words
from lora_diffusion.structured import LoHa


def layer(rank: int = 2, scale: float = 1.0, **more: Any) -> ld.LowRank:
    return ld.LowRank(torch.ones(rank, 8), torch.ones(6, rank), scale, **more)


def test_everything_is_counted_and_is_json() -> None:
    loha = LoHa(*(torch.ones(shape) for shape in ((6, 3), (3, 8), (6, 3), (3, 8))), scale=0.5)
    idle = ld.LowRank(torch.ones(2, 8).half(), torch.zeros(6, 2).half())
    adapter = ld.Adapter(
        {"unet": {"a": layer(), "b": layer(4, 0.25, magnitude=torch.ones(6)), "c": idle}},
        structured={"unet": {"d": loha}, "text_encoder": {"e": loha}},
        tokens={"<s1>": {"text_encoder": torch.zeros(2, 5)}},
        prompts={"model": Prompt("P_TUNING", torch.zeros(3, 7))},
        copies={"model": {"score": {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}}},
        notes=["a note"],
    )
    facts = describe(adapter)
    assert json.loads(json.dumps(facts)) == facts
    unet = facts["components"]["unet"]
    assert (unet["layers"], unet["ranks"], unet["alphas"], unet["scales"]) == (
        4,
        [2, 3, 4],
        [1.0, 1.5, 2.0],
        [0.25, 0.5, 1.0],
    )
    assert unet["kinds"] == {"LoRA": 2, "LoRA with DoRA": 1, "LoHa": 1}
    assert unet["dtypes"] == ["float16", "float32"] and unet["paths"] == ["a", "b", "c", "d"]
    assert unet["parameters"] == 28 + 56 + 6 + 28 + 84
    assert facts["components"]["text_encoder"]["layers"] == 1
    assert facts["layers"] == 5 and facts["parameters"] == unet["parameters"] + 84 + 10 + 21 + 6
    assert facts["tokens"] == {"<s1>": {"text_encoder": [2, 5]}}
    assert facts["prompts"] == {"model": {"kind": "P_TUNING", "shape": [3, 7]}}
    assert facts["copies"] == {"model": {"score": ["bias", "weight"]}}
    assert facts["without_effect"] == ["unet.c"] and facts["notes"] == ["a note"]


@pytest.mark.parametrize(
    ("metadata", "foreign", "base"),
    [
        ({"base_model": "pocket"}, {"ss_sd_model_name": "x"}, "pocket"),
        ({"base_model": ""}, {"ss_sd_model_name": "v1-5.safetensors"}, "v1-5.safetensors"),
        (
            {},
            {"ss_sd_model_name": "None", "modelspec.architecture": "stable-diffusion-v1/lora"},
            "stable-diffusion-v1/lora",
        ),
        ({}, {"ss_base_model_version": "sd_v1"}, "sd_v1"),
        ({"base_model": 3}, {}, None),
    ],
)
def test_base(metadata: dict[str, Any], foreign: dict[str, str], base: str | None) -> None:
    assert base_of(ld.Adapter({}, metadata=metadata, foreign=foreign)) == base


def test_words_that_are_given_come_before_tags() -> None:
    foreign = {"modelspec.trigger_phrase": "sks", "ss_tag_frequency": json.dumps({"10_dog": {"grass": 3}})}
    given = ld.Adapter({}, metadata={"trigger_words": ["sks", "zwx", 3]}, foreign=foreign)
    given.tokens = {"<s1>": {}}
    assert trigger_words(given) == ["sks", "zwx", "<s1>"]
    assert trigger_words(ld.Adapter({}, metadata={"trigger_words": "one"})) == ["one"]
    assert trigger_words(ld.Adapter({}, metadata={"instance_prompt": "a sks dog"})) == ["a sks dog"]


def test_the_commonest_tags() -> None:
    table = {"1_a": {"sks dog": 9, "grass": 2, "": 50}, "2_b": {" grass ": 8, "sky": 1, "x": "7"}, "3_c": [1]}
    assert trigger_words(ld.Adapter({}, foreign={"ss_tag_frequency": json.dumps(table)})) == ["grass", "sks dog", "sky"]


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000, '{"a": 1}'])
def test_a_broken_table_of_tags_is_none(text: str) -> None:
    assert trigger_words(ld.Adapter({}, foreign={"ss_tag_frequency": text})) == []
