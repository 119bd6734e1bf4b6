"""Model folders without their weights: what belongs where, and which folders are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from lora_diffusion import ModelNotFoundError
from lora_diffusion.pipeline_folder import ModelFolder

UNET = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_pipeline_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline, to be changed."""
    return Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "pipe"))


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 whose head is tied to its embedding."""
    path = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=6)).save_pretrained(path)
    return path


def test_every_tensor_of_a_pipeline(tiny_pipeline_dir: Path, tiny_pipeline: Any) -> None:
    opened = ModelFolder(tiny_pipeline_dir)
    assert list(opened.components) == ["unet", "text_encoder"] and opened.notes() == []
    for name, part in opened.components.items():
        assert all(tensor.is_meta for tensor in part.module.parameters())
        wanted, got = dict(getattr(tiny_pipeline, name).named_parameters()), part.tensors()
        assert list(got) == [key for key in part.module.state_dict() if key in wanted] and len(got) == len(wanted)
        assert all(torch.equal(got[key], tensor) for key, tensor in wanted.items())


def test_a_single_model(tiny_pipeline_dir: Path) -> None:
    """The component is what its class says, as `components_of` has it."""
    assert list(ModelFolder(tiny_pipeline_dir / "unet").components) == ["unet"]
    assert list(ModelFolder(tiny_pipeline_dir / "text_encoder").components) == ["text_encoder"]


def test_a_tied_tensor_has_all_its_names(gpt2_dir: Path) -> None:
    part = ModelFolder(gpt2_dir).components["model"]
    assert part.ties() == [["transformer.wte.weight", "lm_head.weight"]]
    assert part.places["lm_head.weight"] == part.places["transformer.wte.weight"]


@pytest.mark.parametrize("spelled", ["transformer.{}", "{}"])
def test_names_with_and_without_the_models_prefix(spelled: str, gpt2_dir: Path, tmp_path: Path) -> None:
    """The hub's GPT-2 has none."""
    copied = Path(shutil.copytree(gpt2_dir, tmp_path / "gpt2"))
    tensors = {
        spelled.format(k.removeprefix("transformer.")): t for k, t in load_file(copied / "model.safetensors").items()
    }
    save_file({**tensors, "h.0.attn.masked_bias": torch.zeros(1)}, copied / "model.safetensors")
    opened = ModelFolder(copied)
    assert "transformer.h.0.attn.c_attn.weight" in opened.components["model"].tensors()
    assert opened.notes() == ["model has 1 tensors that its model has no place for, such as h.0.attn.masked_bias"]


def test_clips_older_spelling(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    old = {f"text_model.{key}": tensor for key, tensor in tensors.items()}
    save_file({**old, "text_model.embeddings.position_ids": torch.arange(77)}, file)
    part = ModelFolder(folder).components["text_encoder"]
    got = part.tensors()
    wanted = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    assert {key.removeprefix("text_model.") for key in got} == set(wanted)
    assert all(torch.equal(got[key], wanted[key.removeprefix("text_model.")]) for key in got)


def test_shards(folder: Path, tiny_pipeline: Any) -> None:
    shutil.rmtree(folder / "unet")
    tiny_pipeline.unet.save_pretrained(folder / "unet", max_shard_size="300KB")
    part = ModelFolder(folder).components["unet"]
    assert len(part.files) > 1
    assert part.tensors().keys() == dict(tiny_pipeline.unet.named_parameters()).keys()


def test_variants(folder: Path) -> None:
    (folder / "unet" / UNET).rename(folder / "unet" / UNET.replace(".", ".fp16."))
    with pytest.raises(ModelNotFoundError, match=r"has no diffusion_pytorch_model\.safetensors.*fp16"):
        ModelFolder(folder)
    assert ModelFolder(folder / "unet", "fp16").components["unet"].tensors()


class TestRefused:
    def refused(self, path: Path, words: str) -> None:
        with pytest.raises(ModelNotFoundError, match=words) as caught:
            ModelFolder(path)
        assert str(caught.value).isprintable()

    def test_no_model(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "nowhere", "no model folder")
        self.refused(tmp_path, r"neither model_index\.json nor config\.json")

    def test_pickled_weights(self, folder: Path) -> None:
        (folder / "unet" / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bin")
        self.refused(folder, "safe_serialization=True")

    def test_a_missing_shard(self, folder: Path) -> None:
        table = folder / "unet" / f"{UNET}.index.json"
        (folder / "unet" / UNET).unlink()
        table.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
        self.refused(folder, "'one.safetensors' is missing")
        table.write_text(json.dumps({"weight_map": {"a": "../vae/config.json"}}))
        self.refused(folder, "files of its own folder")

    @pytest.mark.parametrize("index", ["{", "[]", "{}", '{"unet": ["diffusers"]}'])
    def test_a_broken_index(self, index: str, folder: Path) -> None:
        (folder / "model_index.json").write_text(index)
        self.refused(folder, r"model_index\.json")

    @pytest.mark.parametrize(
        ("entry", "words"),
        [
            (["os", "system"], "those of diffusers and transformers are known"),
            (["diffusers", "StableDiffusionPipeline"], "does not know"),
            (["diffusers", "utils.logging"], "does not know"),
            (["transformers", "\x1b[31m"], "does not know"),
        ],
    )
    def test_other_classes(self, entry: list[str], words: str, folder: Path) -> None:
        (folder / "model_index.json").write_text(json.dumps({"unet": entry}))
        self.refused(folder, words)

    def test_a_config_that_is_none(self, folder: Path) -> None:
        (folder / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "block_out_channels": 3}')
        self.refused(folder, "does not describe a UNet2DConditionModel")

    def test_weights_of_another_config(self, folder: Path, tiny_pipeline: Any) -> None:
        config = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 48}))
        self.refused(folder, r"of shape .*; by the folder's config\.json it is")

    def test_one_tensor_under_two_names(self, folder: Path) -> None:
        file = folder / "text_encoder" / "model.safetensors"
        tensors = {key.removeprefix("text_model."): tensor for key, tensor in load_file(file).items()}
        save_file({**tensors, "text_model.final_layer_norm.bias": torch.zeros(32)}, file)
        self.refused(folder, "a second time")
