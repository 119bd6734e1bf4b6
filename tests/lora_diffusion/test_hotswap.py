"""Another adapter into the same room; the compiled side is in layers/test_compiled.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_diffusion as ld

Run = Callable[..., Any]


def saved(pipeline: Any, path: Path, r: int, components: list[str], randomise: Run, targets: Any = "attention") -> Path:
    ld.add_adapter(pipeline, ld.LoraConfig(r=r, lora_alpha=3, target_modules=targets), components=components, name="x")
    randomise(pipeline, "x", seed=r)
    ld.save_adapter(pipeline, path, "x")
    ld.delete_adapter(pipeline, "x")
    return path


def test_any_adapter_into_one_room(
    tiny_pipeline: Any, tmp_path: Path, unet_output: Run, text_output: Run, randomise: Run
) -> None:
    """UNet alone, both, the text encoder alone: each time as if freshly loaded, and nothing of the last one left."""
    files = [
        saved(tiny_pipeline, tmp_path / "u.safetensors", 2, ["unet"], randomise),
        saved(tiny_pipeline, tmp_path / "b.safetensors", 4, ["unet", "text_encoder"], randomise, ["to_q", "q_proj"]),
        saved(tiny_pipeline, tmp_path / "t.safetensors", 1, ["text_encoder"], randomise),
    ]
    wanted = []
    for file in files:
        ld.load_adapter(tiny_pipeline, file, "fresh")
        wanted.append((unet_output(tiny_pipeline.unet), text_output(tiny_pipeline.text_encoder)))
        ld.delete_adapter(tiny_pipeline, "fresh")
    base = unet_output(tiny_pipeline.unet), text_output(tiny_pipeline.text_encoder)
    rooms = ld.reserve_adapter(tiny_pipeline, 4, "room")
    assert set(rooms) == {"unet", "text_encoder"}
    torch.testing.assert_close((unet_output(tiny_pipeline.unet), text_output(tiny_pipeline.text_encoder)), base)
    for file, outputs in zip(files, wanted):
        report = ld.load_adapter(tiny_pipeline, file, "room", hotswap=True)
        assert report.complete and report.name == "room"
        got = unet_output(tiny_pipeline.unet), text_output(tiny_pipeline.text_encoder)
        torch.testing.assert_close(got, outputs, rtol=1e-4, atol=1e-5)
    assert ld.list_adapters(tiny_pipeline) == {"room": ["unet", "text_encoder"]}


def test_no_room_is_said_and_changes_nothing(tiny_pipeline: Any, tmp_path: Path, bits: Run, randomise: Run) -> None:
    big = saved(tiny_pipeline, tmp_path / "big.safetensors", 5, ["unet"], randomise)
    text = saved(tiny_pipeline, tmp_path / "text.safetensors", 2, ["text_encoder"], randomise)
    ld.reserve_adapter(tiny_pipeline, 4, "room", components=["unet"])
    before = bits(tiny_pipeline.unet)
    with pytest.raises(ld.AdapterMismatchError, match=r"room for rank 4 .*rank 5: reserve more, or resize"):
        ld.load_adapter(tiny_pipeline, big, "room", hotswap=True)
    with pytest.raises(ld.AdapterMismatchError, match="no room at text_encoder"):
        ld.load_adapter(tiny_pipeline, text, "room", hotswap=True)
    with pytest.raises(ld.ConfigError, match="no adapter 'other'"):
        ld.load_adapter(tiny_pipeline, big, "other", hotswap=True)
    assert bits(tiny_pipeline.unet) == before
