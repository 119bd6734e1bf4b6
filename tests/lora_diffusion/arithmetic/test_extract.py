"""LoRA out of two models: what was merged comes out again, and what cannot come out is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_diffusion as ld
from lora_diffusion.arithmetic import extract
from lora_diffusion.arithmetic.dense import EXACT_SIZE, truncated_svd

Make = Callable[..., Any]


class Net(nn.Module):
    """One of each kind of layer that can, and cannot, be extracted from."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.lin = nn.Linear(8, 6)
        self.conv = nn.Conv2d(3, 7, 3)
        self.point = nn.Conv2d(5, 7, 1)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.c1d = Conv1D(10, 8)
        self.norm = nn.BatchNorm1d(6)
        self.attn = nn.MultiheadAttention(8, 2)


LAYERS = {
    "lin": {"out": 6, "fan_in": 8},
    "conv": {"out": 7, "fan_in": (3, 3, 3)},
    "point": {"out": 7, "fan_in": (5, 1, 1)},
    "grouped": {"out": 6, "fan_in": (2, 3, 3), "groups": 2},
    "c1d": {"out": 10, "fan_in": 8},
}


@pytest.fixture
def base() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def tuned(base: Net) -> Net:
    """A copy, to be changed."""
    return copy.deepcopy(base)


def add_(module: nn.Module, delta: torch.Tensor) -> None:
    """Merge ΔW into a module; transformers' Conv1D has its weight transposed."""
    turned = delta.T if type(module).__name__ == "Conv1D" else delta
    module.weight.data.add_(turned.to(module.weight))


@pytest.mark.parametrize("path", LAYERS)
def test_what_was_merged_comes_out(base: Net, tuned: Net, layer: Make, dense64: Make, path: str) -> None:
    """To 1e-5, for each kind of layer; other layers are the same in both and stay out."""
    merged = layer(rank=2, scale=0.5, **LAYERS[path])
    add_(tuned.get_submodule(path), dense64(merged))
    result = extract(base, tuned, 2)
    assert list(result.adapter.components["model"]) == [path]
    got = result.adapter.components["model"][path]
    assert (got.a.shape, got.b.shape, got.a.dtype) == (merged.a.shape, merged.b.shape, torch.float32)
    torch.testing.assert_close(dense64(got), dense64(merged), rtol=1e-5, atol=1e-5)
    assert result.error < 1e-5
    assert result.skipped == {}


def test_what_merge_adapters_merged_comes_out(base: Net, tuned: Net, dense64: Make) -> None:
    config = ld.LoraConfig(r=2, target_modules=["lin", "c1d", "conv"], init_lora_weights=False)
    ld.add_adapter(tuned, config, "dog")
    ld.merge_adapters(tuned)
    result = extract(base, tuned, 2)
    merged = ld.get_adapter(tuned, "dog").components["model"]
    got = result.adapter.components["model"]
    assert set(got) == set(merged)
    for path, each in merged.items():
        torch.testing.assert_close(dense64(got[path]), dense64(each), rtol=1e-5, atol=1e-5)
    assert (result.skipped, result.adapter.notes) == ({}, [])


def test_it_does_what_the_tuned_model_does(base: Net, tuned: Net, layer: Make) -> None:
    """As an adapter beside the base's layer."""
    add_(tuned.lin, layer(rank=2).delta())
    ld.load_adapter(base, extract(base, tuned, 2).adapter)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(base.lin(x), tuned.lin(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", LAYERS)
def test_too_low_a_rank_is_the_best_of_it(base: Net, tuned: Net, layer: Make, dense64: Make, path: str) -> None:
    """The error is that of the singular values cut off, and it is what is reported."""
    merged = layer(rank=4, **LAYERS[path])
    add_(tuned.get_submodule(path), dense64(merged))
    result = extract(base, tuned, 2)
    wanted, groups = dense64(merged), LAYERS[path].get("groups", 1)
    sigma = torch.linalg.svdvals(wanted.reshape(groups, wanted.shape[0] // groups, -1))
    best = float(sigma[:, 2 // groups :].square().sum().sqrt() / wanted.norm())
    assert best > 0.1
    assert result.error == pytest.approx(best, rel=1e-4)
    rest = dense64(result.adapter.components["model"][path]) - wanted
    assert float(rest.norm() / wanted.norm()) == pytest.approx(best, rel=1e-4)


def test_energy_finds_the_rank(base: Net, tuned: Net, layer: Make) -> None:
    add_(tuned.lin, layer(rank=2).delta())
    add_(tuned.conv, layer(rank=3, **LAYERS["conv"]).delta())
    found = extract(base, tuned, 6, energy=1 - 1e-6).adapter.components["model"]
    assert {path: each.rank for path, each in found.items()} == {"lin": 2, "conv": 3}
    assert extract(base, tuned, 2, energy=1 - 1e-6).adapter.components["model"]["conv"].rank == 2


def test_rank_is_no_more_than_a_layer_has(base: Net, tuned: Net) -> None:
    tuned.point.weight.data.normal_()
    result = extract(base, tuned, 64)
    assert result.adapter.components["model"]["point"].rank == 5
    assert result.error < 1e-5


def test_half_precision(base: Net, tuned: Net, layer: Make) -> None:
    """A difference of float16 weights is taken in fp32; the factors' dtype is up to the caller."""
    base.half()
    tuned.half()
    add_(tuned.lin, layer(rank=2).delta())
    wanted = (tuned.lin.weight.float() - base.lin.weight.float()).detach()
    result = extract(base, tuned, 6, dtype=torch.float16)
    got = result.adapter.components["model"]["lin"]
    assert got.a.dtype == torch.float16
    assert float((got.delta() - wanted).norm() / wanted.norm()) == pytest.approx(result.error, rel=1e-3)
    assert 1e-5 < result.error < 1e-3


def test_dtypes_that_differ(base: Net, tuned: Net, layer: Make) -> None:
    """Rounding alone is no difference; with one, the report says that the difference holds rounding."""
    base.half()
    with pytest.raises(ld.AdapterMismatchError, match="the same weights"):
        extract(base, tuned, 2)
    add_(tuned.lin, layer(rank=2).delta())
    result = extract(base, tuned, 2)
    assert list(result.adapter.components["model"]) == ["lin"]
    assert result.adapter.notes == ["model is float16 in base and float32 in tuned: the difference holds rounding"]


class TestSkipped:
    def test_nothing_is_left_out_in_silence(self, base: Net, tuned: Net) -> None:
        for tensor in [*tuned.parameters(), *tuned.buffers()]:
            tensor.data.add_(1)
        result = extract(base, tuned, 3, target_modules=["lin", "grouped", "embed", "attn.out_proj"])
        assert list(result.adapter.components["model"]) == ["lin"]
        untargeted, kinds = "it is not among target_modules", "Linear, Conv2d and Conv1D"
        assert result.skipped == {
            "model.embed.weight": f"its module is of class Embedding, and only {kinds} layers are extracted",
            "model.lin.bias": "it is no weight matrix but the bias of class Linear",
            "model.conv.weight": untargeted,
            "model.conv.bias": "it is no weight matrix but the bias of class Conv2d",
            "model.point.weight": untargeted,
            "model.point.bias": "it is no weight matrix but the bias of class Conv2d",
            "model.grouped.weight": "it is a convolution in 2 groups, which cannot share r=3 evenly",
            "model.grouped.bias": "it is no weight matrix but the bias of class Conv2d",
            "model.c1d.weight": untargeted,
            "model.c1d.bias": "it is no weight matrix but the bias of class Conv1D",
            "model.norm.weight": "it is no weight matrix but the weight of class BatchNorm1d",
            "model.norm.bias": "it is no weight matrix but the bias of class BatchNorm1d",
            "model.norm.running_mean": "it is no weight matrix but the running_mean of class BatchNorm1d",
            "model.norm.running_var": "it is no weight matrix but the running_var of class BatchNorm1d",
            "model.attn.in_proj_weight": "it is no weight matrix but the in_proj_weight of class MultiheadAttention",
            "model.attn.in_proj_bias": "it is no weight matrix but the in_proj_bias of class MultiheadAttention",
            "model.attn.out_proj.weight": "its owner (nn.MultiheadAttention) uses its weight without calling it",
            "model.attn.out_proj.bias": "it is no weight matrix but the bias of class NonDynamicallyQuantizableLinear",
        }
        assert f"  left out 3, such as model.conv.weight: {untargeted}" in str(result).splitlines()

    def test_quantised_weights(self, base: Net, tuned: Net, layer: Make) -> None:
        """Packed in whole numbers, as bitsandbytes does: they are compared, and not taken for values."""
        add_(tuned.conv, layer(**LAYERS["conv"]).delta())
        for model, value in ((base, 1), (tuned, 2)):
            model.lin.weight = nn.Parameter(torch.full((6, 8), value, dtype=torch.uint8), requires_grad=False)
        assert extract(base, tuned, 2).skipped == {"model.lin.weight": "its weight is quantised (uint8)"}

    def test_a_module_of_two_names_comes_out_once(self, layer: Make) -> None:
        shared = nn.Linear(8, 6)
        before = nn.ModuleDict({"a": shared, "b": shared})
        after = copy.deepcopy(before)
        add_(after["a"], layer().delta())
        result = extract(before, after, 2)
        assert (list(result.adapter.components["model"]), result.skipped) == (["a"], {})

    def test_a_tied_embedding_is_named(self, layer: Make) -> None:
        """The head's half can be extracted, the embedding's cannot."""
        before = nn.ModuleDict({"embed": nn.Embedding(6, 8), "head": nn.Linear(8, 6, bias=False)})
        before["head"].weight = before["embed"].weight
        after = copy.deepcopy(before)
        add_(after["head"], layer().delta())
        result = extract(before, after, 2)
        assert list(result.adapter.components["model"]) == ["head"]
        assert list(result.skipped) == ["model.embed.weight"]

    def test_adapters_inside_are_not_weights(self, base: Net, tuned: Net, layer: Make) -> None:
        """An active adapter is no part of the difference until it is merged, nor a learned copy; the note says so."""
        config = ld.LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False, modules_to_save=["point"])
        ld.add_adapter(tuned, config, "dog")
        add_(tuned.conv, layer(**LAYERS["conv"]).delta())
        result = extract(base, tuned, 2)
        assert list(result.adapter.components["model"]) == ["conv"]
        assert result.skipped == {}
        assert result.adapter.notes == ["tuned has active adapters ('dog') that are not merged: they are not counted"]


class TestTargets:
    @pytest.fixture
    def changed(self, tuned: Net) -> Net:
        for path in LAYERS:
            tuned.get_submodule(path).weight.data.add_(torch.randn_like(tuned.get_submodule(path).weight))
        return tuned

    @pytest.mark.parametrize(
        ("targets", "paths"),
        [
            ("all", ["lin", "conv", "point", "grouped", "c1d"]),
            ("all-linear", ["lin", "c1d"]),
            (["lin", "point"], ["lin", "point"]),
            ("lin|co.*", ["lin", "conv"]),
        ],
    )
    def test_choose_layers(self, base: Net, changed: Net, targets: Any, paths: list[str]) -> None:
        assert list(extract(base, changed, 2, target_modules=targets).adapter.components["model"]) == paths

    def test_that_match_nothing(self, base: Net, changed: Net) -> None:
        with pytest.raises(ld.AdapterMismatchError, match=r"target_modules=\['lim'\] matches no module.*lin"):
            extract(base, changed, 2, target_modules=["lim"])


class TestPipeline:
    @pytest.fixture
    def changed(self, tiny_pipeline: Any) -> Any:
        """A copy with two attention projections of the UNet and one of the text encoder changed."""
        other = copy.copy(tiny_pipeline)
        other.unet, other.text_encoder = copy.deepcopy(tiny_pipeline.unet), copy.deepcopy(tiny_pipeline.text_encoder)
        g = torch.Generator().manual_seed(0)
        modules = [module for path, module in other.unet.named_modules() if path.endswith("attn1.to_q")][:2]
        modules += [m for path, m in other.text_encoder.named_modules() if path.endswith("layers.0.self_attn.q_proj")]
        for module in modules:
            module.weight.data.add_(torch.randn(module.weight.shape, generator=g) * 0.1)
        return other

    def test_all_components(self, tiny_pipeline: Any, changed: Any) -> None:
        """CLIP's paths are spelled as in files."""
        found = extract(tiny_pipeline, changed, 4).adapter.components
        assert list(found) == ["unet", "text_encoder"]
        assert list(found["text_encoder"]) == ["text_model.encoder.layers.0.self_attn.q_proj"]
        assert len(found["unet"]) == 2

    def test_one_component(self, tiny_pipeline: Any, changed: Any) -> None:
        found = extract(tiny_pipeline, changed, 4, components=["text_encoder"]).adapter.components
        assert list(found) == ["text_encoder"]

    def test_targets_need_not_be_in_every_component(self, tiny_pipeline: Any, changed: Any) -> None:
        result = extract(tiny_pipeline, changed, 4, target_modules="to_q")
        assert list(result.adapter.components) == ["unet"]
        assert list(result.skipped.values()) == ["it is not among target_modules"]

    def test_a_bare_unet_beside_a_pipeline(self, tiny_pipeline: Any, changed: Any) -> None:
        result = extract(tiny_pipeline.unet, changed, 4)
        assert list(result.adapter.components) == ["unet"]
        assert result.skipped == {"text_encoder": "only tuned has it"}

    def test_loads_and_acts(self, tiny_pipeline: Any, changed: Any, unet_output: Callable[..., torch.Tensor]) -> None:
        """At full rank the base with the adapter is the tuned model."""
        wanted, base = unet_output(changed.unet), unet_output(tiny_pipeline.unet)
        ld.load_adapter(tiny_pipeline, extract(tiny_pipeline, changed, 64).adapter)
        torch.testing.assert_close(unet_output(tiny_pipeline.unet), wanted, rtol=0, atol=1e-5)
        assert (base - wanted).abs().max() > 1e-4


class TestLarge:
    """Above EXACT_SIZE the SVD is a randomised iteration."""

    def test_up_to_512_it_is_exact(self) -> None:
        matrix = torch.randn(512, 520, generator=torch.Generator().manual_seed(0))
        _, s, _ = truncated_svd(matrix, 4)
        torch.testing.assert_close(s, torch.linalg.svdvals(matrix), rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("rank", [4, 32])
    def test_noise_is_fitted_almost_as_well_as_possible(self, rank: int) -> None:
        """Its worst case: no direction stands out."""
        matrix = torch.randn(600, 900, generator=torch.Generator().manual_seed(0))
        assert min(matrix.shape) > EXACT_SIZE
        u, s, vh = truncated_svd(matrix, rank)
        lost = (matrix - (u[:, :rank] * s[:rank]) @ vh[:rank]).norm()
        best = torch.linalg.svdvals(matrix)[rank:].norm()
        assert u.shape[1] < 600
        assert float(lost / best) < 1.0005

    def test_what_was_merged_comes_out(self, layer: Make) -> None:
        before = nn.ModuleDict({"x": nn.Linear(700, 600, bias=False)})
        after = copy.deepcopy(before)
        delta = layer(600, 700, 4, scale=0.01).delta()
        add_(after["x"], delta)
        state = torch.get_rng_state()
        result = extract(before, after, 4)
        assert torch.equal(torch.get_rng_state(), state)
        got = result.adapter.components["model"]["x"].delta()
        assert float((got - delta).norm() / delta.norm()) < 1e-5
        assert torch.equal(extract(before, after, 4).adapter.components["model"]["x"].delta(), got)


class TestErrors:
    def test_nothing_differs(self, base: Net, tuned: Net) -> None:
        with pytest.raises(ld.AdapterMismatchError, match="nothing to extract in model: base and tuned have the same"):
            extract(base, tuned, 2)

    def test_only_what_cannot_be_extracted_differs(self, base: Net, tuned: Net) -> None:
        tuned.lin.bias.data.add_(1)
        with pytest.raises(
            ld.AdapterMismatchError, match=r"model\.lin\.bias is left out: it is no weight matrix but the bias of"
        ):
            extract(base, tuned, 2)

    def test_another_layer(self, base: Net, tuned: Net) -> None:
        tuned.extra = nn.Linear(2, 2)
        with pytest.raises(ld.AdapterMismatchError, match=r"model\.extra is in tuned only: the architectures differ"):
            extract(base, tuned, 2)

    def test_another_shape(self, base: Net, tuned: Net) -> None:
        tuned.lin = nn.Linear(8, 7)
        with pytest.raises(ld.AdapterMismatchError, match=r"model\.lin is \(6, 8\) in base and \(7, 8\) in tuned"):
            extract(base, tuned, 2)

    def test_another_kind_of_model(self, base: Net, tiny_pipeline: Any) -> None:
        with pytest.raises(ld.AdapterMismatchError, match="no component in common: base has model, tuned unet"):
            extract(base, tiny_pipeline.unet, 2)

    def test_a_component_that_is_not_there(self, base: Net, tuned: Net) -> None:
        with pytest.raises(ld.AdapterMismatchError, match="no component 'unet'"):
            extract(base, tuned, 2, components="unet")

    def test_no_model(self, base: Net) -> None:
        with pytest.raises(ld.ConfigError, match="target is a str"):
            extract(base, "tuned", 2)

    def test_damaged(self, base: Net, tuned: Net) -> None:
        tuned.lin.weight.data[0, 0] = float("nan")
        with pytest.raises(ld.AdapterMismatchError, match=r"model\.lin\.weight holds NaN or infinity"):
            extract(base, tuned, 2)

    def test_no_values(self, base: Net, tuned: Net) -> None:
        with pytest.raises(ld.AdapterMismatchError, match=r"has no values \(it is on the meta device\)"):
            extract(base, tuned.to("meta"), 2)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"r": 0}, "r=0: a rank"),
            ({"r": 2, "energy": -1}, "energy=-1: give a share"),
            ({"r": 2, "dtype": torch.long}, "dtype=torch.int64"),
        ],
    )
    def test_settings(self, base: Net, tuned: Net, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ld.ConfigError, match=message):
            extract(base, tuned, **settings)
