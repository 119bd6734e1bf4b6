"""The diffusers dialect: spellings, scales, and what is refused rather than dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lora_diffusion as ld

PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "encoder.layers.0.self_attn.q_proj"
SPELLINGS = [
    ("lora_A.weight", "lora_B.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
]


def write(path: Path, keys: dict[str, tuple[int, ...]], described: Any = None, **metadata: str) -> Path:
    g = torch.Generator().manual_seed(0)
    if described is not None:
        text = described if isinstance(described, str) else json.dumps(described)
        metadata["lora_adapter_metadata"] = text
    tensors = {key: torch.randn(shape, generator=g) for key, shape in keys.items()}
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path


def pair(where: str, rank: int = 2, spelling: tuple[str, str] = SPELLINGS[0]) -> dict[str, tuple[int, ...]]:
    return {f"{where}.{spelling[0]}": (rank, 8), f"{where}.{spelling[1]}": (6, rank)}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_spellings_and_both_clip_layouts(tmp_path: Path, spelling: tuple[str, str], prefix: str) -> None:
    """All read to the same names; without metadata every scale is 1."""
    keys = {**pair(f"unet.{PATH}", 3, spelling), **pair(f"text_encoder.{prefix}{TEXT}", 2, spelling)}
    adapter = ld.read_adapter(write(tmp_path / "a.safetensors", keys, ss_tag="x"))
    assert {c: list(layers) for c, layers in adapter.components.items()} == {
        "unet": [PATH],
        "text_encoder": [f"text_model.{TEXT}"],
    }
    assert [layer.scale for layers in adapter.components.values() for layer in layers.values()] == [1.0, 1.0]
    assert adapter.configs["unet"].r == 3
    assert adapter.foreign == {"ss_tag": "x"}


@pytest.mark.parametrize(
    ("described", "scale"),
    [
        ({"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 1}}, 0.25),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {f"^{PATH}$": 1}}, 0.25),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_k": 1, "o_q": 3}}, 2.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_scales_from_metadata(tmp_path: Path, described: dict[str, Any], scale: float) -> None:
    adapter = ld.read_adapter(write(tmp_path / "a.safetensors", pair(f"unet.{PATH}", 4), described))
    assert adapter.components["unet"][PATH].scale == scale


@pytest.mark.parametrize(
    ("keys", "described", "words"),
    [
        ({f"unet.{PATH}.lora_A.weight": (2, 8)}, None, "without its other half"),
        ({**pair(f"unet.{PATH}"), f"unet.{PATH}.lora.up.weight": (6, 2)}, None, "twice"),
        ({f"unet.{PATH}.lora_A.weight": (2, 8), f"unet.{PATH}.lora_B.weight": (6, 3)}, None, "do not fit each other"),
        ({f"unet.{PATH}.lora_A.weight": (2,), f"unet.{PATH}.lora_B.weight": (6,)}, None, "do not fit each other"),
        ({f"unet.{PATH}.lora_A.weight": (0, 8), f"unet.{PATH}.lora_B.weight": (6, 0)}, None, "do not fit each other"),
        (pair(f"unet.{PATH}", 9000), None, "rank 9,000"),
        ({**pair(f"unet.{PATH}"), f"unet.{PATH}.lora_magnitude_vector": (5,)}, None, "for 6 outputs"),
        ({**pair(f"unet.{PATH}"), "unet.x.lora_magnitude_vector": (6,)}, None, "without the factors"),
        ({**pair(f"unet.{PATH}"), f"unet.{PATH}.lora_B.bias": (6,)}, None, "a LoRA bias"),
        ({**pair(f"unet.{PATH}"), f"unet.{PATH}.alpha": (1,)}, None, "not understood"),
        (pair("lora_unet_mid_block_to_q"), None, "known dialect"),
        (pair(f"unet.{PATH}"), "{", "not JSON"),
        (pair(f"unet.{PATH}"), "[" * 100_000, "not JSON"),
        (pair(f"unet.{PATH}"), [1], "not a table"),
        (pair(f"unet.{PATH}"), {"unet.lora_alpha": "8"}, "not understood"),
        (pair(f"unet.{PATH}"), '{"unet.lora_alpha": NaN}', "not understood"),
        (pair(f"unet.{PATH}"), {"unet.lora_alpha": 10**400}, "not understood"),
        (pair(f"unet.{PATH}"), {"unet.alpha_pattern": [1]}, "no table"),
        (pair(f"unet.{PATH}"), {"unet.alpha_pattern": {"(a+)+$": 1}}, "more than a name"),
        (pair(f"unet.{PATH}"), {"unet.use_dora": True}, "DoRA"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, keys: dict[str, tuple[int, ...]], described: Any, words: str) -> None:
    with pytest.raises(ld.AdapterFormatError, match=words) as caught:
        ld.read_adapter(write(tmp_path / "a.safetensors", keys, described))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "own",
    [
        "{",
        "[]",
        '{"version": 1, "config": {"unet": {"r": -1}}}',
        '{"version": 1, "config": {"unet": 3}}',
        '{"version": 1, "config": {"unet": {"\\u001b[31m": 1}}}',
        '{"version": 9}',
    ],
)
def test_a_broken_description_of_ours_is_a_note(tmp_path: Path, own: str) -> None:
    """It only describes, so the adapter loads, and the report says so."""
    adapter = ld.read_adapter(write(tmp_path / "a.safetensors", pair(f"unet.{PATH}"), lora_diffusion=own))
    assert adapter.configs["unet"].r == 2
    assert len(adapter.notes) == 1
    assert adapter.notes[0].isprintable()


def test_scales_are_folded(tmp_path: Path) -> None:
    """Written and read again, the delta is the same and the scale is 1, rsLoRA's irrational one included."""
    g = torch.Generator().manual_seed(0)
    layer = ld.LowRank(torch.randn(3, 8, generator=g), torch.randn(6, 3, generator=g), 5 / 3**0.5)
    ld.write_adapter(ld.Adapter({"unet": {PATH: layer}}), tmp_path / "a.safetensors")
    again = ld.read_adapter(tmp_path / "a.safetensors").components["unet"][PATH]
    assert again.scale == 1.0
    torch.testing.assert_close(again.delta(), layer.delta(), rtol=1e-6, atol=1e-6)


def test_convolutions_are_kept(tmp_path: Path) -> None:
    """The file can be read; what a model does with it is the model's side."""
    keys = {"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (6, 2, 1, 1)}
    adapter = ld.read_adapter(write(tmp_path / "a.safetensors", keys))
    assert adapter.components["unet"]["conv_in"].delta().shape == (6, 4, 3, 3)


def test_writing_refuses(tmp_path: Path) -> None:
    layer = ld.LowRank(torch.zeros(2, 8), torch.zeros(6, 2))
    adapter = ld.Adapter({"unet": {PATH: layer}})
    with pytest.raises(ld.ConfigError, match="this version writes"):
        ld.write_adapter(adapter, tmp_path / "a.safetensors", format="gguf")
    with pytest.raises(ld.ConfigError, match=r"ends in \.safetensors"):
        ld.write_adapter(adapter, tmp_path / "a.bin")
    with pytest.raises(ld.ConfigError, match="metadata"):
        ld.write_adapter(adapter, tmp_path / "a.safetensors", metadata={"x": object()})
    with pytest.raises(ld.AdapterFormatError, match="no layers"):
        ld.write_adapter(ld.Adapter({}), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
