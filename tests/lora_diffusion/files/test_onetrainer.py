"""OneTrainer's bundles: words of the adapter's own beside it in one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_diffusion as ld


@pytest.fixture(params=["diffusers", "kohya"])
def bundle(request: Any, tiny_pipeline: Any, randomise: Callable[..., None], tmp_path: Path) -> Path:
    """A file with an adapter and two words, as OneTrainer names them."""
    ld.add_adapter(tiny_pipeline, ld.LoraConfig(r=2), components=("unet", "text_encoder"))
    randomise(tiny_pipeline)
    path = tmp_path / "plain.safetensors"
    ld.save_adapter(tiny_pipeline, path, format=request.param)
    ld.unload(tiny_pipeline)
    tensors = load_file(path)
    tensors["bundle_emb.my dog.clip_l"] = torch.full((2, 32), 0.25)
    tensors["bundle_emb.<x.y>.clip_l"] = torch.full((1, 32), 0.5)
    save_file(tensors, tmp_path / "bundle.safetensors", {"format": "pt", "ot_branch": "master"})
    return tmp_path / "bundle.safetensors"


def test_the_rest_is_in_its_own_dialect(bundle: Path) -> None:
    plain, adapter = ld.read_adapter(bundle.with_name("plain.safetensors")), ld.read_adapter(bundle)
    assert adapter.dialect == f"onetrainer ({plain.dialect})"
    assert adapter.foreign["ot_branch"] == "master"
    assert set(adapter.tokens) == {"my dog", "<x.y>"}
    assert torch.equal(adapter.tokens["my dog"]["text_encoder"], torch.full((2, 32), 0.25))
    for component, layers in plain.components.items():
        for path, layer in layers.items():
            assert torch.equal(adapter.components[component][path].delta(), layer.delta())


def test_it_loads_in_full(tiny_pipeline: Any, bundle: Path) -> None:
    report = ld.load_adapter(tiny_pipeline, bundle)
    assert report.complete and report.tokens == ["<x.y>", "my dog"]


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("bundle_emb.dog.other", torch.ones(1, 32), "not understood"),
        ("bundle_emb.dog.clip_l", torch.ones(32), r"shape \[32\]"),
        ("bundle_emb.dog.clip_l", torch.ones(5000, 2), "1024"),
    ],
)
def test_refused(
    tiny_pipeline: Any,
    bundle: Path,
    bits: Callable[[nn.Module], dict[str, bytes]],
    name: str,
    tensor: torch.Tensor,
    words: str,
) -> None:
    before = bits(tiny_pipeline.unet)
    save_file({**load_file(bundle), name: tensor}, bundle)
    with pytest.raises(ld.AdapterFormatError, match=words):
        ld.load_adapter(tiny_pipeline, bundle)
    assert bits(tiny_pipeline.unet) == before


def test_output_embeddings_are_said_to_be_left_out(bundle: Path) -> None:
    save_file({**load_file(bundle), "bundle_emb.my dog.clip_l_out": torch.ones(2, 32)}, bundle)
    assert any("clip_l_out" in note and "left out" in note for note in ld.read_adapter(bundle).notes)
