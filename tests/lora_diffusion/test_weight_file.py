"""Weights of any dtype, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_diffusion import ModelNotFoundError
from lora_diffusion.weight_file import WeightFile


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    floats = {f"f{n}": torch.randn(3, n + 1, generator=g).to(dtype) for n, dtype in
              enumerate((torch.float32, torch.float16, torch.bfloat16, torch.float64))}  # fmt: skip
    return {**floats, "ids": torch.arange(5), "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.0)}


def test_reads_what_was_saved(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "w.safetensors")
    file = WeightFile(tmp_path / "w.safetensors")
    assert file.tensors.keys() == tensors.keys() and not file.tensors["ids"].is_float
    for name in tensors.keys() - {"ids"}:
        assert torch.equal(file.read(name), tensors[name]) and file.read(name).dtype == tensors[name].dtype


def test_rewrites_one_and_keeps_every_other_byte(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source, target = tmp_path / "w.safetensors", tmp_path / "v.safetensors"
    save_file(tensors, source, metadata={"format": "pt", "note": "kept"})
    file = WeightFile(source)
    file.rewrite(target, [], lambda name, tensor: tensor)
    assert target.read_bytes() == source.read_bytes()
    file.rewrite(target, ["f1", "f2"], lambda name, tensor: tensor.t().contiguous().t() + 1)
    got = load_file(target)
    assert torch.equal(got["f1"], tensors["f1"] + 1) and torch.equal(got["f2"], tensors["f2"] + 1)
    assert all(torch.equal(got[name], tensors[name]) for name in tensors.keys() - {"f1", "f2"})
    assert WeightFile(target).tensors == file.tensors


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"{ ", 0, "not JSON"),
        (b"[1]", 0, "not a table"),
        (b"\xff\xfe", 0, "not JSON"),
        (b"[" * 100_000, 0, "not JSON"),
        ({"a": entry()}, 7, "cut off or too long"),
        ({"a": entry()}, 9, "cut off or too long"),
        ({"a": entry(shape=[3])}, 8, "does not have the bytes"),
        ({"a": entry(shape=[-2])}, 8, "broken entry"),
        ({"a": entry(shape=[2**60])}, 8, "broken entry"),
        ({"a": entry(offsets=[8, 0])}, 8, "does not have the bytes"),
        ({"a": entry(offsets=[8, 16])}, 16, "leave gaps"),
        ({"a": entry(), "b": entry()}, 8, "overlap"),
        ({"a": [1]}, 8, "broken entry"),
        ({"\x1b[31m": entry()}, 8, "broken entry"),
    ],
)
def test_a_damaged_file_is_one_line(header: Any, data: int, words: str, tmp_path: Path) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data))
    with pytest.raises(ModelNotFoundError, match=words) as caught:
        WeightFile(tmp_path / "w.safetensors")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("raw", [b"", b"abc", b"\xff" * 16, (2**40).to_bytes(8, "little") + b"{}"])
def test_no_safetensors_file(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(raw)
    with pytest.raises(ModelNotFoundError, match="is no safetensors file, or is cut off"):
        WeightFile(tmp_path / "w.safetensors")
