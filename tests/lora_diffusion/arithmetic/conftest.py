"""Helpers for arithmetic: layers with random factors, and their ΔW in float64 by the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_diffusion.adapter import Adapter, LowRank


@pytest.fixture(scope="session")
def layer() -> Callable[..., LowRank]:
    """layer(out, fan_in, rank): a Linear's update, or with fan_in (in, kh, kw) that of a convolution in `groups`."""

    def make(
        out: int = 6,
        fan_in: int | tuple[int, ...] = 8,
        rank: int = 2,
        *,
        scale: float = 0.7,
        groups: int = 1,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> LowRank:
        fan_in = (fan_in,) if isinstance(fan_in, int) else fan_in
        g = torch.Generator().manual_seed(1000 + seed)
        a = torch.randn(rank, *fan_in, generator=g, dtype=torch.float64)
        b = torch.randn(out, rank // groups, *(1 for _ in fan_in[1:]), generator=g, dtype=torch.float64)
        return LowRank(a.to(dtype), b.to(dtype), scale)

    return make


@pytest.fixture(scope="session")
def adapter() -> Callable[..., Adapter]:
    """adapter({path: layer}, **fields): one component, "unet"."""

    def make(layers: dict[str, LowRank], **fields: Any) -> Adapter:
        return Adapter({"unet": layers}, **fields)

    return make


@pytest.fixture(scope="session")
def dense64() -> Callable[[LowRank], torch.Tensor]:
    """dense64(layer): ΔW[o, …] = scale · Σ_r B[o, r] · A[r, …] in float64, r running over the group's own rows."""

    def compute(layer: LowRank) -> torch.Tensor:
        a, b = layer.a.double(), layer.b.double().flatten(1)
        per_group, groups = b.shape[1], layer.a.shape[0] // b.shape[1]
        rows = []
        for o in range(b.shape[0]):
            group = o // (b.shape[0] // groups)
            rows.append(torch.einsum("r,r...->...", b[o], a[group * per_group : (group + 1) * per_group]))
        return layer.scale * torch.stack(rows)

    return compute


class LargestTensor(TorchDispatchMode):
    """Within the context: the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.fixture
def largest_tensor() -> LargestTensor:
    return LargestTensor()
