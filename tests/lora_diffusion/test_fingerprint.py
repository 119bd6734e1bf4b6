"""Telling base models apart by a few hundred bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_diffusion as ld
from lora_diffusion.fingerprint import OTHER, SAME, TUNED, UNKNOWN, compare, fingerprint


@pytest.fixture
def made(tiny_pipeline: Any) -> dict[str, Any]:
    """The tiny UNet's, through JSON and back."""
    return json.loads(json.dumps(fingerprint("unet", tiny_pipeline.unet)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_in_any_precision(tiny_pipeline: Any, made: dict[str, Any], dtype: torch.dtype) -> None:
    assert compare(made, "unet", tiny_pipeline.unet.to(dtype)) == SAME
    assert len(json.dumps(made)) < 2000


def test_a_tuned_model_is_another(tiny_pipeline: Any, made: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tiny_pipeline.unet.parameters():
            parameter.add_(parameter.std().nan_to_num(0.0) * 0.1 * torch.randn(parameter.shape, generator=g))
    assert compare(made, "unet", tiny_pipeline.unet) == TUNED


def test_another_architecture(tiny_pipeline: Any, made: dict[str, Any], toy: nn.Module) -> None:
    assert compare(made, "unet", toy) == OTHER
    assert compare(made, "text_encoder", tiny_pipeline.text_encoder) == OTHER


@pytest.mark.parametrize("broken", [None, 3, {}, {"values": {}}, {"values": 7}, "x"])
def test_what_is_no_fingerprint(tiny_pipeline: Any, broken: Any) -> None:
    assert compare(broken, "unet", tiny_pipeline.unet) == UNKNOWN


@pytest.mark.parametrize("value", [["a"] * 6, [1.0], 5, [float("nan")] * 6, [10**400] * 6])
def test_a_hostile_one(tiny_pipeline: Any, made: dict[str, Any], value: Any) -> None:
    made["values"][next(iter(made["values"]))] = value
    assert compare(made, "unet", tiny_pipeline.unet) == OTHER


def test_adapters_and_merges_do_not_count(
    tiny_pipeline: Any, made: dict[str, Any], randomise: Callable[..., None]
) -> None:
    ld.add_adapter(tiny_pipeline, ld.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["conv_out"]))
    assert compare(made, "unet", tiny_pipeline.unet) == SAME
    assert fingerprint("unet", tiny_pipeline.unet) == made
    ld.unload(tiny_pipeline)
    ld.add_adapter(tiny_pipeline, ld.LoraConfig(r=2, target_modules="all-linear"))
    randomise(tiny_pipeline, std=1.0)
    ld.merge_adapters(tiny_pipeline)
    assert fingerprint("unet", tiny_pipeline.unet) == made


def test_the_report_says_so(tiny_pipeline: Any, randomise: Callable[..., None], tmp_path: Path) -> None:
    ld.add_adapter(tiny_pipeline, ld.LoraConfig(r=2), components=("unet", "text_encoder"))
    randomise(tiny_pipeline)
    path = tmp_path / "dog.safetensors"
    ld.save_adapter(tiny_pipeline, path, metadata={"base_model": "tiny"})
    ld.unload(tiny_pipeline)
    other = copy.deepcopy(tiny_pipeline.unet)
    report = ld.load_adapter(tiny_pipeline, path, "here")
    assert report.base == {"unet": SAME, "text_encoder": SAME}
    assert "made for tiny, which is the base in hand" in str(report)
    nn.init.normal_(other.conv_in.weight)
    for parameter in other.parameters():
        parameter.data.neg_()
    report = ld.load_adapter(other, path, strict=False)
    assert report.base == {"unet": TUNED}
    assert "made for tiny; here the unet has other weights" in str(report)
    again = tmp_path / "again.safetensors"
    ld.save_adapter(other, again, report.name)
    assert ld.read_adapter(again).bases["unet"] == ld.read_adapter(path).bases["unet"], "it was made for the first one"
