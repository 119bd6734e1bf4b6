"""Other ranks, against the singular values of the dense ΔW in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_diffusion as ld
from lora_diffusion.adapter import Adapter, LowRank
from lora_diffusion.arithmetic import resize

Make = Callable[..., Any]


def only(result: Any) -> LowRank:
    (layer,) = result.adapter.components["unet"].values()
    return layer


@settings(max_examples=60, deadline=None)
@given(
    old=st.integers(1, 7),
    new=st.integers(1, 10),
    groups=st.sampled_from([1, 2]),
    fan_in=st.sampled_from([(5,), (2, 3, 3)]),
    scale=st.sampled_from([1.0, 0.3, -2.0]),
)
def test_every_rank_is_reached_with_the_least_error(
    layer: Make, adapter: Make, dense64: Make, old: int, new: int, groups: int, fan_in: tuple[int, ...], scale: float
) -> None:
    """The error is the norm of the singular values that are cut off (of each group), and it is what is reported."""
    if len(fan_in) == 1:
        groups = 1
    one = layer(6, fan_in, old * groups, groups=groups, scale=scale, dtype=torch.float64)
    result = resize(adapter({"x": one}), new * groups)
    resized, wanted = only(result), dense64(one)
    assert resized.rank == new * groups
    assert (resized.a.shape[1:], resized.b.shape[2:]) == (one.a.shape[1:], one.b.shape[2:])
    sigma = torch.linalg.svdvals(wanted.reshape(groups, 6 // groups, -1))
    tail = float(sigma[:, new:].square().sum().sqrt())
    assert float((dense64(resized) - wanted).norm()) == pytest.approx(tail, rel=1e-9, abs=1e-11)
    assert result.error == pytest.approx(tail / float(wanted.norm()), rel=1e-9, abs=1e-11)
    if new >= old:
        assert result.error == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [3, 5])
def test_growing_keeps_the_factors(layer: Make, adapter: Make, dtype: torch.dtype, rank: int) -> None:
    """Bit for bit, with zeros below and beside them; nothing is rounded in any dtype."""
    one = layer(rank=3, scale=0.3, dtype=dtype)
    result = resize(adapter({"x": one}), rank)
    grown = only(result)
    assert torch.equal(grown.a[:3], one.a)
    assert torch.equal(grown.b[:, :3], one.b)
    assert not grown.a[3:].any()
    assert not grown.b[:, 3:].any()
    assert (grown.rank, grown.scale, grown.a.dtype, result.error) == (rank, 0.3, dtype, 0.0)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float16, 1e-6, 1e-3), (torch.bfloat16, 1e-5, 8e-3)])
def test_dtype_is_kept_and_its_rounding_reported(
    layer: Make, adapter: Make, dense64: Make, dtype: torch.dtype, least: float, most: float
) -> None:
    """A rank-2 update written with rank 4: only rounding is lost, and the report is the true figure."""
    two = layer(12, 12, 2, dtype=dtype)
    one = LowRank(torch.cat([two.a, two.a]), torch.cat([two.b, two.b], 1), 0.5)
    result = resize(adapter({"x": one}), 2)
    resized, wanted = only(result), dense64(one)
    assert (resized.a.dtype, resized.b.dtype) == (dtype, dtype)
    assert least < result.error < most
    assert result.error == pytest.approx(float((dense64(resized) - wanted).norm() / wanted.norm()), rel=1e-9)
    assert resize(adapter({"x": one}), 2, dtype=torch.float32).error < 1e-6


class TestEnergy:
    @settings(max_examples=40, deadline=None)
    @given(energy=st.floats(0.05, 1.0), cap=st.sampled_from([None, 1, 3, 20]), seed=st.integers(0, 100))
    def test_is_the_smallest_rank_that_keeps_it(
        self, layer: Make, adapter: Make, dense64: Make, energy: float, cap: int | None, seed: int
    ) -> None:
        one = layer(9, 11, 6, seed=seed, dtype=torch.float64)
        squares = torch.linalg.svdvals(dense64(one)).square()
        shares = squares.cumsum(0) / squares.sum()
        wanted = next(rank for rank in range(1, 7) if rank == 6 or shares[rank - 1] >= energy)
        assert only(resize(adapter({"x": one}), cap, energy=energy)).rank == min(wanted, cap or 6)

    def test_all_of_it_is_the_true_rank(self, layer: Make, adapter: Make, dense64: Make) -> None:
        two = layer(9, 11, 2)
        one = LowRank(torch.cat([two.a, 3 * two.a]), torch.cat([two.b, two.b], 1), 0.5)
        result = resize(adapter({"x": one}), energy=1.0)
        assert only(result).rank == 2
        assert result.error < 1e-6
        torch.testing.assert_close(dense64(only(result)), dense64(one), rtol=1e-5, atol=1e-5)

    def test_layers_get_ranks_of_their_own(self, layer: Make, adapter: Make) -> None:
        flat = LowRank(torch.eye(4, 8), torch.eye(6, 4))
        steep = LowRank(torch.eye(4, 8), torch.eye(6, 4) * torch.tensor([10.0, 1, 1, 1]))
        result = resize(adapter({"flat": flat, "steep": steep}), energy=0.75)
        assert {path: each.rank for path, each in result.adapter.components["unet"].items()} == {"flat": 3, "steep": 1}
        assert result.errors["unet"] == pytest.approx({"flat": 0.5, "steep": (3 / 103) ** 0.5})
        config = result.adapter.configs["unet"]
        assert (config.rank_for("flat"), config.rank_for("steep")) == (3, 1)

    def test_an_update_of_zero(self, layer: Make, adapter: Make) -> None:
        """As after `add_adapter`, with B zero: rank 1 of nothing, and no error."""
        result = resize(adapter({"x": LowRank(layer().a, torch.zeros(6, 2))}), energy=0.9)
        assert (only(result).rank, result.error) == (1, 0.0)
        assert not only(result).b.any()

    def test_groups_share_a_rank(self, layer: Make, adapter: Make, dense64: Make) -> None:
        one = layer(8, (2, 3, 3), 6, groups=2, dtype=torch.float64)
        squares = torch.linalg.svdvals(dense64(one).reshape(2, 4, -1)).square().sum(0)
        energy = float(squares[:2].sum() / squares.sum()) - 1e-9
        assert only(resize(adapter({"x": one}), energy=energy)).rank == 4
        assert only(resize(adapter({"x": one}), energy=energy + 2e-9)).rank == 6


class TestMapping:
    def test_names_suffixes_and_regexes(self, layer: Make, adapter: Make) -> None:
        layers = {path: layer(16, 16, 8) for path in ("a.to_q", "b.to_q", "b.to_v", "b.to_k")}
        resized = resize(adapter(layers), {"a.to_q": 2, "to_q": 3, r".*to_[v]": 12}).adapter.components["unet"]
        assert {path: each.rank for path, each in resized.items()} == {
            "a.to_q": 2,
            "b.to_q": 3,
            "b.to_v": 12,
            "b.to_k": 8,
        }
        assert torch.equal(resized["b.to_k"].a, layers["b.to_k"].a)

    def test_caps_energy(self, layer: Make, adapter: Make) -> None:
        layers = {"x": LowRank(torch.eye(4, 8), torch.eye(6, 4)), "y": LowRank(torch.eye(4, 8), torch.eye(6, 4))}
        resized = resize(adapter(layers), {"x": 2}, energy=0.75).adapter.components["unet"]
        assert {path: each.rank for path, each in resized.items()} == {"x": 2, "y": 3}


@pytest.mark.parametrize("settings", [{"r": 2}, {"r": 16}, {"energy": 0.9}])
def test_the_matrix_is_never_formed(layer: Make, adapter: Make, largest_tensor: Any, settings: dict[str, Any]) -> None:
    """20,000 × 20,000 at rank 8: nothing on the way is larger than the factors of both results side by side."""
    one = layer(20_000, 20_000, 8)
    with largest_tensor:
        result = resize(adapter({"x": one}), **settings)
    assert 20_000 * 8 <= largest_tensor.elements <= 20_000 * (8 + only(result).rank)
    assert 0.0 <= result.error < 0.9


class TestResult:
    def test_keeps_what_stays_true(self, layer: Make) -> None:
        foreign = {"ss_network_dim": "2", "ss_network_alpha": "1", "sshs_model_hash": "ab", "ss_tag_frequency": "{}"}
        one = Adapter({"unet": {"x": layer()}}, {}, {"base_model": "sd"}, foreign, "kohya", ["alpha assumed"])
        result = resize(one, 1, energy=0.5).adapter
        assert result.metadata == {"base_model": "sd", "resized": {"r": 1, "energy": 0.5}}
        assert (result.foreign, result.notes, result.dialect) == ({"ss_tag_frequency": "{}"}, ["alpha assumed"], None)
        assert one.metadata == {"base_model": "sd"}

    def test_components_stay(self, layer: Make) -> None:
        one = Adapter({"unet": {"x": layer()}, "text_encoder": {"y": layer(seed=1)}})
        result = resize(one, 1)
        assert {name: list(layers) for name, layers in result.adapter.components.items()} == {
            "unet": ["x"],
            "text_encoder": ["y"],
        }
        assert {name: list(errors) for name, errors in result.errors.items()} == {"unet": ["x"], "text_encoder": ["y"]}

    def test_learned_copies_stay(self, layer: Make, adapter: Make) -> None:
        head = torch.ones(2, 2)
        kept = resize(adapter({"x": layer()}, copies={"unet": {"head": {"weight": head}}}), 1).adapter
        assert torch.equal(kept.copies["unet"]["head"]["weight"], head)
        assert kept.copies["unet"]["head"]["weight"] is not head
        assert kept.configs["unet"].modules_to_save == ["head"]

    @pytest.mark.parametrize("settings", [{"r": 1}, {"r": 2}, {"r": 3}, {"energy": 1.0}, {"r": {"x": 2}}])
    def test_shares_nothing_with_the_input(self, layer: Make, adapter: Make, settings: dict[str, Any]) -> None:
        one = layer(dtype=torch.float64, scale=1.0)
        a, b = one.a.clone(), one.b.clone()
        resized = only(resize(adapter({"x": one}), **settings))
        resized.a.zero_()
        resized.b.zero_()
        assert torch.equal(one.a, a)
        assert torch.equal(one.b, b)

    def test_factors_that_require_gradients(self, layer: Make, adapter: Make) -> None:
        one = layer()
        one.a.requires_grad_()
        assert not only(resize(adapter({"x": one}), 1)).a.requires_grad


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "r and energy are both None"),
            ({"r": 0}, "r=0: a rank is a whole number from 1 to 8192"),
            ({"r": True}, "r=True"),
            ({"r": 9000}, "r=9000"),
            ({"r": {"x": "4"}}, r"r['x']='4'"),
            ({"energy": 0}, "energy=0: give a share above 0 and up to 1"),
            ({"energy": 1.01}, "energy=1.01"),
            ({"r": 1, "dtype": torch.int32}, "dtype=torch.int32: give a floating-point"),
        ],
    )
    def test_settings(self, layer: Make, adapter: Make, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ld.ConfigError) as caught:
            resize(adapter({"x": layer()}), **arguments)
        assert message in str(caught.value)

    def test_pattern_that_fits_nothing(self, layer: Make, adapter: Make) -> None:
        with pytest.raises(ld.AdapterMismatchError, match=r"r: 'to_w' fits no layer.*nearest names are to_[qv]"):
            resize(adapter({"a.to_q": layer(), "a.to_v": layer()}), {"to_w": 2})

    def test_rank_that_groups_cannot_share(self, layer: Make, adapter: Make) -> None:
        with pytest.raises(ld.ConfigError, match=r"r=3: unet\.x is in 2 groups and needs a multiple of 2"):
            resize(adapter({"x": layer(6, (2, 3, 3), 4, groups=2)}), 3)

    def test_dora(self, layer: Make, adapter: Make) -> None:
        dora = LowRank(layer().a, layer().b, magnitude=torch.ones(6))
        with pytest.raises(ld.AdapterMismatchError, match=r"unet\.x is a DoRA layer"):
            resize(adapter({"x": dora}), 1)

    def test_damaged(self, layer: Make, adapter: Make) -> None:
        broken = layer()
        broken.b[0, 0] = float("inf")
        with pytest.raises(ld.AdapterFormatError, match=r"unet\.x holds NaN or infinity"):
            resize(adapter({"x": broken}), 1)

    def test_no_layers(self) -> None:
        with pytest.raises(ld.AdapterMismatchError, match="nothing to resize"):
            resize(Adapter({}), 1)

    def test_a_result_is_no_adapter(self, layer: Make, adapter: Make) -> None:
        with pytest.raises(ld.ConfigError, match="adapter is a Derived: give an Adapter"):
            resize(resize(adapter({"x": layer()}), 1), 1)  # type: ignore[arg-type]
