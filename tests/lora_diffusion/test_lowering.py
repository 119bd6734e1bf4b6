"""From LoHa, LoKr and the like to plain products: exact where it can be, within the tolerance elsewhere."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_diffusion as ld
from lora_diffusion.lowering import MAX_ELEMENTS, lowered, lowered_layer
from lora_diffusion.structured import Dense, LoHa, LoKr, Structured, TuckerLoCon

SEED = st.integers(0, 2**16)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loha(out: int = 16, columns: int = 16, rank: int = 2, seed: int = 0, scale: float = 0.5) -> LoHa:
    w = (randn(*shape, seed=seed + n) for n, shape in enumerate([(out, rank), (rank, columns)] * 2))
    return LoHa(*w, scale=scale)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def fading(out: int, columns: int, seed: int) -> torch.Tensor:
    """A matrix whose singular values fall from 1 to about 1e-4, as those of real updates do."""
    u, _, vh = torch.linalg.svd(randn(out, columns, seed=seed).double(), full_matrices=False)
    s = torch.logspace(0, -4, min(out, columns), dtype=torch.float64)
    return (u * s @ vh).float()


@pytest.mark.parametrize(
    "layer",
    [
        loha(),
        LoKr(w1=randn(2, 4), w2_a=randn(16, 2), w2_b=randn(2, 8), scale=3.0),
        TuckerLoCon(randn(8, 3, 1, 1), randn(3, 3, 3, 3), randn(3, 4, 1, 1), 0.5),
        TuckerLoCon(randn(2, 3, 1, 1), randn(3, 3, 3, 3), randn(3, 4, 1, 1), 0.5),
    ],
)
def test_exact_where_that_is_small(layer: Structured) -> None:
    """Its error is 0.0 and its rank does not depend on the tolerance; a Tucker core is exact at any rank."""
    low, error = lowered_layer(layer, 0.9)
    assert error == 0.0
    assert low.scale == layer.scale
    assert low.delta().shape == layer.shape
    assert relative(low.delta(), layer.delta()) < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1e-3, 1e-2, 0.3]), SEED)
def test_the_smallest_rank_within_the_tolerance(out: int, columns: int, tolerance: float, seed: int) -> None:
    matrix = fading(out, columns, seed)
    low, error = lowered_layer(Dense(matrix, -2.0), tolerance)
    s = torch.linalg.svdvals(matrix.double())
    lost = [float(s[k:].norm() / s.norm()) for k in range(len(s) + 1)]
    assert low.rank == max(1, next(k for k, value in enumerate(lost) if value <= tolerance))
    assert error == pytest.approx(relative(low.delta(), -2.0 * matrix), abs=2e-7)
    assert error <= tolerance
    assert low.a.dtype == low.b.dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=4, max_size=4), st.sampled_from([1e-3, 1e-2, 0.3]), SEED)
def test_lokr_of_two_whole_matrices(sizes: list[int], tolerance: float, seed: int) -> None:
    """Never multiplied out, and yet the rank and the error are those of ΔW's own singular values."""
    a, c, b, d = sizes
    layer = LoKr(w1=fading(a, c, seed), w2=fading(b, d, seed + 1), scale=0.5)
    low, error = lowered_layer(layer, tolerance)
    assert error <= tolerance
    if layer.exact() is not None:
        assert error == 0.0
        return
    s = torch.linalg.svdvals(layer.delta().double())
    assert float(s[low.rank :].norm() / s.norm()) <= tolerance * 1.001
    if low.rank > 1:
        assert float(s[low.rank - 1 :].norm() / s.norm()) > tolerance * 0.999
    assert relative(low.delta(), layer.delta()) == pytest.approx(error, abs=1e-6)


def test_a_convolution_of_lokr_that_is_not_exact() -> None:
    layer = LoKr(w1=randn(2, 2), w2=randn(4, 4, 3, 3))
    low, error = lowered_layer(layer)
    assert low.a.shape[1:] == (8, 3, 3)
    assert low.b.shape[0::2] == (8, 1)
    assert error <= 1e-3
    assert relative(low.delta(), layer.delta()) <= 1e-3


def test_no_tolerance_is_what_fp32_holds() -> None:
    layer = loha(12, 12, rank=5)
    low, error = lowered_layer(layer, 0.0)
    assert error < 2e-6
    assert relative(low.delta(), layer.delta()) < 2e-6


def test_balanced_factors() -> None:
    """A and B are of one size, which is kind to half precision."""
    low, _ = lowered_layer(Dense(1e-3 * fading(20, 30, 0)))
    assert float(low.a.norm()) == pytest.approx(float(low.b.norm()), rel=1e-4)


def test_nothing_stays_nothing() -> None:
    for layer in (Dense(torch.zeros(4, 3)), LoKr(w1=torch.zeros(2, 2), w2=randn(3, 3))):
        low, error = lowered_layer(layer)
        assert error == 0.0
        assert low.rank == 1
        assert not low.delta().any()


def test_flattened_factors_are_unfolded() -> None:
    """LoHa stores (out, in · kh · kw); the caller knows the weight's shape."""
    layer = loha(8, 4 * 9)
    low, _ = lowered_layer(layer, shape=(8, 4, 3, 3))
    assert low.a.shape == (4, 4, 3, 3)
    assert low.b.shape == (8, 4, 1, 1)
    torch.testing.assert_close(low.delta(), layer.delta().view(8, 4, 3, 3))
    with pytest.raises(ld.AdapterMismatchError, match=r"LoHa is for a weight of \(8, 36\), not of \(8, 4, 2, 2\)"):
        lowered_layer(layer, shape=(8, 4, 2, 2))
    with pytest.raises(ld.AdapterMismatchError, match="not of"):
        lowered_layer(layer, shape=(4, 8, 3, 3))


@pytest.mark.parametrize("tolerance", [-1e-3, 1.0, math.nan, "1e-3", True])
def test_impossible_tolerances(tolerance: object) -> None:
    with pytest.raises(ld.ConfigError, match="tolerance="):
        lowered_layer(loha(), tolerance)  # type: ignore[arg-type]


def test_too_large_is_refused_before_anything_is_allocated() -> None:
    """A few kilobytes claim terabytes."""
    side = 2**21
    thin = [torch.ones(1, 1).expand(shape) for shape in ((side, 1), (1, side))]
    for layer in (
        LoHa(*thin, *thin),
        LoKr(w1=thin[0], w2=thin[1]),
        TuckerLoCon(torch.ones(1, 1), torch.ones(1, 1, 1, 1).expand(1, 1, 2**15, 2**15), torch.ones(1, 1)),
        TuckerLoCon(torch.ones(1, 64), torch.ones(1, 1, 1, 1).expand(64, 64, 2**12, 2**12), torch.ones(64, 1)),
    ):
        with pytest.raises(ld.AdapterFormatError, match=f"unet.x would take .* the limit is {MAX_ELEMENTS:,}"):
            lowered(ld.Adapter({}, structured={"unet": {"x": layer}}))


def test_overflow_is_refused() -> None:
    huge = torch.full((4, 4), 3e38)
    for layer in (LoHa(huge, huge, huge, huge), LoHa(huge[:, :1], huge[:1], huge[:, :1], huge[:1])):
        with pytest.raises(ld.AdapterFormatError, match="too large to be multiplied"):
            lowered_layer(layer)


def test_a_whole_adapter() -> None:
    """Plain layers stay what they are, lengths and everything else come along, and notes say what was done."""
    plain = ld.LowRank(randn(2, 8), randn(6, 2))
    lengths = randn(16).abs()
    adapter = ld.Adapter(
        {"unet": {"a": plain}},
        structured={
            "unet": {
                "b": dataclasses.replace(loha(), magnitude=lengths),
                "c": Dense(fading(20, 20, 1)),
                "d": loha(seed=9),
            },
            "text_encoder": {"e": LoKr(w1=randn(2, 2), w2_a=randn(8, 2), w2_b=randn(2, 8))},
        },
        metadata={"who": "someone"},
        notes=["an old note"],
    )
    low = lowered(adapter)
    assert {component: list(layers) for component, layers in low.components.items()} == {
        "unet": ["a", "b", "c", "d"],
        "text_encoder": ["e"],
    }
    assert low.components["unet"]["a"] is plain
    assert torch.equal(low.components["unet"]["b"].magnitude, lengths)
    assert low.structured == {}
    assert low.configs["unet"].use_dora
    assert low.configs["text_encoder"].r == 4
    assert low.metadata == adapter.metadata
    first, *notes = low.notes
    assert first == "an old note"
    assert notes[0] == "LoHa: 2 of 2 layers turned into low-rank products exactly (rank 4)"
    assert notes[1].startswith("full difference: 0 of 1 layers turned into low-rank products exactly, 1 approximated")
    assert notes[2] == "LoKr: 1 of 1 layers turned into low-rank products exactly (rank 4)"
    assert adapter.notes == ["an old note"]
    assert list(adapter.components["unet"]) == ["a"]
    assert lowered(low) is low


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("down_blocks.0.resnets.1.conv2", (8, 4, 3, 3)),
        ("mid_block.resnets.0.conv1", (8, 4, 3, 3)),
        ("up_blocks.1.upsamplers.0.conv", (8, 4, 3, 3)),
        ("conv_in", (8, 4, 3, 3)),
        ("up_blocks.1.resnets.0.conv_shortcut", (8, 36, 1, 1)),
        ("down_blocks.0.attentions.0.proj_in", (8, 36, 1, 1)),
        ("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj", (8, 36)),
        ("down_blocks.0.resnets.1.time_emb_proj", (8, 36)),
    ],
)
def test_kernels_by_name(path: str, shape: tuple[int, ...]) -> None:
    """Without a model a layer's name in Stable Diffusion's UNet says where its kernel is."""
    low = lowered(ld.Adapter({}, structured={"unet": {path: loha(8, 36)}}))
    assert low.components["unet"][path].delta().shape == shape
    elsewhere = lowered(ld.Adapter({}, structured={"model": {path: loha(8, 36)}}))
    assert elsewhere.components["model"][path].delta().shape == (8, 36)


@pytest.mark.parametrize(
    "other",
    [
        {"unet": {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": loha(8, 1024)}},
        {"unet": {"down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_k": loha(8, 8)}},
        {"text_encoder_2": {"text_model.encoder.layers.0.mlp.fc1": loha(8, 8)}},
    ],
)
def test_projections_of_larger_models_are_linear(other: dict[str, dict[str, Structured]]) -> None:
    path = "down_blocks.0.attentions.0.proj_in"
    layers = {**other.get("unet", {}), path: loha(8, 8)}
    low = lowered(ld.Adapter({}, structured={**other, "unet": layers}))
    assert low.components["unet"][path].a.ndim == 2


def test_a_name_that_the_shape_belies() -> None:
    adapter = ld.Adapter({}, structured={"unet": {"conv_in": loha(8, 35)}})
    with pytest.raises(ld.AdapterMismatchError, match=r"unet\.conv_in: no 3×3 kernel has the 35 inputs of its LoHa"):
        lowered(adapter)
