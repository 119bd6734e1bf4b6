"""Adapters that strangers trained, in models of the real size: all layers, and the outputs that diffusers gets.

The weights are random, so outputs mean nothing; that both sides compute the same does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import lora_diffusion as ld

FILES = Path(__file__).parents[3].parent / "shared" / "data" / "adapters"
DOWN_UP = FILES / "diffusers_lora_down_up.safetensors"
PROCESSORS = FILES / "diffusers_attn_processor_unprefixed.safetensors"

pytestmark = pytest.mark.skipif(not FILES.is_dir(), reason="the real adapters are not beside this repository")


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's, 860 million parameters in fp32, quickly filled."""
    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2**20, generator=g)
    for parameter in model.parameters():
        spread = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
        rest = parameter.view(-1)
        for start in range(0, rest.numel(), len(noise)):
            piece = rest[start : start + len(noise)]
            piece.copy_(noise[: len(piece)] * spread)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
    return model


def output(unet: UNet2DConditionModel) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 7, 768, generator=g)
    with torch.no_grad():
        return unet(latents, torch.tensor([500]), text).sample


def peer_output(unet: UNet2DConditionModel, path: Path) -> torch.Tensor:
    """With the file loaded by diffusers, which is taken out again."""
    unet.load_lora_adapter(load_file(path), prefix="unet", adapter_name="theirs")
    try:
        return output(unet)
    finally:
        unet.unload_lora()


@pytest.mark.slow
@pytest.mark.parametrize("path", [DOWN_UP, PROCESSORS], ids=lambda path: path.stem)
def test_outputs_are_those_of_diffusers(unet: UNet2DConditionModel, path: Path, tmp_path: Path) -> None:
    """diffusers finds nothing in the file without `unet.`, so it gets that file as we write it."""
    before = output(unet)
    report = ld.load_adapter(unet, path)
    assert report.matched == 128 and report.complete
    ours = output(unet)
    ld.save_adapter(unet, tmp_path / "again.safetensors", report.name)
    ld.unload(unet)
    assert torch.equal(output(unet), before)
    theirs = peer_output(unet, path if path == DOWN_UP else tmp_path / "again.safetensors")
    assert (ours - before).abs().max() > 1e-3 * before.abs().max(), "the adapter does something"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize(
    "path", [DOWN_UP, PROCESSORS, FILES / "cloneofsimo_analog_rank4.safetensors"], ids=lambda p: p.stem
)
def test_written_in_every_format(path: Path, format: str, tmp_path: Path) -> None:
    """The effective delta of every layer survives, to fp32 rounding, with and without the metadata."""
    adapter = ld.read_adapter(path)
    target = tmp_path / ("folder" if format == "peft" else "file.safetensors")
    ld.write_adapter(adapter, target, format)
    _check(adapter, ld.read_adapter(target))
    if format == "diffusers":
        save_file(load_file(target), tmp_path / "bare.safetensors")
        _check(adapter, ld.read_adapter(tmp_path / "bare.safetensors"))
    if format == "kohya":
        assert ld.read_adapter(target).intact


def _check(adapter: ld.Adapter, again: ld.Adapter) -> None:
    assert {c: set(layers) for c, layers in again.components.items()} == {
        c: set(layers) for c, layers in adapter.components.items()
    }
    for component, layers in adapter.components.items():
        for path, layer in layers.items():
            wanted, got = layer.delta(), again.components[component][path].delta()
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_the_real_peft_folder_says_what_it_is() -> None:
    adapter = ld.read_adapter(FILES / "peft_gpt2")
    config: dict[str, Any] = json.loads((FILES / "peft_gpt2" / "adapter_config.json").read_text())
    assert adapter.layer_count() == 12
    assert {layer.scale for layers in adapter.components.values() for layer in layers.values()} == {
        config["lora_alpha"] / config["r"]
    }
    assert list(adapter.copies["model"]) == ["score"]
