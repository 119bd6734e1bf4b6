"""TIES, DARE and magnitude pruning: their definitions entry by entry, PEFT's functions, and their properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diffusion.adapter import LowRank
from lora_diffusion.arithmetic import combine
from lora_diffusion.arithmetic.interference import drop_random, elected_mean, keep_largest

Make = Callable[..., Any]
FULL = 24  # the rank at which nothing is compressed in the layers below


def exact_layer(seed: int, out: int = 24, wide: int = 30, rank: int = 3) -> LowRank:
    """Whole numbers in the factors, so that ΔW is exact in fp32, and entries do not differ by rounding."""
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-900, 900, shape, generator=g).float() for shape in ((rank, wide), (out, rank)))
    return LowRank(a, b, 1.0)


def by_definition(deltas: list[torch.Tensor], weights: list[float], majority: str) -> torch.Tensor:
    """TIES' election and mean, in plain Python; what has weight 0 has no say, and a draw in the sum elects nothing."""
    result = torch.zeros(deltas[0].shape, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in result.shape)).tolist():
        entries = [(float(d[tuple(index)]), w) for d, w in zip(deltas, weights) if w != 0]
        directed = [entry if w > 0 else -entry for entry, w in entries]
        votes = directed if majority == "total" else [(entry > 0) - (entry < 0) for entry in directed]
        elected = sum(votes) or sum(directed)
        agreeing = [entry * w for (entry, w), d in zip(entries, directed) if d * elected > 0]
        result[tuple(index)] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.7, 0.2, 1.5], [1.0, -0.4, 0.8], [1, 0, 2]])
def test_ties_by_its_definition(adapter: Make, dense64: Make, majority: str, weights: list[float]) -> None:
    """Trim, elect, average, then the SVD, which loses nothing at full rank."""
    layers = [exact_layer(seed, 6, 7) for seed in range(3)]
    result = combine(
        [adapter({"x": each}) for each in layers], weights, "ties", r=6, density=0.4, majority_sign_method=majority
    )
    trimmed = []
    for delta in map(dense64, layers):
        threshold = delta.abs().flatten().sort(descending=True).values[int(0.4 * 42) - 1]
        trimmed.append(torch.where(delta.abs() >= threshold, delta, 0.0))
    wanted = by_definition(trimmed, weights, majority)
    got = dense64(result.adapter.components["unet"]["x"])
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5
    assert result.error < 1e-5


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    st.lists(st.sampled_from([-1.5, 0.5, 2.0]), min_size=4, max_size=4),
    st.sampled_from(["total", "frequency"]),
)
def test_elections_by_their_definition(rows: list[list[int]], weights: list[float], majority: str) -> None:
    """Draws and zeros are frequent among small whole numbers."""
    deltas = [torch.tensor(row, dtype=torch.float32).view(2, 3) for row in rows]
    wanted = by_definition(deltas, weights[: len(rows)], majority)
    got = elected_mean(deltas, weights[: len(rows)], majority)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)


class TestPeft:
    """The same result as PEFT's functions on the dense updates, and PEFT's own "…_svd" of a whole layer."""

    @pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
    @pytest.mark.parametrize("density", [0.2, 0.5, 0.83])
    @pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.9, 0.3, 1.4]])
    def test_same_sum(self, adapter: Make, dense64: Make, method: str, density: float, weights: list[float]) -> None:
        """DARE draws the same mask from the same seed."""
        from peft.utils import merge_utils

        layers = [exact_layer(seed) for seed in range(3)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            wanted = getattr(merge_utils, method)([each.delta() for each in layers], torch.tensor(weights), density)
        result = combine(
            [adapter({"x": each}) for each in layers],
            weights,
            method,
            r=FULL,
            density=density,
            generator=torch.Generator().manual_seed(5),
        )
        got = dense64(result.adapter.components["unet"]["x"])
        assert float((got - wanted).norm() / wanted.norm()) < 1e-5
        assert result.error < 1e-5

    def test_same_frequencies(self, adapter: Make, dense64: Make) -> None:
        """Where there is no draw: three adapters, nothing trimmed."""
        from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

        layers = [exact_layer(seed) for seed in range(3)]
        deltas = torch.stack([each.delta() for each in layers])
        assert (deltas != 0).all()
        wanted = disjoint_merge(deltas, calculate_majority_sign_mask(deltas, "frequency"))
        result = combine(
            [adapter({"x": each}) for each in layers],
            method="ties",
            density=1.0,
            majority_sign_method="frequency",
            r=FULL,
        )
        got = dense64(result.adapter.components["unet"]["x"])
        assert float((got - wanted).norm() / wanted.norm()) < 1e-5

    @pytest.mark.parametrize("fan_in", [(12,), (4, 3, 3)])
    @pytest.mark.parametrize("method", ["svd", "ties_svd", "magnitude_prune_svd"])
    def test_same_adapter(self, layer: Make, adapter: Make, dense64: Make, method: str, fan_in: tuple[int]) -> None:
        """add_weighted_adapter, compressed to rank 3; PEFT's names are understood."""
        import peft

        module = torch.nn.Linear(12, 9) if len(fan_in) == 1 else torch.nn.Conv2d(4, 9, 3)
        model = torch.nn.Sequential(module)
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"]), "one")
        theirs.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=2, target_modules=["0"]))
        layers = [layer(9, fan_in, 2, scale=1.5, seed=1), layer(9, fan_in, 3, scale=2 / 3, seed=2)]
        inner = theirs.base_model.model[0]
        for name, each in zip(("one", "two"), layers):
            inner.lora_A[name].weight.data.copy_(each.a)
            inner.lora_B[name].weight.data.copy_(each.b)
        theirs.add_weighted_adapter(["one", "two"], [0.8, 0.5], "sum", combination_type=method, svd_rank=3, density=0.6)
        result = combine([adapter({"x": each}) for each in layers], [0.8, 0.5], method, r=3, density=0.6)
        got = dense64(result.adapter.components["unet"]["x"])
        torch.testing.assert_close(got.float(), inner.get_delta_weight("sum"), rtol=0, atol=1e-4)
        assert result.error > 0.05


class TestPruning:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 1000))
    def test_keeps_the_largest(self, size: int, density: float, seed: int) -> None:
        delta = torch.randn(1, 1, size, generator=torch.Generator().manual_seed(seed))
        kept = keep_largest(delta, density)
        chosen = kept != 0
        assert int(chosen.sum()) == max(1, int(density * size))
        assert torch.equal(kept[chosen], delta[chosen])
        if not chosen.all():
            assert delta[chosen].abs().min() >= delta[~chosen].abs().max()

    def test_dropping_keeps_the_expectation(self) -> None:
        """A share of entries stays, each divided by that share: the mean over many draws is the update."""
        delta = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0))
        g = torch.Generator().manual_seed(1)
        draws = torch.stack([drop_random(delta, 0.3, g) for _ in range(4000)])
        kept = draws != 0
        torch.testing.assert_close(draws[kept], (delta / 0.3).expand_as(draws)[kept])
        assert float(kept.float().mean()) == pytest.approx(0.3, abs=0.01)
        # 0.76 standard deviations per unit of ΔW and √4000 draws: 6 of them are 0.15
        assert float(((draws.mean(0) - delta) / delta).abs().max()) < 0.15

    def test_density_1_prunes_nothing(self, adapter: Make, dense64: Make) -> None:
        layers = [exact_layer(seed) for seed in (1, 2)]
        wanted = dense64(layers[0]) * 2 - dense64(layers[1])
        for method in ("magnitude_prune", "dare_linear"):
            result = combine([adapter({"x": each}) for each in layers], [2, -1], method, density=1.0, r=6)
            got = dense64(result.adapter.components["unet"]["x"])
            assert float((got - wanted).norm() / wanted.norm()) < 1e-5


class TestProperties:
    def test_one_adapter_untrimmed_is_itself(self, adapter: Make, dense64: Make) -> None:
        one = exact_layer(0)
        result = combine([adapter({"x": one})], method="ties", density=1.0)
        got = dense64(result.adapter.components["unet"]["x"])
        assert float((got - dense64(one)).norm() / dense64(one).norm()) < 1e-6

    @pytest.mark.parametrize("method", ["ties", "dare_ties"])
    def test_a_negative_weight_is_the_negated_adapter(self, adapter: Make, dense64: Make, method: str) -> None:
        one, two = exact_layer(1), exact_layer(2)
        negated = LowRank(two.a, -two.b)
        results = [
            combine(
                [adapter({"x": one}), adapter({"x": other})],
                [1, weight],
                method,
                generator=torch.manual_seed(0),
                r=FULL,
            )
            for other, weight in ((two, -0.5), (negated, 0.5))
        ]
        first, second = (dense64(result.adapter.components["unet"]["x"]) for result in results)
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4 * float(first.abs().max()))

    @pytest.mark.parametrize("majority", ["total", "frequency"])
    def test_negating_all_negates_the_result(self, majority: str) -> None:
        """Also in draws, of which two updates have many: neither sign is preferred."""
        deltas = [torch.tensor([[[1.0, -2.0, 3.0, 1.0, 0.0]]]), torch.tensor([[[-4.0, 1.0, 2.0, -1.0, 5.0]]])]
        mean = elected_mean(deltas, [1.0, 1.0], majority)
        assert mean.tolist() == [[[-4.0, -2.0, 2.5, 0.0, 5.0]]]
        assert torch.equal(elected_mean([-delta for delta in deltas], [1.0, 1.0], majority), -mean)

    def test_a_layer_that_only_one_has_is_not_averaged_away(self, adapter: Make, dense64: Make) -> None:
        one = exact_layer(1)
        result = combine([adapter({"x": one}), adapter({"y": exact_layer(2)})], method="ties", density=1.0)
        got = dense64(result.adapter.components["unet"]["x"])
        assert float((got - dense64(one)).norm() / dense64(one).norm()) < 1e-6

    def test_the_generator_decides(self, adapter: Make) -> None:
        adapters = [adapter({"x": exact_layer(1)}), adapter({"x": exact_layer(2)})]

        def factors(seed: int) -> torch.Tensor:
            return combine(adapters, method="dare_ties", generator=torch.Generator().manual_seed(seed)).adapter.flat()[
                "unet.x.lora_A"
            ]

        assert torch.equal(factors(1), factors(1))
        assert not torch.equal(factors(1), factors(2))

    @pytest.mark.parametrize("groups", [1, 2])
    def test_convolutions(self, layer: Make, adapter: Make, dense64: Make, groups: int) -> None:
        """As on the flat matrix, and back in the convolution's shapes; groups are compressed one by one."""
        layers = [layer(8, (4, 3, 3), 4, groups=groups, seed=seed) for seed in (1, 2)]
        result = combine([adapter({"x": each}) for each in layers], [1, 0.5], "magnitude_prune", density=0.5)
        wanted = 0
        for weight, delta in zip((1, 0.5), map(dense64, layers)):
            threshold = delta.abs().flatten().sort(descending=True).values[delta.numel() // 2 - 1]
            wanted = wanted + weight * torch.where(delta.abs() >= threshold, delta, 0.0)
        combined = result.adapter.components["unet"]["x"]
        assert (combined.a.shape, combined.b.shape) == ((4, 4, 3, 3), (8, 4 // groups, 1, 1))
        sigma = torch.linalg.svdvals(wanted.reshape(groups, 8 // groups, -1))
        best = float(sigma[:, 4 // groups :].square().sum().sqrt() / wanted.norm())
        assert result.error == pytest.approx(best, rel=1e-4)
        assert float((dense64(combined) - wanted).norm() / wanted.norm()) == pytest.approx(best, rel=1e-4)
