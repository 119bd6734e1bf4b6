"""Files of one word: read in every form, written for diffusers and web UIs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_diffusion as ld
from lora_diffusion.files.embedding import write_embeddings

VECTORS = torch.arange(64.0).view(2, 32)


@pytest.mark.parametrize("tensors", [{"<dog>": VECTORS}, {"emb_params": VECTORS}, {"clip_l": VECTORS}])
def test_every_form_loads(tiny_pipeline: Any, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "<dog>.safetensors"
    save_file(tensors, path)
    report = ld.load_adapter(tiny_pipeline, path)
    assert report.dialect == "textual inversion" and report.tokens == ["<dog>"]
    ids = tiny_pipeline.tokenizer(["<dog> <dog>_1"]).input_ids[0][1:-1]
    assert torch.equal(tiny_pipeline.text_encoder.get_input_embeddings()(torch.tensor(ids)), VECTORS)


def test_sdxl_has_two(tmp_path: Path) -> None:
    save_file({"clip_l": VECTORS, "clip_g": VECTORS.repeat(1, 2)}, tmp_path / "cat.safetensors")
    tokens = ld.read_adapter(tmp_path / "cat.safetensors").tokens
    assert {c: tuple(v.shape) for c, v in tokens["cat"].items()} == {"text_encoder": (2, 32), "text_encoder_2": (2, 64)}


def test_one_vector_without_its_dimension(tmp_path: Path) -> None:
    save_file({"<dog>": VECTORS[0].clone()}, tmp_path / "x.safetensors")
    assert ld.read_adapter(tmp_path / "x.safetensors").tokens["<dog>"]["text_encoder"].shape == (1, 32)


def test_what_we_write_diffusers_loads(tiny_pipeline: Any, tmp_path: Path) -> None:
    adapter = ld.Adapter({}, tokens={"<dog>": {"text_encoder": VECTORS}, "my/cat": {"text_encoder": VECTORS[:1]}})
    paths = write_embeddings(adapter, tmp_path)
    assert [path.name for path in paths] == ["<dog>.safetensors", "my_cat.safetensors"]
    for path in paths:
        tiny_pipeline.load_textual_inversion(str(path))
    rows = tiny_pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(rows[tiny_pipeline.tokenizer.convert_tokens_to_ids("<dog>_1")], VECTORS[1])
    assert list(load_file(paths[1])) == ["my/cat"]


def test_nothing_else_is_taken_for_one(tmp_path: Path) -> None:
    save_file({"model.weight": VECTORS}, tmp_path / "x.safetensors")
    with pytest.raises(ld.AdapterFormatError, match="known dialect"):
        ld.read_adapter(tmp_path / "x.safetensors")
    save_file({"<dog>": torch.ones(2000, 2)}, tmp_path / "y.safetensors")
    with pytest.raises(ld.AdapterFormatError, match="1024"):
        ld.read_adapter(tmp_path / "y.safetensors")
