"""Loading into models and saving from them; the pipelines of diffusers as the other side."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_diffusion as ld

Run = Callable[..., Any]
REAL_FILES = Path(__file__).parents[3] / "shared" / "data" / "adapters"

CONFIGS = {
    "unet only": {"unet": ld.LoraConfig(r=4)},
    "text encoder only": {"text_encoder": ld.LoraConfig(r=4)},
    "both, scaled": {"unet": ld.LoraConfig(r=4, lora_alpha=10), "text_encoder": ld.LoraConfig(r=2, lora_alpha=1)},
    "mixed ranks and alphas": {
        "unet": ld.LoraConfig(r=4, rank_pattern={"mid_block.*to_q": 7, "to_out.0": 2}, alpha_pattern={"to_v": 1}),
        "text_encoder": ld.LoraConfig(r=3, rank_pattern={"layers.1.self_attn.k_proj": 6}),
    },
    "rsLoRA, part of the UNet": {"unet": ld.LoraConfig(r=4, use_rslora=True, target_modules=r"up_blocks.*attn1\.to_q")},
}


@pytest.fixture(params=CONFIGS)
def saved(request: pytest.FixtureRequest, tiny_pipeline: Any, randomise: Run, tmp_path: Path) -> Any:
    """A pipeline with an adapter named "dog", and the file that it was saved to."""
    ld.add_adapter(tiny_pipeline, CONFIGS[request.param], "dog")
    randomise(tiny_pipeline, "dog")
    path = tmp_path / "dog.safetensors"
    ld.save_adapter(tiny_pipeline, path, "dog", metadata={"prompt": "a photo of sks dog"})
    return tiny_pipeline, path


@pytest.mark.parametrize("with_metadata", [True, False])
def test_diffusers_loads_what_we_save(
    saved: Any, tiny_pipeline_dir: Path, unet_output: Run, text_output: Run, with_metadata: bool, tmp_path: Path
) -> None:
    """Same outputs as ours to 1e-5, whether or not the metadata survived; no layer beside the adapter's is touched."""
    from diffusers import StableDiffusionPipeline
    from peft.tuners.tuners_utils import BaseTunerLayer

    ours, path = saved
    if not with_metadata:
        path = tmp_path / "stripped.safetensors"
        save_file(load_file(tmp_path / "dog.safetensors"), path, metadata={"format": "pt"})
    theirs = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    theirs.load_lora_weights(path)
    torch.testing.assert_close(unet_output(theirs.unet), unet_output(ours.unet), rtol=0, atol=1e-5)
    torch.testing.assert_close(text_output(theirs.text_encoder), text_output(ours.text_encoder), rtol=0, atol=1e-5)
    wrapped = [
        m for part in (theirs.unet, theirs.text_encoder) for m in part.modules() if isinstance(m, BaseTunerLayer)
    ]
    adapted = ld.get_adapter(ours, "dog").layer_count()
    assert len([m for m in wrapped if m.r]) == adapted


def test_diffusers_loads_dora(
    tiny_pipeline: Any, tiny_pipeline_dir: Path, randomise: Run, unet_output: Run, tmp_path: Path
) -> None:
    """Lengths beside attention projections and a convolution; ours and diffusers read the same file alike."""
    from diffusers import StableDiffusionPipeline

    config = ld.LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], use_dora=True)
    ld.add_adapter(tiny_pipeline, config)
    for part in ld.adapter_parameters(tiny_pipeline)["unet"]:
        part.data.add_(torch.randn(part.shape, generator=torch.Generator().manual_seed(part.numel())) * 0.05)
    wanted = unet_output(tiny_pipeline.unet)
    ld.save_adapter(tiny_pipeline, tmp_path / "dora.safetensors")
    theirs, again = (StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None) for _ in range(2))
    theirs.load_lora_weights(tmp_path / "dora.safetensors")
    torch.testing.assert_close(unet_output(theirs.unet), wanted, rtol=1e-4, atol=1e-5)
    assert ld.load_adapter(again, tmp_path / "dora.safetensors").complete
    torch.testing.assert_close(unet_output(again.unet), wanted, rtol=1e-4, atol=1e-5)


def test_a_picture_through_diffusers_is_ours(
    tiny_pipeline: Any, tiny_pipeline_dir: Path, randomise: Run, tmp_path: Path
) -> None:
    """The whole way, prompt to pixels."""
    from diffusers import StableDiffusionPipeline

    def picture(pipeline: Any) -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        out = pipeline("sks dog", num_inference_steps=3, height=32, width=32, generator=g, output_type="pt")
        return out.images

    base = picture(tiny_pipeline)
    ld.add_adapter(tiny_pipeline, CONFIGS["both, scaled"])
    randomise(tiny_pipeline, std=0.3)
    ld.save_adapter(tiny_pipeline, tmp_path / "a.safetensors")
    theirs = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(tmp_path / "a.safetensors")
    ours = picture(tiny_pipeline)
    torch.testing.assert_close(picture(theirs), ours, rtol=0, atol=1e-3)
    assert (ours - base).abs().max() > 1 / 255


def test_we_load_what_we_save(saved: Any, tiny_pipeline_dir: Path, unet_output: Run, text_output: Run) -> None:
    from diffusers import StableDiffusionPipeline

    ours, path = saved
    fresh = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    report = ld.load_adapter(fresh, path)
    torch.testing.assert_close(unet_output(fresh.unet), unet_output(ours.unet), rtol=0, atol=1e-5)
    torch.testing.assert_close(text_output(fresh.text_encoder), text_output(ours.text_encoder), rtol=0, atol=1e-5)
    assert (report.name, report.dialect, report.complete) == ("dog", "diffusers", True)
    assert report.matched == ld.get_adapter(ours, "dog").layer_count()
    assert report.metadata == {"prompt": "a photo of sks dog"}
    assert not any(p.requires_grad for part in ld.adapter_parameters(fresh, "dog").values() for p in part)


def test_saving_again_gives_the_same_bytes(saved: Any, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    """Loaded and saved once more, provenance included, nothing changes."""
    from diffusers import StableDiffusionPipeline

    _, path = saved
    fresh = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    ld.load_adapter(fresh, path, "again")
    ld.save_adapter(fresh, tmp_path / "again.safetensors", "again")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_what_diffusers_saves_we_load(
    tiny_pipeline: Any, tiny_pipeline_dir: Path, unet_output: Run, tmp_path: Path
) -> None:
    """With its metadata, alpha apart from the tensors, and a text encoder."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig as PeftConfig
    from peft.utils import get_peft_model_state_dict

    theirs = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    config = PeftConfig(
        r=4,
        lora_alpha=12,
        target_modules=["to_q", "to_out.0"],
        alpha_pattern={"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2},
        init_lora_weights=False,
    )
    theirs.unet.add_adapter(config)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(theirs.unet),
        **_collate_lora_metadata({"unet": theirs.unet}),
    )
    report = ld.load_adapter(tiny_pipeline, tmp_path / "pytorch_lora_weights.safetensors", "x")
    assert dict(report.components["unet"].alphas) == {12.0: 15, 2.0: 1}
    torch.testing.assert_close(unet_output(tiny_pipeline.unet), unet_output(theirs.unet), rtol=0, atol=1e-6)


def test_a_half_precision_base_takes_fp32_factors(tiny_pipeline: Any, saved: Any) -> None:
    _, path = saved
    pipeline = copy.deepcopy(tiny_pipeline)
    ld.unload(pipeline)
    pipeline.unet.half()
    ld.load_adapter(pipeline, path, "half")
    assert {p.dtype for part in ld.adapter_parameters(pipeline, "half").values() for p in part} == {torch.float32}


class TestReport:
    def write(self, toy: nn.Module, folder: Path, **config: Any) -> Path:
        ld.add_adapter(toy, ld.LoraConfig(r=2, init_lora_weights=False, **config))
        ld.save_adapter(toy, folder / "toy.safetensors")
        ld.unload(toy)
        return folder / "toy.safetensors"

    def test_reads_well(self, toy: nn.Module, tmp_path: Path) -> None:
        path = self.write(toy, tmp_path)
        assert str(ld.load_adapter(toy, path)).splitlines() == [
            f"adapter 'toy' from {path} (diffusers): 2 of 2 layers",
            "  model: 2 of 2 layers, rank 2, alpha 2, scale 1",
            "  made for the base in hand",
            "  hash intact",
        ]

    def test_strict_refuses_part_of_an_adapter(self, toy: nn.Module, tmp_path: Path) -> None:
        """Counts, the first layer and the names nearest to it; the target is untouched."""
        path = self.write(toy, tmp_path)
        toy.attn["to_w"] = toy.attn.pop("to_v")
        before = set(toy.state_dict())
        with pytest.raises(ld.AdapterMismatchError) as caught:
            ld.load_adapter(toy, path)
        for words in ("1 of 2 in model", "attn.to_v", "no such module", "nearest", "to_w", "strict=False"):
            assert words in str(caught.value)
        assert set(toy.state_dict()) == before
        assert ld.list_adapters(toy) == {}

    def test_not_strict_says_what_was_left(self, toy: nn.Module, tmp_path: Path) -> None:
        path = self.write(toy, tmp_path)
        del toy.attn["to_v"]
        report = ld.load_adapter(toy, path, strict=False)
        assert (report.matched, report.unmatched, report.complete) == (1, 1, False)
        assert report.components["model"].unmatched == {"attn.to_v": "the model has no such module"}
        assert "left out 1, such as attn.to_v: the model has no such module" in str(report)

    @pytest.mark.parametrize("strict", [True, False])
    def test_nothing_fits(self, toy: nn.Module, tmp_path: Path, strict: bool) -> None:
        path = self.write(toy, tmp_path)
        with pytest.raises(ld.AdapterMismatchError, match="0 of 2"):
            ld.load_adapter(nn.Sequential(nn.Linear(2, 2)), path, strict=strict)

    def test_another_width(self, toy: nn.Module, tmp_path: Path) -> None:
        path = self.write(toy, tmp_path)
        toy.attn["to_q"] = nn.Linear(9, 6)
        with pytest.raises(ld.AdapterMismatchError, match=r"shapes are A \(2, 8\).*needs \(2, 9\)"):
            ld.load_adapter(toy, path)

    def test_names_come_from_file_or_folder(self, toy: nn.Module, tmp_path: Path) -> None:
        path = self.write(toy, tmp_path)
        folder = tmp_path / "my dog.v2"
        folder.mkdir()
        generic = folder / "pytorch_lora_weights.safetensors"
        generic.write_bytes(path.read_bytes())
        names = [ld.load_adapter(toy, file).name for file in (path, path, generic)]
        assert names == ["toy", "toy-2", "my-dog-v2"]
        with pytest.raises(ld.ConfigError, match="there already"):
            ld.load_adapter(toy, path, "toy")

    def test_weight(self, toy: nn.Module, tmp_path: Path) -> None:
        path = self.write(toy, tmp_path)
        ld.load_adapter(toy, path, weight=0.3)
        ld.load_adapter(toy, path, weight={"model": -1})
        assert ld.active_adapters(toy) == {"toy": {"model": 0.3}, "toy-2": {"model": -1.0}}
        with pytest.raises(ld.ConfigError, match="components are model"):
            ld.load_adapter(toy, path, weight={"unet": 1})

    def test_an_adapter_in_memory(self, toy: nn.Module, tmp_path: Path) -> None:
        adapter = ld.read_adapter(self.write(toy, tmp_path))
        report = ld.load_adapter(toy, adapter, "memory")
        assert (report.path, report.matched) == (None, 2)
        assert all(map(torch.equal, ld.get_adapter(toy, "memory").flat().values(), adapter.flat().values()))


def test_bare_parts_and_pipelines_share_files(
    tiny_pipeline: Any, randomise: Run, unet_output: Run, tmp_path: Path
) -> None:
    """A bare UNet saves as `unet`, so the pipeline can load it, and the reverse."""
    ld.add_adapter(tiny_pipeline.unet, ld.LoraConfig(r=2))
    randomise(tiny_pipeline.unet)
    wanted = unet_output(tiny_pipeline.unet)
    ld.save_adapter(tiny_pipeline.unet, tmp_path / "u.safetensors")
    ld.unload(tiny_pipeline)
    ld.load_adapter(tiny_pipeline, tmp_path / "u.safetensors")
    torch.testing.assert_close(unet_output(tiny_pipeline.unet), wanted, rtol=0, atol=1e-5)
    assert ld.active_adapters(tiny_pipeline.unet) == {"u": {"unet": 1.0}}


def test_a_text_encoders_file_does_not_fit_a_unet(tiny_pipeline: Any, tmp_path: Path) -> None:
    ld.add_adapter(tiny_pipeline, ld.LoraConfig(), components="text_encoder")
    ld.save_adapter(tiny_pipeline, tmp_path / "t.safetensors")
    with pytest.raises(ld.AdapterMismatchError, match="the target has no text_encoder"):
        ld.load_adapter(tiny_pipeline.unet, tmp_path / "t.safetensors")


def test_the_file_is_canonical(tiny_pipeline: Any, tmp_path: Path) -> None:
    """`text_model.` whatever transformers says, PEFT's factor names, the least metadata, ours apart from it."""
    ld.add_adapter(tiny_pipeline, {"unet": ld.LoraConfig(r=4), "text_encoder": ld.LoraConfig(r=2, lora_alpha=4)})
    path = tmp_path / "c.safetensors"
    ld.save_adapter(tiny_pipeline, path, metadata={"steps": 10})
    with safe_open(path, "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    text = [key for key in keys if key.startswith("text_encoder.")]
    assert len(text) == 16
    assert all(key.startswith("text_encoder.text_model.encoder.layers.") for key in text)
    described = json.loads(metadata["lora_adapter_metadata"])
    fields = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
    assert set(described) == {f"{component}.{field}" for component in ("unet", "text_encoder") for field in fields}
    assert described["text_encoder.lora_alpha"] == described["text_encoder.r"] == 2
    own = json.loads(metadata["lora_diffusion"])
    assert own["metadata"] == {"steps": 10}
    assert own["config"]["text_encoder"]["lora_alpha"] == 4


@pytest.mark.skipif(not REAL_FILES.exists(), reason=f"the real adapter files are not at {REAL_FILES}")
def test_a_strangers_file_is_read_in_full() -> None:
    """SD 1.5, rank 4, the older spelling, without metadata: 128 layers, each delta straight from the file's tensors."""
    path = REAL_FILES / "diffusers_lora_down_up.safetensors"
    adapter = ld.read_adapter(path)
    assert {component: len(layers) for component, layers in adapter.components.items()} == {"unet": 128}
    raw = load_file(path)
    for where, low_rank in adapter.components["unet"].items():
        up, down = raw[f"unet.{where}.lora.up.weight"], raw[f"unet.{where}.lora.down.weight"]
        assert torch.equal(low_rank.delta(), up @ down)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_FILES.exists(), reason=f"the real adapter files are not at {REAL_FILES}")
def test_a_strangers_file_fits_stable_diffusion_15() -> None:
    """All 128 layers find their place in SD 1.5's UNet (random weights), and taking them out restores it."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    unet = unet.to_empty(device="cpu")
    names = list(unet.state_dict())
    report = ld.load_adapter(unet, REAL_FILES / "diffusers_lora_down_up.safetensors")
    assert (report.matched, report.unmatched) == (128, 0)
    ld.unload(unet)
    assert list(unet.state_dict()) == names


def test_one_text_encoder_takes_what_is_named_for_another(tiny_pipeline: Any, randomise: Callable[..., None]) -> None:
    """SDXL's second text encoder alone, and a file whose names do not say which of the two it is for."""
    ld.add_adapter(tiny_pipeline, ld.LoraConfig(r=2), components=["text_encoder"])
    randomise(tiny_pipeline)
    adapter = ld.get_adapter(tiny_pipeline)
    ld.unload(tiny_pipeline)
    other = ld.Adapter({"text_encoder_2": adapter.components["text_encoder"]})
    assert ld.load_adapter(tiny_pipeline.text_encoder, other).matched == 8
