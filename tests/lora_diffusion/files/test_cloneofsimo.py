"""cloneofsimo's positions: the walk through the modules of 2023, and everything that does not fit it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import lora_diffusion as ld
from lora_diffusion.files import cloneofsimo
from lora_diffusion.files.cloneofsimo_layout import old_models, places
from lora_diffusion.files.pickled import read_pickled_adapter
from lora_diffusion.files.safetensors_file import TensorFile

REAL = Path(__file__).parents[4] / "shared" / "data" / "adapters" / "cloneofsimo_analog_rank4.safetensors"
USUAL = ["CrossAttention", "Attention", "GEGLU"]
EXTENDED = ["ResnetBlock2D", *USUAL]
ATTENTION = [f"attn{n}.{last}" for n in (1, 2) for last in ("to_q", "to_k", "to_v", "to_out.0")]
CLIP = [f"text_model.encoder.layers.{n}.self_attn.{p}_proj" for n in range(12) for p in ("k", "v", "q", "out")]


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's, without memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@pytest.fixture(scope="module")
def clip() -> CLIPTextModel:
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))


def expected_order(unet: nn.Module, in_block: list[str]) -> list[str]:
    """The UNet's layers in the old order, from today's modules: down, up, mid, in each transformer block `in_block`."""
    blocks = [path for path, module in unet.named_modules() if type(module).__name__ == "BasicTransformerBlock"]
    ordered = [path for part in ("down", "up", "mid") for path in blocks if path.startswith(part)]
    return [f"{block}.{last}" for block in ordered for last in in_block]


OLD_ORDER = [*ATTENTION[:4], "ff.net.0.proj", *ATTENTION[4:]]
NEW_ORDER = [*ATTENTION, "ff.net.0.proj"]


def factors(weights: list[Any], component: str, rank: int = 1) -> dict[str, torch.Tensor]:
    """Random factors for weights of these shapes, at positions 0, 1 …"""
    g = torch.Generator().manual_seed(len(weights))
    tensors = {}
    for n, weight in enumerate(weights):
        ones = [1] * (len(weight) - 2)
        tensors[f"{component}:{n}:up"] = torch.randn(weight[0], rank, *ones, generator=g)
        tensors[f"{component}:{n}:down"] = torch.randn(rank, *weight[1:], generator=g)
    return tensors


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def shapes_of(unet: nn.Module, paths: list[str]) -> list[Any]:
    modules = dict(unet.named_modules())
    return [tuple(modules[path].weight.shape) for path in paths]


def test_the_real_file(unet: UNet2DConditionModel, clip: CLIPTextModel) -> None:
    """144 and 48 layers, each the product of the tensors at its position, and all of them fit SD 1.5."""
    if not REAL.exists():
        pytest.skip("the real adapters are not here")
    adapter = ld.read_adapter(REAL)
    saved = load_file(REAL)
    assert adapter.dialect == "cloneofsimo"
    for component, order in (("unet", expected_order(unet, OLD_ORDER)), ("text_encoder", CLIP)):
        layers = adapter.components[component]
        assert len(layers) == len(order) == {"unet": 144, "text_encoder": 48}[component]
        for n, path in enumerate(order):
            up, down = saved[f"{component}:{n}:up"].float(), saved[f"{component}:{n}:down"].float()
            torch.testing.assert_close(layers[path].delta(), up @ down)
    modules = dict(unet.named_modules())
    for path, layer in adapter.components["unet"].items():
        assert modules[path].weight.shape == (layer.b.shape[0], layer.a.shape[1]), path
    report = ld.load_adapter(SimpleNamespace(unet=unet, text_encoder=clip), adapter, name="analog")
    assert report.complete
    assert {name: len(part.matched) for name, part in report.components.items()} == {"unet": 144, "text_encoder": 48}
    ld.delete_adapter(SimpleNamespace(unet=unet, text_encoder=clip), "analog")
    source = TensorFile(REAL)
    assert set(source.metadata) <= cloneofsimo.used_metadata(source), "nothing of it is another program's"


@pytest.mark.parametrize("in_block", [OLD_ORDER, NEW_ORDER])
def test_both_orders_of_a_block(tmp_path: Path, unet: UNet2DConditionModel, in_block: list[str]) -> None:
    """Before diffusers 0.15 the feed-forward part came between the attentions, later behind them."""
    order = expected_order(unet, in_block)
    tensors = factors(shapes_of(unet, order), "unet")
    adapter = ld.read_adapter(write(tmp_path / "a.safetensors", tensors, unet=json.dumps(USUAL)))
    for n, path in enumerate(order):
        assert torch.equal(adapter.components["unet"][path].a, tensors[f"unet:{n}:down"])


# (position, path, weight) as a walk through diffusers 0.11.1 gave them.
@pytest.mark.parametrize(
    ("n", "path", "weight"),
    [
        (9, "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", (320, 320)),
        (18, "down_blocks.0.resnets.0.conv1", (320, 320, 3, 3)),
        (19, "down_blocks.0.resnets.0.time_emb_proj", (320, 1280)),
        (24, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", (640, 640)),
        (64, "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k", (1280, 768)),
        (100, "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0", (1280, 1280)),
        (200, "up_blocks.3.resnets.0.conv_shortcut", (320, 960, 1, 1)),
        (208, "up_blocks.3.resnets.2.conv_shortcut", (320, 640, 1, 1)),
        (223, "mid_block.resnets.1.conv2", (1280, 1280, 3, 3)),
    ],
)
def test_the_extended_walk(n: int, path: str, weight: tuple[int, ...]) -> None:
    model, _ = next(old_models("unet", []))
    walk = list(places(model, EXTENDED, convolutions=True))
    assert len(walk) == 224
    assert walk[n] == (path, weight)


def test_every_old_layer_is_one_of_today(unet: UNet2DConditionModel) -> None:
    """Whole models, both diffusions: the same names and widths as today's modules."""
    with torch.device("meta"):
        second = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
    models = [model for model, _ in old_models("unet", [])]
    for model, today in zip(models, (unet, unet, second, second)):
        kinds = (nn.Linear, nn.Conv2d)
        real = {path: tuple(m.weight.shape) for path, m in today.named_modules() if isinstance(m, kinds)}
        assert dict(places(model, ["UNet2DConditionModel"], convolutions=True)) == real


def test_convolutions(tmp_path: Path, unet: UNet2DConditionModel) -> None:
    """The extended form: all 224 layers, convolutions with their kernels, fit SD 1.5."""
    model, _ = next(old_models("unet", []))
    weights = [weight for _, weight in places(model, EXTENDED, convolutions=True)]
    path = write(tmp_path / "a.safetensors", factors(weights, "unet"), unet=json.dumps(EXTENDED))
    adapter = ld.read_adapter(path)
    assert adapter.components["unet"]["mid_block.resnets.1.conv2"].delta().shape == (1280, 1280, 3, 3)
    assert ld.load_adapter(SimpleNamespace(unet=unet), adapter, name="a").matched == 224
    ld.delete_adapter(SimpleNamespace(unet=unet), "a")


def test_stable_diffusion_2(tmp_path: Path) -> None:
    """The text's width says which diffusion it is; its text encoder has 23 layers of 1024."""
    model, words = list(old_models("unet", []))[2]
    assert words == "Stable Diffusion 2"
    tensors = factors([weight for _, weight in places(model, USUAL, convolutions=False)], "unet")
    tensors |= factors([(1024, 1024)] * 92, "text_encoder")
    tensors["<s1>"] = torch.ones(1024)
    strings = {"unet": json.dumps(USUAL), "text_encoder": '["CLIPAttention"]', "<s1>": "<embed>"}
    adapter = ld.read_adapter(write(tmp_path / "a.safetensors", tensors, **strings))
    assert len(adapter.components["unet"]) == 144
    assert list(adapter.components["text_encoder"])[-1].startswith("text_model.encoder.layers.22.self_attn.")
    assert adapter.tokens["<s1>"]["text_encoder"].shape == (1, 1024)


@pytest.mark.parametrize(
    ("classes", "weights", "last"),
    [
        (["CLIPMLP"], [(64, 16), (16, 64)], "layers.1.mlp.fc2"),
        (["CLIPEncoderLayer"], [(16, 16)] * 4 + [(64, 16), (16, 64)], "layers.1.mlp.fc2"),
    ],
)
def test_other_classes_of_clip(tmp_path: Path, classes: list[str], weights: list[Any], last: str) -> None:
    path = write(tmp_path / "a.safetensors", factors(weights * 2, "text_encoder"), text_encoder=json.dumps(classes))
    layers = ld.read_adapter(path).components["text_encoder"]
    assert f"text_model.encoder.{last}" in layers
    assert len(layers) == 2 * len(weights)


@pytest.mark.parametrize("in_block", [OLD_ORDER, ATTENTION])
def test_bare_lists(tmp_path: Path, unet: UNet2DConditionModel, in_block: list[str]) -> None:
    """`.pt` and `.text_encoder.pt`, from before and after GEGLU was learned."""
    order = expected_order(unet, in_block)
    for name, paths, weights in (
        ("lora.pt", order, shapes_of(unet, order)),
        ("lora.text_encoder.pt", CLIP, [(768, 768)] * 48),
    ):
        tensors = list(factors(weights, "x").values())
        torch.save([tensor.half() for tensor in tensors], tmp_path / name)
        adapter = read_pickled_adapter(tmp_path / name)
        (layers,) = adapter.components.values()
        assert list(adapter.components) == ["text_encoder" if "text" in name else "unet"]
        assert list(layers) == paths
        assert torch.equal(layers[paths[-1]].a, tensors[-1].half())


@pytest.fixture(scope="module")
def sound(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """A whole file's tensors, word included."""
    tensors = factors(shapes_of(unet, expected_order(unet, OLD_ORDER)), "unet")
    return {**tensors, **factors([(768, 768)] * 48, "text_encoder"), "<s1>": torch.ones(768)}


def damages() -> Iterator[Any]:
    wide = {"unet:6:down": torch.ones(1, 320)}
    swapped = {"unet:4:up": torch.ones(320, 1)}
    nothing: dict[str, str] = {}
    yield pytest.param({"unet:7:down": None}, nothing, "no unet:7:down", id="half missing")
    yield pytest.param({"unet:7:down": None, "unet:7:up": None}, nothing, "no unet:7", id="layer missing")
    yield pytest.param(
        {"unet:143:down": None, "unet:143:up": None},
        nothing,
        "143 layers of the unet, where .* has 144",
        id="last missing",
    )
    yield pytest.param(factors([(9, 9)] * 145, "unet"), nothing, "unet:0 for a weight", id="all widths")
    beyond = {"unet:144:up": torch.ones(1280, 1), "unet:144:down": torch.ones(1, 1280)}
    yield pytest.param(beyond, nothing, "145 layers of the unet", id="one too many")
    far = {"unet:9999:up": torch.ones(1280, 1), "unet:9999:down": torch.ones(1, 1280)}
    yield pytest.param(far, nothing, "no unet:144:up", id="far beyond")
    yield pytest.param(wide, nothing, r"unet:6 for a weight \[320, 320\], where .*attn2.to_k, \[320, 768\]", id="width")
    yield pytest.param(swapped, nothing, r"unet:5 for a weight \[320, 320\], where", id="other width")
    ranks = {"unet:0:up": torch.ones(320, 2)}
    yield pytest.param(ranks, nothing, "do not fit each other", id="ranks differ")
    text = {"text_encoder:47:up": None, "text_encoder:47:down": None}
    yield pytest.param(text, nothing, "47 layers of the text_encoder", id="text layer missing")
    yield pytest.param({"<s1>": torch.ones(1024)}, nothing, "1024 numbers", id="word's width")
    yield pytest.param({"<s1>": torch.ones(1, 1, 768)}, nothing, "where a vector belongs", id="word's shape")
    yield pytest.param({"<s2>": torch.ones(768)}, nothing, "not understood.*<s2>", id="word without a flag")
    yield pytest.param({"vae:0:up": torch.ones(4, 1)}, nothing, "not understood.*vae:0:up", id="component")
    yield pytest.param({"unet:00:up": torch.ones(4, 1)}, nothing, "not understood.*unet:00:up", id="position")
    yield pytest.param({}, {"unet": "[3]"}, "no list of class names", id="classes")
    yield pytest.param({}, {"unet": "[" * 99999}, "no list of class names", id="deep")
    yield pytest.param({}, {"unet": '["GEGLU"]'}, "unet:0 for a weight", id="fewer classes")
    yield pytest.param({}, {"unet": '["\\u001b[31m"]'}, "where .* has 0", id="unknown class")
    yield pytest.param({}, {"unet": '["FeedForward", "GEGLU"]'}, "ambiguous", id="one in another")
    yield pytest.param({}, {"unet:3:rank": "\x1b4"}, "says rank .* at unet:3", id="rank")


@pytest.mark.parametrize(("changes", "strings", "words"), list(damages()))
def test_damaged(
    tmp_path: Path, sound: dict[str, torch.Tensor], changes: dict[str, Any], strings: dict[str, str], words: str
) -> None:
    """One layer more, less or other, and the file is refused with the place: all behind it would be wrong."""
    tensors = {name: value for name, value in {**sound, **changes}.items() if value is not None}
    metadata = {"unet": json.dumps(USUAL), "text_encoder": '["CLIPAttention"]', "<s1>": "<embed>", **strings}
    with pytest.raises(ld.AdapterFormatError, match=words) as caught:
        ld.read_adapter(write(tmp_path / "a.safetensors", tensors, **metadata))
    assert str(caught.value).isprintable()
