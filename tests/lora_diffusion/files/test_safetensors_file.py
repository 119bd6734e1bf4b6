"""The container: hostile files get one clear line, sound ones come back bit for bit."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import lora_diffusion as ld
from lora_diffusion.files.safetensors_file import MAX_HEADER_BYTES, TensorFile, write_tensor_file

NAME = "model.attn.to_q.lora_A.weight"


def pack(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "empty": b"",
    "short": b"\x01\x02",
    "random": bytes(range(256)) * 4,
    "a picture": b"\x89PNG\r\n\x1a\n" + b"\0" * 500,
    "a pickle": pickle.dumps({"a": list(range(1000))}),
    "a zip": b"PK\x03\x04" + b"\0" * 500,
    "header beyond the file": (10**9).to_bytes(8, "little") + b"{}" * 50,
    "header not JSON": pack(b"{not json}"),
    "header not UTF-8": pack(b'{"\xff\xfe": 1}'),
    "header a list": pack([]),
    "header nested": pack(b"[" * 200_000),
    "huge number": pack(b'{"a": ' + b"9" * 6000 + b"}"),
    "duplicate names": pack(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 4),
    "entry not a table": pack({NAME: 3}),
    "entry with more": pack({NAME: {**entry(), "x": 1}}, b"\0" * 4),
    "ints": pack({NAME: entry("I64", (1,), (0, 8))}, b"\0" * 8),
    "unknown dtype": pack({NAME: entry("F4096")}, b"\0" * 4),
    "dtype a list": pack({NAME: {**entry(), "dtype": ["F32"]}}, b"\0" * 4),
    "negative shape": pack({NAME: entry(shape=(-1,))}, b"\0" * 4),
    "fractional shape": pack({NAME: entry(shape=(1.0,))}, b"\0" * 4),
    "true as shape": pack({NAME: entry(shape=(True,))}, b"\0" * 4),
    "immense shape": pack({NAME: entry(shape=(2**60, 2**60))}, b"\0" * 4),
    "many dimensions": pack({NAME: entry(shape=(1,) * 40)}, b"\0" * 4),
    "shape beside its bytes": pack({NAME: entry(shape=(1000,))}, b"\0" * 4),
    "offsets backwards": pack({NAME: entry(offsets=(4, 0))}, b"\0" * 4),
    "three offsets": pack({NAME: entry(offsets=(0, 4, 8))}, b"\0" * 4),
    "truncated data": pack({NAME: entry()}, b"\0" * 3),
    "data too long": pack({NAME: entry()}, b"\0" * 5),
    "overlap": pack({"a": entry(), "b": entry()}, b"\0" * 4),
    "gap": pack({"a": entry(), "b": entry(offsets=(8, 12))}, b"\0" * 12),
    "metadata a list": pack({"__metadata__": [], NAME: entry()}, b"\0" * 4),
    "metadata not strings": pack({"__metadata__": {"a": 1}, NAME: entry()}, b"\0" * 4),
    "escape in a name": pack({"a\x1b[31m": entry()}, b"\0" * 4),
    "newline in a name": pack({"a\nb": entry()}, b"\0" * 4),
    "direction override in a name": pack({"a\u202eb": entry()}, b"\0" * 4),
    "endless name": pack({"a" * 5000: entry()}, b"\0" * 4),
    "no tensors": pack({}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_get_one_clear_line(kind: str, tmp_path: Path, toy: nn.Module, bits: Callable[..., Any]) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(HOSTILE[kind])
    before = bits(toy)
    with pytest.raises(ld.AdapterFormatError) as caught:
        ld.load_adapter(toy, path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < len(str(path)) + 250
    assert bits(toy) == before


def test_a_header_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(ld.AdapterFormatError, match="limit"):
        TensorFile(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity(tmp_path: Path, value: float) -> None:
    path = tmp_path / "nan.safetensors"
    save_file({NAME: torch.full((2, 3), value), NAME.replace("_A", "_B"): torch.zeros(3, 2)}, path)
    with pytest.raises(ld.AdapterFormatError, match="NaN or infinity"):
        ld.read_adapter(path)
    with pytest.raises(ld.AdapterFormatError, match="not written"):
        write_tensor_file(tmp_path / "out.safetensors", {"a": torch.tensor(value)}, {})
    assert not (tmp_path / "out.safetensors").exists()


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(ld.AdapterFormatError, match="does not exist"):
        ld.read_adapter(tmp_path / "none.safetensors")
    with pytest.raises(ld.AdapterFormatError, match=r"has no \.safetensors"):
        ld.read_adapter(tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".PKL"])
def test_pickles_are_not_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"lora{suffix}"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ld.AdapterFormatError, match=r"ask for a \.safetensors file"):
        ld.read_adapter(path)


def test_what_is_written_others_read(tmp_path: Path) -> None:
    """Every float dtype, empty metadata values and non-contiguous tensors, bit for bit through safetensors itself."""
    g = torch.Generator().manual_seed(0)
    values = {
        str(dtype): torch.randn(3, 4, generator=g).to(dtype).t()
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    path = tmp_path / "deep" / "er" / "x.safetensors"
    write_tensor_file(path, values, {"é": "ü\n", "empty": ""})
    theirs = load_file(path)
    assert all(torch.equal(theirs[key], value) for key, value in values.items())
    file = TensorFile(path)
    assert file.metadata == {"empty": "", "é": "ü\n"}
    assert all(torch.equal(file.read([key])[key], value) for key, value in values.items())
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from lora_diffusion.files.safetensors_file import *;"
        "write_tensor_file(Path(sys.argv[1]), {'b': torch.ones(2), 'a': torch.zeros(3)}, {k: k for k in 'qwertyuiop'})"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / f"{seed}.safetensors"],
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(ld.__file__).parents[1]), "PATH": ""},
        )
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_never_raise_anything_else(data: st.DataObject, tmp_path: Path) -> None:
    """Bytes changed, inserted or cut anywhere: a sound adapter or AdapterFormatError."""
    path = tmp_path / "m.safetensors"
    tensors = {NAME: torch.ones(2, 8), NAME.replace("_A", "_B"): torch.ones(6, 2)}
    write_tensor_file(path, tensors, {"format": "pt", "lora_adapter_metadata": '{"model.lora_alpha": 4, "model.r": 2}'})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if kind == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "cut" and at > 0:
            del raw[at:]
        else:
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    path.write_bytes(raw)
    try:
        ld.read_adapter(path)
    except ld.AdapterFormatError as error:
        assert str(path) in str(error)
