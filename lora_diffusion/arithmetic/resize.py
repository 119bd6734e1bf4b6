"""One adapter at other ranks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..adapter import Adapter, LowRank
from ..config import pattern_fits
from ..errors import AdapterMismatchError, ConfigError
from ..lowering import lowered
from ..targets import nearest_words, unmatched_patterns
from .checks import OnProgress, check_adapter, check_dtype, check_rank, check_share, counted, refuse_prompts
from .derived import Derived, Fit, derived
from .factored import form_of, layer_of, measured, padded, product_of, truncated

# What kohya's scripts write about ranks and contents, and what would be wrong about the result.
_OUTDATED = ("ss_network_dim", "ss_network_alpha", "sshs_", "modelspec.hash")


def resize(
    adapter: Adapter,
    r: int | Mapping[str, int] | None = None,
    *,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
    on_progress: OnProgress | None = None,
) -> Derived:
    """Bring every layer to rank `r`: the nearest update of a lower rank (truncated SVD), the same update at a higher.

    r: a rank, or {module path, suffix or regex: rank} as in LoraConfig.rank_pattern, which leaves other layers alone.
    energy: give each layer the smallest rank that keeps this share of its squared singular values (0.99, say) instead;
        with `r` as well, no rank beyond `r`. Ranks then only fall.
    dtype: of the new factors; by default that of the old ones.
    on_progress: told (name of a layer, done, total).

    Computed in float64 on the factors; the (out, in) matrix is never formed, so it takes seconds on a CPU. Rows that
    are added to reach a higher rank are zero in both factors, and would stay zero in training. Learned copies of whole
    modules and words are kept as they are; LoHa, LoKr and their like become products of two factors first. The input
    is untouched.
    Raises ConfigError for settings, AdapterMismatchError for DoRA layers and patterns that fit no layer.
    """
    check_adapter("adapter", adapter)
    refuse_prompts([adapter])
    adapter = lowered(adapter)
    _check(adapter, r, energy, dtype)
    said = counted(on_progress, adapter.layer_count())
    fits = {
        component: {
            path: said(f"{component}.{path}", _resized(layer, f"{component}.{path}", _rank_for(path, r), energy, dtype))
            for path, layer in layers.items()
        }
        for component, layers in adapter.components.items()
    }
    what: dict[str, Any] = {"r": dict(r) if isinstance(r, Mapping) else r, "energy": energy}
    metadata = copy.deepcopy(adapter.metadata)
    metadata["resized"] = {name: value for name, value in what.items() if value is not None}
    foreign = {key: value for key, value in adapter.foreign.items() if not key.startswith(_OUTDATED)}
    result = derived(fits, metadata, foreign, adapter.notes, copies=copy.deepcopy(adapter.copies))
    result.adapter.methods = copy.deepcopy(adapter.methods)
    result.adapter.tokens, result.adapter.bases = copy.deepcopy(adapter.tokens), copy.deepcopy(adapter.bases)
    return result


def _check(adapter: Adapter, r: Any, energy: Any, dtype: Any) -> None:
    if r is None and energy is None:
        raise ConfigError("r and energy are both None: give a rank, a share of the energy to keep, or both")
    if isinstance(r, Mapping):
        for pattern, rank in r.items():
            check_rank(f"r[{pattern!r}]", rank)
        paths = [path for layers in adapter.components.values() for path in layers]
        if idle := unmatched_patterns(r, paths):
            raise AdapterMismatchError(f"r: {idle[0]!r} fits no layer of the adapter; {nearest_words(idle, paths)}")
    elif r is not None:
        check_rank("r", r)
    if energy is not None:
        check_share("energy", energy)
    check_dtype(dtype)
    if adapter.layer_count() == 0:
        raise AdapterMismatchError("the adapter has no layers: there is nothing to resize")


def _rank_for(path: str, r: int | Mapping[str, int] | None) -> int | None:
    if not isinstance(r, Mapping):
        return r
    return next((rank for pattern, rank in r.items() if pattern_fits(pattern, path)), None)


def _resized(layer: LowRank, where: str, rank: int | None, energy: float | None, dtype: torch.dtype | None) -> Fit:
    form, whole = form_of(layer, where), product_of(layer, where)
    wanted = None if rank is None else form.per_group(rank, where)
    product, scale = whole, 1.0
    if energy is not None or (wanted is not None and wanted < whole.rank):
        product = truncated(whole, wanted, energy)
    if product.rank == whole.rank:  # nothing to cut: the very factors, unscaled
        product, scale = product_of(dataclasses.replace(layer, scale=1.0), where), layer.scale
    if energy is None and wanted is not None:
        product = padded(product, wanted)
    dtype = torch.promote_types(layer.a.dtype, layer.b.dtype) if dtype is None else dtype
    return measured(layer_of(product, form, dtype, layer.a.device, where, scale), whole, where)
