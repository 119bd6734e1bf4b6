"""Sums of adapters against the dense sum in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_diffusion as ld
from lora_diffusion.adapter import Adapter, LowRank
from lora_diffusion.arithmetic import combine

Make = Callable[..., Any]
FORMS = {
    "linear": {"fan_in": 8},
    "conv": {"fan_in": (4, 3, 3)},
    "grouped conv": {"fan_in": (2, 3, 3), "groups": 2},
}


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(list(FORMS)),
    parts=st.lists(
        st.tuples(st.integers(1, 4), st.floats(-2, 2), st.sampled_from([1.0, 0.5, -3.0])), min_size=1, max_size=4
    ).filter(lambda parts: any(weight != 0 for _, weight, _ in parts)),
    method=st.sampled_from(["cat", "svd"]),
)
def test_sums_are_exact(layer: Make, adapter: Make, dense64: Make, form: str, parts: list[Any], method: str) -> None:
    """Σ w·ΔW for any ranks, scales and weights, zero and negative ones too; "svd" if its rank suffices."""
    layers = [
        layer(6, rank=2 * rank, scale=scale, seed=seed, dtype=torch.float64, **FORMS[form])
        for seed, (rank, _, scale) in enumerate(parts)
    ]
    weights = [weight for _, weight, _ in parts]
    rank = {} if method == "cat" else {"r": 64}
    result = combine([adapter({"x": each}) for each in layers], weights, method, **rank)
    wanted = sum(weight * dense64(each) for weight, each in zip(weights, layers))
    combined = result.adapter.components["unet"]["x"]
    torch.testing.assert_close(dense64(combined), wanted, rtol=1e-10, atol=1e-12)
    assert result.error < 1e-12
    if method == "cat":
        assert combined.rank == sum(each.rank for each, weight in zip(layers, weights) if weight != 0)


def test_weights_are_1_by_default(layer: Make, adapter: Make, dense64: Make) -> None:
    one, two = layer(seed=1), layer(seed=2, rank=3)
    result = combine([adapter({"x": one}), adapter({"x": two})])
    torch.testing.assert_close(dense64(result.adapter.components["unet"]["x"]), dense64(one) + dense64(two))


@pytest.mark.parametrize("form", FORMS)
def test_svd_is_the_best_of_its_rank(layer: Make, adapter: Make, dense64: Make, form: str) -> None:
    """The error is the tail of the dense sum's singular values, of each group on its own, and it is what is said."""
    layers = [layer(12, rank=4, seed=seed, dtype=torch.float64, **FORMS[form]) for seed in (1, 2)]
    result = combine([adapter({"x": each}) for each in layers], [1.0, -0.3], "svd", r=4)
    wanted = dense64(layers[0]) - 0.3 * dense64(layers[1])
    groups = FORMS[form].get("groups", 1)
    sigma = torch.linalg.svdvals(wanted.reshape(groups, 12 // groups, -1))
    tail = sigma[:, 4 // groups :].square().sum().sqrt()
    assert tail > 0.1
    combined = result.adapter.components["unet"]["x"]
    assert combined.rank == 4
    torch.testing.assert_close((dense64(combined) - wanted).norm(), tail, rtol=1e-10, atol=0)
    assert result.error == pytest.approx(float(tail / wanted.norm()), rel=1e-10)
    assert result.errors == {"unet": {"x": result.error}}


@pytest.mark.parametrize("method", ["svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_rank_is_the_largest_of_the_inputs_by_default(layer: Make, adapter: Make, method: str) -> None:
    ranks = [(2, 3), (4, 1)]
    adapters = [adapter({"x": layer(16, 16, x, seed=x), "y": layer(16, 16, y, seed=y)}) for x, y in ranks]
    combined = combine(adapters, method=method, generator=torch.Generator()).adapter
    assert {path: each.rank for path, each in combined.components["unet"].items()} == {"x": 4, "y": 3}


def test_layers_and_components_need_not_be_the_same(layer: Make, dense64: Make) -> None:
    """The order is that of first appearance, and an adapter counts where it has the layer."""
    one = Adapter({"unet": {"x": layer(seed=1), "y": layer(seed=2)}})
    two = Adapter({"unet": {"z": layer(seed=3), "y": layer(seed=4)}, "text_encoder": {"x": layer(3, 5, seed=5)}})
    combined = combine([one, two], [0.5, -1.0]).adapter
    assert {name: list(layers) for name, layers in combined.components.items()} == {
        "unet": ["x", "y", "z"],
        "text_encoder": ["x"],
    }
    wanted = {"x": 0.5 * dense64(one.components["unet"]["x"]), "z": -dense64(two.components["unet"]["z"])}
    wanted["y"] = 0.5 * dense64(one.components["unet"]["y"]) - dense64(two.components["unet"]["y"])
    for path, delta in wanted.items():
        torch.testing.assert_close(dense64(combined.components["unet"][path]), delta)


def test_an_adapter_of_weight_0_takes_no_part(layer: Make, adapter: Make) -> None:
    combined = combine([adapter({"x": layer()}), adapter({"x": layer(seed=1), "y": layer()})], [1, 0]).adapter
    assert {path: each.rank for path, each in combined.components["unet"].items()} == {"x": 2}


class TestDtype:
    def test_is_the_widest_of_the_inputs(self, layer: Make, adapter: Make) -> None:
        halves = [adapter({"x": layer(dtype=dtype)}) for dtype in (torch.float16, torch.bfloat16)]
        assert combine(halves[:1]).adapter.components["unet"]["x"].a.dtype == torch.float16
        assert combine(halves).adapter.components["unet"]["x"].b.dtype == torch.float32
        asked = combine(halves, dtype=torch.bfloat16).adapter.components["unet"]["x"]
        assert (asked.a.dtype, asked.b.dtype) == (torch.bfloat16, torch.bfloat16)

    def test_nothing_is_rounded_where_scales_agree(self, layer: Make, adapter: Make, dense64: Make) -> None:
        """Half-precision factors are joined as they are, under the scale and the size of weight that they share."""
        one, two = (layer(seed=seed, scale=0.3, dtype=torch.bfloat16) for seed in (1, 2))
        result = combine([adapter({"x": one}), adapter({"x": two})], [0.9, -0.9])
        wanted = 0.9 * dense64(one) - 0.9 * dense64(two)
        combined = result.adapter.components["unet"]["x"]
        torch.testing.assert_close(dense64(combined), wanted, rtol=1e-12, atol=1e-12)
        assert (combined.a.dtype, result.error) == (torch.bfloat16, 0.0)

    def test_rounding_is_part_of_the_error(self, layer: Make, adapter: Make, dense64: Make) -> None:
        one, two = (layer(seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
        result = combine([adapter({"x": one}), adapter({"x": two})], [0.9, 0.35])
        wanted = 0.9 * dense64(one) + 0.35 * dense64(two)
        error = (dense64(result.adapter.components["unet"]["x"]) - wanted).norm() / wanted.norm()
        assert result.error == pytest.approx(float(error), rel=1e-6)
        assert 1e-4 < result.error < 4e-3

    def test_rounding_to_fp32_is_reported_too(self, layer: Make, adapter: Make, dense64: Make) -> None:
        one, two = layer(seed=1), layer(seed=2)
        result = combine([adapter({"x": one}), adapter({"x": two})], [0.9, 0.35])
        wanted = 0.9 * dense64(one) + 0.35 * dense64(two)
        error = (dense64(result.adapter.components["unet"]["x"]) - wanted).norm() / wanted.norm()
        assert result.error == pytest.approx(float(error), rel=1e-4)
        assert 1e-9 < result.error < 1e-7

    def test_too_large_for_half_precision(self, layer: Make, adapter: Make) -> None:
        with pytest.raises(ld.ConfigError, match=r"unet\.x is too large for float16: give dtype=torch\.float32"):
            combine([adapter({"x": layer(scale=1e6)}), adapter({"x": layer(scale=1.0)})], dtype=torch.float16)


def test_an_adapter_less_itself_is_nothing(layer: Make, adapter: Make, dense64: Make) -> None:
    """Rounding of what cancels is not reported as an error of 100 %."""
    one = adapter({"x": layer(), "y": layer(scale=0.0)})
    for method in ("cat", "svd", "ties", "magnitude_prune"):
        result = combine([one, one], [1, -1], method)
        assert dense64(result.adapter.components["unet"]["x"]).abs().max() < 1e-6
        assert result.error == 0.0


def test_errors_are_of_each_layer_and_of_all_together(layer: Make, adapter: Make, dense64: Make) -> None:
    adapters = [
        adapter({"x": layer(16, 16, 2, scale=scale, seed=seed), "y": layer(5, 9, 2, seed=seed + 9)})
        for seed, scale in ((1, 1.0), (2, 3.0))
    ]
    result = combine(adapters, [1, 1], "svd", r=2)
    lost, asked = 0.0, 0.0
    for path, error in result.errors["unet"].items():
        wanted = sum(dense64(each.components["unet"][path]) for each in adapters)
        rest = dense64(result.adapter.components["unet"][path]) - wanted
        assert error == pytest.approx(float(rest.norm() / wanted.norm()), rel=1e-6)
        lost, asked = lost + float(rest.square().sum()), asked + float(wanted.square().sum())
    assert result.error == pytest.approx((lost / asked) ** 0.5, rel=1e-6)


class TestLarge:
    def test_sums_never_form_the_matrix(self, layer: Make, adapter: Make, largest_tensor: Any) -> None:
        """20,000 × 20,000 is 1.6 GB in fp32; no tensor on the way is larger than the factors side by side."""
        layers = [layer(20_000, 20_000, 4, seed=seed) for seed in (1, 2)]
        for method, rank in (("cat", None), ("svd", 4)):
            with largest_tensor:
                result = combine([adapter({"x": each}) for each in layers], [1, -0.5], method, r=rank)
            combined = result.adapter.components["unet"]["x"]
            assert combined.rank == (rank or 8)
            # the stacked factors of the sum and of the result, beside each other
            assert 20_000 * 8 <= largest_tensor.elements <= 20_000 * 16
            rows = [int(row) for row in torch.linspace(0, 19_999, 50)]
            if method == "cat":
                wanted = sum(w * one.scale * one.b[rows] @ one.a[:, rows] for w, one in zip((1, -0.5), layers))
                got = combined.scale * combined.b[rows] @ combined.a[:, rows]
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            else:
                # so wide, random directions are all but orthogonal: what is lost is the half of the pair
                assert result.error == pytest.approx(0.5 / 1.25**0.5, rel=0.05)

    def test_the_watch_would_notice(self, largest_tensor: Any) -> None:
        with largest_tensor:
            _ = torch.zeros(300, 1) @ torch.zeros(1, 300)
        assert largest_tensor.elements == 90_000


class TestResult:
    def test_says_how_it_came_about(self, layer: Make, adapter: Make) -> None:
        one = adapter({"x": layer()}, metadata={"base_model": "sd", "prompt": "a dog"}, notes=["alpha assumed"])
        two = adapter({"x": layer(seed=1)}, metadata={"base_model": "sd", "prompt": "a cat"}, notes=["alpha assumed"])
        combined = combine([one, two], [0.5, -1], "ties", r=2, density=0.3, metadata={"title": "both"}).adapter
        assert json.loads(json.dumps(combined.metadata, allow_nan=False)) == {
            "base_model": "sd",
            "title": "both",
            "combined": {
                "method": "ties",
                "r": 2,
                "density": 0.3,
                "majority_sign_method": "total",
                "adapters": [
                    {"weight": 0.5, "layers": 1, "metadata": {"base_model": "sd", "prompt": "a dog"}},
                    {"weight": -1.0, "layers": 1, "metadata": {"base_model": "sd", "prompt": "a cat"}},
                ],
            },
        }
        assert combined.notes == ["alpha assumed"]

    def test_what_was_done_to_an_input_is_not_said_of_the_result(self, layer: Make, adapter: Make) -> None:
        resized = [adapter({"x": layer(seed=seed)}, metadata={"resized": {"r": 2}}) for seed in (1, 2)]
        metadata = combine(resized).adapter.metadata
        assert list(metadata) == ["combined"]
        assert metadata["combined"]["adapters"][0]["metadata"] == {"resized": {"r": 2}}

    def test_configs_describe_the_tensors(self, layer: Make, adapter: Make) -> None:
        combined = combine([adapter({"x": layer(rank=2)}), adapter({"x": layer(rank=3), "y": layer(rank=1)})]).adapter
        config = combined.configs["unet"]
        assert {path: config.rank_for(path) for path in ("x", "y")} == {"x": 5, "y": 1}
        for path, each in combined.components["unet"].items():
            assert config.scale_for(path) == pytest.approx(each.scale)

    def test_shares_nothing_with_the_inputs(self, layer: Make, adapter: Make) -> None:
        one = adapter({"x": layer(dtype=torch.float64, scale=1.0)}, metadata={"tags": ["a"]})
        before = one.components["unet"]["x"].a.clone()
        combined = combine([one]).adapter
        combined.components["unet"]["x"].a.zero_()
        combined.metadata["tags"].append("b")
        assert torch.equal(one.components["unet"]["x"].a, before)
        assert one.metadata == {"tags": ["a"]}

    def test_reads_well(self, layer: Make, adapter: Make) -> None:
        one = adapter({"x": layer(16, 16, 2, seed=1), "y": layer(16, 16, 1, seed=2)}, notes=["alpha assumed"])
        two = adapter({"x": layer(16, 16, 2, seed=3)})
        result = combine([one, two], method="svd")
        assert str(result).splitlines() == [
            f"2 layers, relative error {result.error:.2g}",
            f"  unet: 2 layers, ranks 1 to 2, largest error {result.errors['unet']['x']:.2g} at x",
            "  note: alpha assumed",
        ]

    def test_goes_through_a_file_into_a_model(self, layer: Make, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(8, 6, bias=False))
        parts = [Adapter({"model": {"0": layer(seed=seed, scale=0.1)}}) for seed in (1, 2)]
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        wanted = model(x) + sum(w * x @ each.components["model"]["0"].delta().T for w, each in zip((2, -1), parts))
        ld.write_adapter(combine(parts, [2, -1]).adapter, tmp_path / "sum.safetensors")
        ld.load_adapter(model, tmp_path / "sum.safetensors")
        torch.testing.assert_close(model(x), wanted)


class TestErrors:
    def test_shapes_differ(self, layer: Make, adapter: Make) -> None:
        with pytest.raises(ld.AdapterMismatchError, match=r"unet\.x updates a weight of \(6, 8\).*and of \(6, 9\)"):
            combine([adapter({"x": layer()}), adapter({"x": layer(fan_in=9)})])

    def test_linear_and_convolution(self, layer: Make, adapter: Make) -> None:
        with pytest.raises(ld.AdapterMismatchError, match=r"of \(6, 8\).*and of \(6, 8, 1, 1\)"):
            combine([adapter({"x": layer()}), adapter({"x": layer(fan_in=(8, 1, 1))})], method="svd")

    @pytest.mark.parametrize("method", ["cat", "svd", "ties"])
    def test_dora(self, layer: Make, adapter: Make, method: str) -> None:
        plain = layer()
        dora = LowRank(plain.a, plain.b, plain.scale, magnitude=torch.ones(6))
        with pytest.raises(ld.AdapterMismatchError, match=r"unet\.x is a DoRA layer.*merge it first"):
            combine([adapter({"x": plain}), adapter({"x": dora})], method=method)

    def test_learned_copies(self, layer: Make, adapter: Make) -> None:
        whole = adapter({"x": layer()}, copies={"unet": {"head": {"weight": torch.ones(2, 2)}}})
        with pytest.raises(
            ld.AdapterMismatchError, match=r"a whole module of its own for unet\.head, which has no sum"
        ):
            combine([adapter({"x": layer()}), whole])

    def test_factors_that_do_not_fit(self, adapter: Make) -> None:
        broken = LowRank(torch.zeros(3, 8), torch.zeros(6, 2))
        with pytest.raises(ld.AdapterMismatchError, match=r"unet\.x .* do not fit each other: A \(3, 8\), B \(6, 2\)"):
            combine([adapter({"x": broken})])

    def test_damaged(self, layer: Make, adapter: Make) -> None:
        broken = layer()
        broken.a[0, 0] = float("nan")
        with pytest.raises(ld.AdapterFormatError, match=r"unet\.x holds NaN or infinity"):
            combine([adapter({"x": broken})])

    def test_no_layers(self) -> None:
        with pytest.raises(ld.AdapterMismatchError, match="nothing to combine"):
            combine([Adapter({})])

    @pytest.mark.parametrize("adapters", [[], None])
    def test_no_adapters(self, adapters: Any) -> None:
        with pytest.raises(ld.ConfigError, match="give a list of at least one Adapter"):
            combine(adapters)

    def test_a_result_is_no_adapter(self, layer: Make, adapter: Make) -> None:
        with pytest.raises(ld.ConfigError, match=r"adapters\[1\] is a Derived: give an Adapter.*\.adapter of a result"):
            combine([adapter({"x": layer()}), combine([adapter({"x": layer()})])])  # type: ignore[list-item]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"weights": [1.0]}, "2 adapters and 1 weights"),
            ({"weights": [1.0, float("nan")]}, "nan is no finite number"),
            ({"weights": [1.0, "2"]}, "'2' is no finite number"),
            ({"weights": [0, 0.0]}, "nothing is left"),
            ({"method": "average"}, "method='average': the methods are cat, svd, ties"),
            ({"method": "linear"}, 'for PEFT\'s "linear" take "cat"'),
            ({"method": None}, "method=None"),
            ({"r": 4}, 'r=4: method="cat" keeps all ranks'),
            ({"method": "svd", "r": 0}, "r=0: a rank is a whole number from 1 to 8192"),
            ({"method": "svd", "r": 2.0}, "r=2.0: a rank"),
            ({"method": "ties", "density": 0.0}, "density=0.0: give a share above 0 and up to 1"),
            ({"method": "ties", "density": 1.5}, "density=1.5"),
            ({"method": "ties", "majority_sign_method": "most"}, "majority_sign_method='most': give 'total' or"),
            ({"dtype": torch.int8}, "dtype=torch.int8: give a floating-point"),
        ],
    )
    def test_settings(self, layer: Make, adapter: Make, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ld.ConfigError) as caught:
            combine([adapter({"x": layer()}), adapter({"x": layer()})], **settings)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_rank_that_groups_cannot_share(self, layer: Make, adapter: Make) -> None:
        grouped = layer(6, (2, 3, 3), 4, groups=2)
        with pytest.raises(ld.ConfigError, match=r"r=3: unet\.x is in 2 groups and needs a multiple of 2"):
            combine([adapter({"x": grouped})], method="svd", r=3)

    def test_cat_beyond_the_highest_rank(self, layer: Make, adapter: Make) -> None:
        wide = adapter({"x": layer(2, 2, 5000)})
        with pytest.raises(ld.ConfigError, match=r'unet\.x rank 10,000, beyond 8,192: take "svd"'):
            combine([wide, wide])
