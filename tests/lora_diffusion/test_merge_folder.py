"""Merging into a folder is merging into the model, and it is done whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import lora_diffusion as ld
from lora_diffusion.merge_folder import FolderMerge, merge_folder
from lora_diffusion.pipeline_folder import ModelFolder
from lora_diffusion.structured import LoHa

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def adapter_for(target: Any, seed: int = 0, **config: Any) -> ld.Adapter:
    torch.manual_seed(seed)
    names = None if isinstance(target, torch.nn.Module) else ["unet", "text_encoder"]
    ld.add_adapter(target, ld.LoraConfig(init_lora_weights=False, **config), "made", components=names)
    adapter = ld.get_adapter(target, "made")
    ld.delete_adapter(target, "made")
    return adapter


def same_weights(loaded: Any, merged: Any) -> None:
    """Bit for bit."""
    old = {name: tensor for name, tensor in merged.named_parameters() if ".adapter_" not in name}
    new = dict(loaded.named_parameters())
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name]) and tensor.dtype == old[name].dtype, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_merge_adapters(dtype: torch.dtype, tiny_pipeline: Any, tmp_path: Path) -> None:
    """LoRA and DoRA, Linear, Conv2d and Embedding, both components, shards, in every dtype; the figures too."""
    plain = adapter_for(tiny_pipeline, 0, r=4, target_modules=".*(to_q|conv1|proj_in|q_proj|token_embedding)")
    dora = adapter_for(tiny_pipeline, 1, r=2, use_dora=True, target_modules="attention")
    tiny_pipeline.to(dtype).save_pretrained(tmp_path / "base", max_shard_size="200KB")
    for tensor in [*tiny_pipeline.unet.parameters(), *tiny_pipeline.text_encoder.parameters()]:
        tensor.data = tensor.data.clone()  # out of the mapped file, where DoRA's norms may differ in the last bit
    ld.load_adapter(tiny_pipeline, plain, "plain", 0.7)
    ld.load_adapter(tiny_pipeline, dora, "dora", -0.5)
    wanted = ld.merge_adapters(tiny_pipeline)
    told: list[tuple[str, int, int]] = []
    folder = ModelFolder(tmp_path / "base")
    assert len(folder.components["unet"].files) > 1
    adapters = {"plain": (plain, 0.7), "dora": (dora, -0.5)}
    result = merge_folder(folder, adapters, tmp_path / "out", lambda *what: told.append(what))
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=dtype, safety_checker=None)
    same_weights(loaded.unet, tiny_pipeline.unet)
    same_weights(loaded.text_encoder, tiny_pipeline.text_encoder)
    got = result.merged
    assert (got.adapters, got.layers, got.unchanged) == (wanted.adapters, wanted.layers, wanted.unchanged)
    for component in ("unet", "text_encoder"):
        assert got.error[component] == pytest.approx(wanted.error[component])
        assert got.worst[component] == (wanted.worst[component][0], pytest.approx(wanted.worst[component][1]))
    assert [done for _, done, _ in told] == list(range(1, sum(got.layers.values()) + 1))
    assert {total for _, _, total in told} == {len(told)}


def test_structured_layers(tiny_pipeline_dir: Path, tiny_pipeline: Any, tmp_path: Path) -> None:
    """LoHa's product becomes two factors on the way, as in a loaded model."""
    module = tiny_pipeline.unet.get_submodule(Q)
    wide, out = module.in_features, module.out_features
    loha = LoHa(*(torch.randn(shape) for shape in ((out, 2), (2, wide), (out, 2), (2, wide))), scale=0.1)
    adapter = ld.Adapter({}, structured={"unet": {Q: loha}})
    merge_folder(ModelFolder(tiny_pipeline_dir), {"a": (adapter, 1.0)}, tmp_path / "out")
    ld.load_adapter(tiny_pipeline, adapter, "a")
    ld.merge_adapters(tiny_pipeline)
    same_weights(
        StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None).unet, tiny_pipeline.unet
    )


class TestBareModel:
    @pytest.fixture
    def model(self) -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=6))

    def test_a_transposed_weight(self, model: GPT2LMHeadModel, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path / "base")
        adapter = adapter_for(model, r=2, target_modules=["c_attn", "c_proj"])
        result = merge_folder(ModelFolder(tmp_path / "base"), {"a": (adapter, 2.0)}, tmp_path / "out")
        assert result.merged.layers == {"model": 6}
        ld.load_adapter(model, adapter, "a", 2.0)
        ld.merge_adapters(model)
        same_weights(GPT2LMHeadModel.from_pretrained(tmp_path / "out"), model)

    def test_a_tied_weight_is_refused(self, model: GPT2LMHeadModel, tmp_path: Path) -> None:
        """In the model only the embedding would change, in the file the head as well."""
        model.save_pretrained(tmp_path / "base")
        adapter = adapter_for(model, r=2, target_modules=["wte"])
        with pytest.raises(ld.AdapterMismatchError, match=r"transformer\.wte shares its weight with lm_head\.weight"):
            merge_folder(ModelFolder(tmp_path / "base"), {"a": (adapter, 1.0)}, tmp_path / "out")
        assert [one.name for one in tmp_path.iterdir()] == ["base"]


class TestFolder:
    @pytest.fixture
    def base(self, tiny_pipeline_dir: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "in" / "base"))

    @pytest.fixture
    def adapter(self, tiny_pipeline: Any) -> ld.Adapter:
        return adapter_for(tiny_pipeline, r=2)

    def merge(self, base: Path, adapter: ld.Adapter, out: Path) -> FolderMerge:
        return merge_folder(ModelFolder(base), {"a": (adapter, 1.0)}, out)

    def test_what_is_copied_and_what_is_left_out(self, base: Path, adapter: ld.Adapter, tmp_path: Path) -> None:
        """Weights that are there once more would be the old ones; a README is what it was."""
        (base / "README.md").write_text("about it")
        (base / "v1-5.ckpt").write_bytes(b"x")
        (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
        (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
        (base / "vae" / "extra.bin").write_bytes(b"x")
        result = self.merge(base, adapter, tmp_path / "out")
        assert result.left_out == ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
                                   "v1-5.ckpt"]  # fmt: skip
        files = {str(file.relative_to(base)) for file in base.rglob("*") if file.is_file()}
        kept = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
        assert kept == files - set(result.left_out)
        for name in kept - {f"{part.component}/{f.path.name}" for part in ModelFolder(base).components.values() for f in
                            part.files}:  # fmt: skip
            assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()

    def test_the_source_is_untouched_and_links_are_followed(
        self, base: Path, adapter: ld.Adapter, tmp_path: Path
    ) -> None:
        """The hub's cache is a folder of links."""
        weights = base / "unet" / "diffusion_pytorch_model.safetensors"
        blob = tmp_path / "blob"
        weights.rename(blob)
        weights.symlink_to(blob)
        before = blob.read_bytes()
        self.merge(base, adapter, tmp_path / "out")
        assert blob.read_bytes() == before
        assert not (tmp_path / "out" / "unet" / weights.name).is_symlink()

    def test_an_empty_folder_may_be_there(self, base: Path, adapter: ld.Adapter, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        self.merge(base, adapter, tmp_path / "out")
        assert (tmp_path / "out" / "model_index.json").is_file()
        with pytest.raises(ld.ConfigError, match="exists already and is not empty"):
            self.merge(base, adapter, tmp_path / "out")

    @pytest.mark.parametrize("where", ["", "x", "unet/x"])
    def test_not_into_itself(self, where: str, base: Path, adapter: ld.Adapter) -> None:
        with pytest.raises(ld.ConfigError, match=r"lies in the model folder|exists already"):
            self.merge(base, adapter, base / where)

    @pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_whole_or_not_at_all(
        self, problem: BaseException, base: Path, adapter: ld.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(self: Any, target: Path, *rest: Any) -> None:
            target.write_bytes(b"half")
            raise problem

        monkeypatch.setattr("lora_diffusion.weight_file.WeightFile.rewrite", broken)
        expected = ld.LoraDiffusionError if isinstance(problem, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match="No space left" if isinstance(problem, OSError) else None):
            self.merge(base, adapter, tmp_path / "out")
        assert [one.name for one in tmp_path.iterdir()] == ["in"]

    def test_a_place_that_cannot_be(self, base: Path, adapter: ld.Adapter, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(ld.LoraDiffusionError, match="could not be written"):
            self.merge(base, adapter, tmp_path / "file" / "out")

    def test_beyond_the_dtype(self, base: Path, tmp_path: Path) -> None:
        file = base / "unet" / "diffusion_pytorch_model.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
        wide = load_file(file)[f"{Q}.weight"].shape[1]
        huge = ld.Adapter({"unet": {Q: ld.LowRank(torch.full((1, wide), 1e4), torch.full((wide, 1), 1e4))}})
        with pytest.raises(ld.AdapterMismatchError, match=r"would leave the range of torch\.float16"):
            self.merge(base, huge, tmp_path / "out")
        assert [one.name for one in tmp_path.iterdir()] == ["in"]

    def test_quantised_weights(self, base: Path, adapter: ld.Adapter, tmp_path: Path) -> None:
        file = base / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, f"{Q}.weight": tensors[f"{Q}.weight"].to(torch.int8)}, file)
        with pytest.raises(ld.AdapterMismatchError, match="stored as I8"):
            self.merge(base, adapter, tmp_path / "out")

    def test_missing_weights(self, base: Path, adapter: ld.Adapter, tmp_path: Path) -> None:
        file = base / "unet" / "diffusion_pytorch_model.safetensors"
        save_file({name: t for name, t in load_file(file).items() if not name.startswith(Q)}, file)
        with pytest.raises(ld.AdapterMismatchError, match="has no weight in"):
            self.merge(base, adapter, tmp_path / "out")

    def test_what_cannot_be_merged(self, base: Path, tmp_path: Path) -> None:
        layers = {"unet": {Q: ld.LowRank(torch.ones(1, 64), torch.ones(64, 1))}}
        copied = ld.Adapter(layers, copies={"unet": {"conv_in": {"bias": torch.zeros(32)}}})
        with pytest.raises(ld.AdapterMismatchError, match=r"a whole module of its own for unet\.conv_in"):
            self.merge(base, copied, tmp_path / "out")
        with pytest.raises(ld.AdapterMismatchError, match="does not fit the target"):
            self.merge(base, ld.Adapter({"unet": {"mid_block.x": layers["unet"][Q]}}), tmp_path / "out")
        with pytest.raises(ld.AdapterMismatchError, match="has no layers"):
            self.merge(base, ld.Adapter({}), tmp_path / "out")

    def test_a_word_is_a_note(self, base: Path, adapter: ld.Adapter, tmp_path: Path) -> None:
        adapter.tokens = {"<s1>": {"text_encoder": torch.zeros(1, 32)}}
        assert self.merge(base, adapter, tmp_path / "out").notes == [
            "a: the word '<s1>' is no part of the merged model"
        ]
        index = json.loads((tmp_path / "out" / "model_index.json").read_text())
        assert index["_class_name"] == "StableDiffusionPipeline"
