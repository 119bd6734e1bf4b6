"""diffusers' attention processors of 2023: with and without the prefix, and both spellings of the text encoder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import lora_diffusion as ld
from lora_diffusion.files.pickled import read_pickled_adapter

REAL = Path(__file__).parents[4] / "shared" / "data" / "adapters" / "diffusers_attn_processor_unprefixed.safetensors"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
TEXT = "text_model.encoder.layers.0.self_attn"


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    g = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(shape, generator=g) for name, shape in shapes.items()}, path)
    return path


def pair(where: str, width: int = 8, rank: int = 2) -> dict[str, tuple[int, ...]]:
    return {f"{where}.down.weight": (rank, width), f"{where}.up.weight": (width, rank)}


def old_names(pipeline: StableDiffusionPipeline, prefix: str) -> dict[str, torch.Tensor]:
    """An adapter for every attention projection of the pipeline's UNet and text encoder, as 2023 named them."""
    g = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for path, module in pipeline.unet.named_modules():
        where, _, last = path.removesuffix(".0").rpartition(".")
        if last in PROJECTIONS and hasattr(module, "weight"):
            out, width = module.weight.shape
            tensors[f"{prefix}{where}.processor.{last}_lora.down.weight"] = torch.randn(4, width, generator=g) * 0.2
            tensors[f"{prefix}{where}.processor.{last}_lora.up.weight"] = torch.randn(out, 4, generator=g) * 0.2
    for n in range(2):
        for last in PROJECTIONS:
            where = f"text_encoder.text_model.encoder.layers.{n}.self_attn.{last}_lora"
            tensors[f"{where}.down.weight"] = torch.randn(4, 32, generator=g) * 0.2
            tensors[f"{where}.up.weight"] = torch.randn(32, 4, generator=g) * 0.2
    return tensors


def test_the_real_file() -> None:
    """All 128 layers fit Stable Diffusion 1.5's UNet, and every delta is that of the file's tensors."""
    if not REAL.exists():
        pytest.skip("the real adapters are not here")
    adapter = ld.read_adapter(REAL)
    assert adapter.dialect == "attn-processor"
    layers = adapter.components["unet"]
    saved = load_file(REAL)
    assert len(layers) == 128
    for name, down in saved.items():
        if name.endswith(".down.weight"):
            where, last = name.removesuffix("_lora.down.weight").split(".processor.")
            layer = layers[f"{where}.{'to_out.0' if last == 'to_out' else last}"]
            torch.testing.assert_close(layer.delta(), saved[name.replace(".down.", ".up.")] @ down)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    modules = dict(unet.named_modules())
    for path, layer in layers.items():
        assert modules[path].weight.shape == layer.delta().shape, path
    report = ld.load_adapter(SimpleNamespace(unet=unet), adapter, name="old")
    assert report.complete
    assert report.matched == 128


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_same_picture_as_diffusers(
    tmp_path: Path, tiny_pipeline: StableDiffusionPipeline, tiny_pipeline_dir: Path, prefix: str
) -> None:
    """diffusers loads the prefixed UNet; ours, prefixed or not, predicts the same noise and encodes the same words."""
    tensors = old_names(tiny_pipeline, prefix)
    path = tmp_path / "ours.safetensors"
    save_file(tensors, path)
    report = ld.load_adapter(tiny_pipeline, path)
    assert report.complete
    assert {name: len(part.matched) for name, part in report.components.items()} == {"unet": 32, "text_encoder": 8}

    theirs = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    plain = theirs.unet(*inputs()).sample
    prefixed = {
        name if name.startswith("text_") else f"unet.{name.removeprefix('unet.')}": tensors[name] for name in tensors
    }
    theirs.load_lora_weights(prefixed, adapter_name="old")
    with torch.no_grad():
        torch.testing.assert_close(
            tiny_pipeline.unet(*inputs()).sample, theirs.unet(*inputs()).sample, rtol=1e-5, atol=1e-5
        )
        words = torch.arange(10)[None]
        torch.testing.assert_close(
            tiny_pipeline.text_encoder(words)[0], theirs.text_encoder(words)[0], rtol=1e-5, atol=1e-5
        )
        assert (plain - theirs.unet(*inputs()).sample).abs().max() > 1e-2, "the adapter does something"


def inputs() -> tuple[torch.Tensor, int, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(1, 4, 8, 8, generator=g), 7, torch.randn(1, 5, 32, generator=g)


def test_pickled(tmp_path: Path) -> None:
    """`pytorch_lora_weights.bin`, as most of these files were."""
    path = write(tmp_path / "a.safetensors", pair(f"{BLOCK}.processor.to_q_lora"))
    torch.save(load_file(path), tmp_path / "pytorch_lora_weights.bin")
    adapter = read_pickled_adapter(tmp_path / "pytorch_lora_weights.bin")
    assert adapter.dialect == "attn-processor"
    expected = ld.read_adapter(path).components["unet"][f"{BLOCK}.to_q"].delta()
    assert torch.equal(adapter.components["unet"][f"{BLOCK}.to_q"].delta(), expected)


def test_spellings_in_one_file(tmp_path: Path) -> None:
    """The UNet's processors beside later text encoder names, layers out of the attention, added keys and values."""
    shapes = {
        **pair(f"unet.{BLOCK}.processor.to_q_lora"),
        **pair(f"unet.{BLOCK}.processor.to_out_lora"),
        **pair(f"unet.{BLOCK}.processor.add_k_proj_lora"),
        **pair(f"unet.{BLOCK.removesuffix('attn1')}ff.net.2.lora"),
        **pair(f"text_encoder.{TEXT}.to_out_lora"),
        **pair(f"text_encoder.{TEXT}.k_proj.lora_linear_layer"),
        **pair(f"text_encoder_2.{TEXT}.to_v_lora"),
    }
    adapter = ld.read_adapter(write(tmp_path / "a.safetensors", shapes))
    assert {component: set(layers) for component, layers in adapter.components.items()} == {
        "unet": {
            f"{BLOCK}.to_q",
            f"{BLOCK}.to_out.0",
            f"{BLOCK}.add_k_proj",
            f"{BLOCK.removesuffix('attn1')}ff.net.2",
        },
        "text_encoder": {f"{TEXT}.out_proj", f"{TEXT}.k_proj"},
        "text_encoder_2": {f"{TEXT}.v_proj"},
    }
    assert all(layer.scale == 1.0 for layers in adapter.components.values() for layer in layers.values())


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({f"{BLOCK}.processor.to_q_lora.down.weight": (2, 8)}, "without its other half"),
        ({**pair(f"{BLOCK}.processor.to_q_lora"), **pair(f"unet.{BLOCK}.processor.to_q_lora")}, "twice"),
        ({**pair(f"{BLOCK}.processor.to_q_lora"), f"{BLOCK}.processor.to_q_lora.alpha": (1,)}, "not understood"),
        (
            {**pair(f"{BLOCK}.processor.to_q_lora"), f"{BLOCK}.processor.to_k_custom_diffusion.weight": (8, 8)},
            "not und",
        ),
        ({**pair(f"{BLOCK}.processor.to_q_lora"), **pair(f"text_encoder.{TEXT}.add_k_proj_lora")}, "not understood"),
        ({**pair(f"{BLOCK}.processor.to_q_lora"), **pair(f"{BLOCK}.processor.to_x_lora")}, "not understood"),
        ({**pair(f"{BLOCK}.processor.to_q_lora", rank=9000)}, "rank 9,000"),
        (
            {f"{BLOCK}.processor.to_q_lora.down.weight": (2, 8), f"{BLOCK}.processor.to_q_lora.up.weight": (8, 3)},
            "do not fit each other",
        ),
    ],
)
def test_refused_in_one_line(tmp_path: Path, shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ld.AdapterFormatError, match=words) as caught:
        ld.read_adapter(write(tmp_path / "a.safetensors", shapes))
    assert str(caught.value).isprintable()
