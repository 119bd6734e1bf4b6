"""From updates in a form of their own (LoHa, LoKr, …) to products of two factors, which the engine computes with.

A layer becomes its exact product where that is small (see `Structured.exact`), else the product of the smallest rank
that is near enough to its ΔW: the leading terms of its singular value decomposition, the best of their rank (Eckart and
Young 1936). For that ΔW is computed in full, except for LoKr, whose singular values are the products of its halves'.
"""

from __future__ import annotations

import dataclasses
import math
import re

import torch

from .adapter import Adapter, LowRank, inferred_config
from .config import is_number
from .errors import AdapterFormatError, AdapterMismatchError, ConfigError
from .structured import LoKr, Structured

# Of one layer's ΔW, or of its wider factor; the largest matrices of Flux and SDXL have 2**26. A few kilobytes in a file
# can claim any size, and here is where it would be allocated.
MAX_ELEMENTS = 2**28
# What fp32 factors can hold; a smaller tolerance means this one.
_FINEST = 1e-6

# Stable Diffusion's convolutions by name, for layers whose file does not tell the kernel.
_KERNELS = {
    re.compile(r"(.+\.)?(resnets\.\d+\.conv[12]|(down|up)samplers\.\d+\.conv|conv_in|conv_out)"): 3,
    re.compile(r".+\.resnets\.\d+\.conv_shortcut"): 1,
}
# Where attentions begin and end, SD 1 has 1×1 convolutions, SD 2 and SDXL have Linear layers. These two read text of
# other widths, and SDXL's attentions have more than one block.
_PROJECTION = re.compile(r".+\.attentions\.\d+\.proj_(in|out)")
_READS_TEXT = re.compile(r".+\.attn2\.to_[kv]")
_WIDE_TEXT = (1024, 2048)
_ONLY_SDXL = re.compile(r".+\.transformer_blocks\.[1-9].*")


def lowered(adapter: Adapter, tolerance: float = 1e-3) -> Adapter:
    """The same adapter without `structured` layers; they follow the layers of their component that were plain before.

    tolerance: the largest ‖ΔW − ΔW of the result‖ / ‖ΔW‖ (Frobenius) of a layer that does not become its exact product.
    No model is at hand: where a file leaves a convolution's kernel open, the layer's name in Stable Diffusion decides.
    The notes say, for each kind, how many layers are exact and how far the others are off.
    Raises AdapterFormatError for a layer that is too large, AdapterMismatchError where name and shape disagree.
    """
    if not adapter.structured:
        return adapter
    components, configs = dict(adapter.components), dict(adapter.configs)
    results: dict[str, list[tuple[int, float]]] = {}
    linear = _projections_are_linear(adapter)
    for component, layers in adapter.structured.items():
        done: dict[str, LowRank] = {}
        for path, layer in layers.items():
            shape = _shape_by_name(layer, path, linear) if component == "unet" else None
            done[path], error = lowered_layer(layer, tolerance, shape, f"{component}.{path}")
            results.setdefault(layer.kind, []).append((done[path].rank, error))
        components[component] = {**components.get(component, {}), **done}
        configs[component] = inferred_config(components[component])
    notes = [*adapter.notes, *(_note(kind, values) for kind, values in results.items())]
    return dataclasses.replace(adapter, components=components, configs=configs, notes=notes, structured={})


def lowered_layer(
    layer: Structured, tolerance: float = 1e-3, shape: tuple[int, ...] | None = None, where: str = "the layer"
) -> tuple[LowRank, float]:
    """One layer as a product of two factors in fp32, and its relative error; 0.0 where the product is exact.

    shape: of the module's weight, (out, in) or (out, in, kh, kw), by which flattened factors are unfolded; by default
        the layer's own.
    where: what to call the layer in errors.
    Raises ConfigError for an impossible tolerance, and what `lowered` raises.
    """
    if not is_number(tolerance) or not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance={tolerance!r}: give a number from 0 up to, not including, 1")
    shape = layer.shape if shape is None else shape
    if (shape[0], math.prod(shape)) != (layer.shape[0], math.prod(layer.shape)):
        raise AdapterMismatchError(f"{where}: its {layer.kind} is for a weight of {layer.shape}, not of {shape}")
    elements = max(shape[0], layer.rank) * math.prod(shape[1:])
    if elements > MAX_ELEMENTS:
        raise AdapterFormatError(f"{where} would take {elements:,} numbers; the limit is {MAX_ELEMENTS:,}")
    product = layer.exact()
    if product is not None:
        (a, b), scale, error = product, layer.scale, 0.0
    elif isinstance(layer, LoKr):
        first, second = (_checked(half, where) for half in layer.halves())
        (a, b, error), scale = _nearest_kron(first, second, max(tolerance, _FINEST)), layer.scale
    else:
        delta = _checked(layer.delta(), where).flatten(1)
        (a, b, error), scale = _nearest(delta, max(tolerance, _FINEST)), 1.0
    a, b = _checked(a, where), _checked(b, where)
    a = a.reshape(-1, *shape[1:]).contiguous()
    b = b.reshape(shape[0], -1, *(1 for _ in shape[2:])).contiguous()
    return LowRank(a, b, scale, layer.magnitude), error


def _nearest(matrix: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (k, columns) and B (rows, k) of the smallest k within `tolerance` of a matrix in fp32, and the error of those
    two as they are stored."""
    u, s, vh = _singular(matrix)
    k, _ = _kept(s, tolerance)
    root = s[:k].sqrt()
    b, a = (u[:, :k] * root).float(), (root.unsqueeze(1) * vh[:k]).float()
    norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    rest = float(torch.linalg.vector_norm(torch.addmm(matrix, b, a, alpha=-1.0), dtype=torch.float64))
    return a, b, rest / norm if norm else 0.0


def _nearest_kron(
    first: torch.Tensor, second: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The same of first ⊗ second, which is not computed; the error is that of leaving terms out."""
    (u1, s1, vh1), (u2, s2, vh2) = _singular(first), _singular(second)
    s, order = torch.sort(torch.outer(s1, s2).flatten(), descending=True, stable=True)
    k, error = _kept(s, tolerance)
    root, i, j = s[:k].sqrt(), order[:k] // len(s2), order[:k] % len(s2)
    b = (u1[:, i].unsqueeze(1) * (u2[:, j] * root).unsqueeze(0)).flatten(0, 1)
    a = (vh1[i].unsqueeze(2) * (root.unsqueeze(1) * vh2[j]).unsqueeze(1)).flatten(1)
    return a.float(), b.float(), error


def _singular(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (rows, k), σ (k,), Vᴴ (k, columns) in fp64 of a matrix in fp32, without what is below a 10⁻⁷th of the largest.

    From the eigenvectors of M·Mᵀ on the smaller side: several times faster than an SVD of a convolution's wide matrix,
    and in fp64 exact enough for every tolerance that fp32 can hold.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = _singular(matrix.T)
        return vh.T, s, u.T
    exact = matrix.double()
    squares, u = torch.linalg.eigh(exact @ exact.T)
    s, u = squares.clamp(min=0).sqrt().flip(0), u.flip(1)
    k = max(1, int((s > 1e-7 * s[0]).sum()))
    s, u = s[:k], u[:, :k]
    return u, s, u.T @ exact / s.clamp(min=torch.finfo(s.dtype).tiny).unsqueeze(1)


def _kept(s: torch.Tensor, tolerance: float) -> tuple[int, float]:
    """How many leading singular values to keep, at least one, and the relative error of leaving out the others."""
    left = s.square().flip(0).cumsum(0).flip(0)  # left[k]: the squares of all from k on
    if left[0] == 0:
        return 1, 0.0
    k = max(1, int((left > tolerance**2 * left[0]).sum()))
    return k, float((left[k] / left[0]).sqrt()) if k < len(s) else 0.0


def _checked(tensor: torch.Tensor, where: str) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise AdapterFormatError(f"{where} holds values that are too large to be multiplied in fp32")
    return tensor


def _shape_by_name(layer: Structured, path: str, linear: bool) -> tuple[int, ...] | None:
    """The weight's shape of a layer whose file leaves the kernel open; None where it does not, or for a Linear.

    linear: what the projections around attentions are.
    """
    if len(layer.shape) != 2:
        return None
    size = next((size for name, size in _KERNELS.items() if name.fullmatch(path)), None)
    if _PROJECTION.fullmatch(path) and not linear:
        size = 1
    if size is None:
        return None
    out, columns = layer.shape
    if columns % size**2:
        raise AdapterMismatchError(f"unet.{path}: no {size}×{size} kernel has the {columns} inputs of its {layer.kind}")
    return out, columns // size**2, size, size


def _projections_are_linear(adapter: Adapter) -> bool:
    """Whether an adapter is for SD 2 or SDXL, as far as its layers show."""
    layers = adapter.layers()
    widths = {
        int(layer.a.shape[1]) if isinstance(layer, LowRank) else layer.shape[1]
        for path, layer in layers.get("unet", {}).items()
        if _READS_TEXT.fullmatch(path)
    }
    return (
        "text_encoder_2" in layers
        or not widths.isdisjoint(_WIDE_TEXT)
        or any(map(_ONLY_SDXL.fullmatch, layers.get("unet", {})))
    )


def _note(kind: str, results: list[tuple[int, float]]) -> str:
    errors = [error for _, error in results]
    exact = errors.count(0.0)
    ranks = sorted({rank for rank, _ in results})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    rest = len(errors) - exact
    near = f", {rest} approximated with a relative error of at most {max(errors):.1e}" if rest else ""
    return f"{kind}: {exact} of {len(errors)} layers turned into low-rank products exactly{near} ({rank})"
