"""The one source of settings: checks, JSON, differences."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from lora_diffusion import ConfigError
from train.config import check, differences, from_dict, setting, settings_of, to_dict
from train.dreambooth_checks import validate
from train.dreambooth_config import DreamBoothConfig
from train.prompts import check_subject_word


@dataclass(frozen=True)
class Small:
    name: str = setting(help="what it is called")
    size: int = setting(3, minimum=1, maximum=9)
    rate: float = setting(0.5, above=0)
    kind: str | None = setting(None, choices=("a", "b"))
    many: tuple[str, ...] = setting((), decides=False)


def test_fields_are_read_back_with_their_types() -> None:
    items = {item.name: item for item in settings_of(Small)}
    assert items["name"].required and items["name"].kind is str
    assert items["kind"].optional and items["kind"].choices == ("a", "b")
    assert items["many"].repeated and not items["many"].decides


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"name": "x", "size": 0}, "at least 1"),
        ({"name": "x", "size": 10}, "at most 9"),
        ({"name": "x", "size": 1.5}, "whole number"),
        ({"name": "x", "size": True}, "whole number"),
        ({"name": "x", "rate": 0}, "above 0"),
        ({"name": "x", "rate": float("nan")}, "not a number"),
        ({"name": "x", "kind": "c"}, "a, b"),
        ({"name": None}, "--name"),
        ({}, "--name"),
        ({"name": "x", "sise": 3}, "did you mean size"),
    ],
)
def test_values_out_of_range_are_named(values: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        from_dict(Small, values)


def test_json_there_and_back() -> None:
    config = Small("x", many=("a", "b"))
    assert from_dict(Small, json.loads(json.dumps(to_dict(config)))) == config
    check(config)


def test_differences_are_those_that_decide() -> None:
    assert differences(to_dict(Small("x", many=("a",))), to_dict(Small("x", size=4)), Small) == ["size"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"with_prior_preservation": True}, "class_prompt"),
        ({"train_text_encoder": True, "pre_compute_text_embeddings": True}, "exclude each other"),
        ({"lr_warmup_steps": 11, "max_train_steps": 10}, "never be reached"),
        ({"overwrite": True, "resume_from_checkpoint": "latest"}, "one of them"),
        ({"rank": 0}, "at least 1"),
        ({"learning_rate": -1.0}, "above 0"),
        ({"instance_prompt": " "}, "empty"),
        ({"lr_scheduler": "steep"}, "cosine"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict, word: str) -> None:
    values = {"pretrained_model_name_or_path": "m", "instance_data_dir": "d", "instance_prompt": "a photo of sks dog"}
    with pytest.raises(ConfigError, match=word):
        validate(DreamBoothConfig(**{**values, **changes}))


@pytest.mark.parametrize(
    ("instance", "of_class", "token"),
    [
        ("a photo of a dog", None, None),
        ("a photo of a dog", "a photo of a dog", None),
        ("a dog", "a photo of a dog", None),
        ("a photo of a small red dog", "a photo of a dog", None),
        ("a photo of zwx dog", None, "sks"),
    ],
)
def test_a_prompt_without_the_subject_word(instance: str, of_class: str | None, token: str | None) -> None:
    with pytest.raises(ConfigError, match=r"subject|sks"):
        check_subject_word(instance, of_class, token)


@pytest.mark.parametrize(
    ("instance", "of_class", "token"),
    [
        ("a photo of sks dog", None, None),
        ("a photo of sks dog", "a photo of a dog", None),
        ("a photo of <new1>", None, None),
        ("a photo of a red dog", None, "red"),
    ],
)
def test_a_prompt_with_a_subject_word(instance: str, of_class: str | None, token: str | None) -> None:
    check_subject_word(instance, of_class, token)
