"""Several adapters in one: exact sums, compressed sums, and the merging rules of TIES and DARE."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..adapter import Adapter, LowRank
from ..config import MAX_RANK, is_number
from ..errors import AdapterMismatchError, ConfigError
from ..lowering import lowered
from .checks import OnProgress, check_adapter, check_dtype, check_rank, check_share, counted, refuse_prompts
from .dense import dense, fit_dense
from .derived import Derived, Fit, derived
from .factored import Form, added, form_of, layer_of, measured, product_of, truncated
from .interference import MAJORITIES, RULES

METHODS = ("cat", "svd", *RULES)
_OWN_KEYS = ("combined", "resized", "extracted")  # true of one adapter only, however many share the value


@dataclass(frozen=True)
class _Settings:
    method: str
    r: int | None
    density: float
    majority: str
    generator: torch.Generator | None
    dtype: torch.dtype | None


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "cat",
    *,
    r: int | None = None,
    density: float = 0.5,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Derived:
    """One adapter that does what several do together, layer by layer; layers and ranks need not be the same in all.

    weights: one number for each adapter, 1 by default. Negative ones subtract; an adapter with 0 takes no part.
    method: "cat": Σ w·ΔW exactly, by joining the factors; the rank is the sum of the ranks.
        "svd": the same sum, compressed to rank `r` in the best possible way.
        "ties", "dare_ties", "dare_linear", "magnitude_prune": the rules in `interference.py` on the full ΔW of a layer,
        compressed to rank `r`. These are PEFT's "ties_svd" and so on, which are accepted as names too.
    r: the highest rank of the result, by default the largest of the inputs' at that layer; not with "cat".
    density: the share of entries that pruning keeps. majority_sign_method: "total" or "frequency", for the elections.
    generator: draws what DARE drops; torch's global one by default.
    dtype: of the factors; by default the widest of the inputs'.
    metadata: to put into the result beside what all adapters agree on and, under "combined", how it came about.

    "cat" and "svd" never form an (out, in) matrix; the rules form those of one layer at a time.
    LoHa, LoKr and their like become products of two factors first. Words that adapters bring go along.
    on_progress: told (name of a layer, done, total).
    Raises ConfigError for settings, AdapterMismatchError for layers whose shapes differ or that are DoRA's, and for
    learned copies of whole modules, which have no sum.
    """
    weights = _checked_weights(adapters, weights)
    settings = _checked(method, r, density, majority_sign_method, generator, dtype)
    parts = [(weight, adapter) for weight, adapter in zip(weights, adapters) if weight != 0.0]
    _refuse_copies(adapter for _, adapter in parts)
    refuse_prompts(adapter for _, adapter in parts)
    tokens = _tokens([adapter for _, adapter in parts])
    parts = [(weight, lowered(adapter)) for weight, adapter in parts]
    names = {f"{c}.{path}" for _, adapter in parts for c, layers in adapter.components.items() for path in layers}
    said = counted(on_progress, len(names))
    fits: dict[str, dict[str, Fit]] = {}
    for component in dict.fromkeys(name for _, adapter in parts for name in adapter.components):
        tables = [(weight, adapter.components.get(component, {})) for weight, adapter in parts]
        for path in dict.fromkeys(path for _, table in tables for path in table):
            layers = [(weight, table[path]) for weight, table in tables if path in table]
            where = f"{component}.{path}"
            fits.setdefault(component, {})[path] = said(where, _combined(layers, where, settings))
    if not fits:
        raise AdapterMismatchError("the adapters have no layers: there is nothing to combine")
    notes = list(dict.fromkeys(note for _, adapter in parts for note in adapter.notes))
    result = derived(fits, {**_provenance(adapters, weights, settings), **(metadata or {})}, notes=notes)
    result.adapter.tokens = tokens
    first, others = parts[0][1].bases, [adapter.bases for _, adapter in parts[1:]]
    result.adapter.bases = {c: base for c, base in first.items() if all(other.get(c) == base for other in others)}
    return result


def _combined(layers: list[tuple[float, LowRank]], where: str, settings: _Settings) -> Fit:
    form = _common_form([layer for _, layer in layers], where)
    first = layers[0][1].a
    dtype = settings.dtype or _widest([layer for _, layer in layers])
    largest = max(layer.rank for _, layer in layers)
    rank = form.per_group(largest if settings.r is None else settings.r, where)
    if settings.method in RULES:
        thin, put_together = RULES[settings.method]
        products = [product_of(layer, where, device=first.device) for _, layer in layers]
        deltas = [thin(dense(product), settings.density, settings.generator) for product in products]
        delta = put_together(deltas, [weight for weight, _ in layers], settings.majority)
        del deltas
        return fit_dense(delta, form, rank, where, dtype=dtype, device=first.device)
    scale = _common_scale(layers) if settings.method == "cat" else 1.0
    asked = added([product_of(layer, where, weight, first.device) for weight, layer in layers])
    if settings.method == "svd":
        return measured(layer_of(truncated(asked, rank), form, dtype, first.device, where), asked, where)
    if asked.rank * form.groups > MAX_RANK:
        raise ConfigError(
            f'method="cat" gives {where} rank {asked.rank * form.groups:,}, beyond {MAX_RANK:,}: take "svd"'
        )
    unscaled = added([product_of(layer, where, weight / scale, first.device) for weight, layer in layers])
    return measured(layer_of(unscaled, form, dtype, first.device, where, scale), asked, where)


def _common_scale(layers: list[tuple[float, LowRank]]) -> float:
    """|w·scale| where all layers have the same, so that no factor has to be rounded again; else 1."""
    sizes = {abs(weight * layer.scale) for weight, layer in layers}
    return sizes.pop() or 1.0 if len(sizes) == 1 else 1.0


def _common_form(layers: list[LowRank], where: str) -> Form:
    forms = list(dict.fromkeys(form_of(layer, where) for layer in layers))
    if len(forms) > 1:
        raise AdapterMismatchError(
            f"{where} updates a weight of {forms[0]} in one adapter and of {forms[1]} in another: "
            "they were made for different models"
        )
    return forms[0]


def _refuse_copies(adapters: Iterable[Adapter]) -> None:
    for adapter in adapters:
        for component, learned in adapter.methods.items():
            for kind in learned:
                raise AdapterMismatchError(f"an adapter brings a {kind} part for {component}, which has no sum")
        for component, modules in adapter.copies.items():
            for path in modules:
                raise AdapterMismatchError(
                    f"an adapter brings a whole module of its own for {component}.{path}, which has no sum: "
                    "combine adapters that were trained without modules_to_save"
                )


def _tokens(adapters: list[Adapter]) -> dict[str, dict[str, torch.Tensor]]:
    """The words of all. Raises AdapterMismatchError for one that two bring with different vectors."""
    words: dict[str, dict[str, torch.Tensor]] = {}
    for adapter in adapters:
        for word, vectors in adapter.tokens.items():
            known = words.setdefault(word, vectors)
            same = known.keys() == vectors.keys() and all(torch.equal(known[c], vectors[c]) for c in known)
            if not same:
                raise AdapterMismatchError(f"two of the adapters bring the word {word!a}, with different vectors")
    return copy.deepcopy(words)


def _widest(layers: list[LowRank]) -> torch.dtype:
    widest = layers[0].a.dtype
    for factor in (factor for layer in layers for factor in (layer.a, layer.b)):
        widest = torch.promote_types(widest, factor.dtype)
    return widest


def _checked_weights(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
    if not isinstance(adapters, Sequence) or not adapters:
        raise ConfigError(f"adapters is a {type(adapters).__name__}: give a list of at least one Adapter")
    for index, adapter in enumerate(adapters):
        check_adapter(f"adapters[{index}]", adapter)
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise ConfigError(f"there are {len(adapters)} adapters and {len(weights)} weights: give one for each")
    for weight in weights:
        if not is_number(weight):
            raise ConfigError(f"weights={weights}: {weight!r} is no finite number")
    if not any(weights):
        raise ConfigError(f"weights={weights}: nothing is left of the adapters, give one that is not 0")
    return [float(weight) for weight in weights]


def _checked(
    method: str, r: int | None, density: float, majority: str, generator: Any, dtype: torch.dtype | None
) -> _Settings:
    short = method.removesuffix("_svd") if isinstance(method, str) else method
    if short not in METHODS:
        instead = '; for PEFT\'s "linear" take "cat", which is exact' if method == "linear" else ""
        raise ConfigError(f"method={method!r}: the methods are {', '.join(METHODS)}{instead}")
    if r is not None:
        check_rank("r", r)
        if short == "cat":
            raise ConfigError(f'r={r}: method="cat" keeps all ranks; leave r out, or take method="svd"')
    check_share("density", density)
    if majority not in MAJORITIES:
        raise ConfigError(f"majority_sign_method={majority!r}: give {' or '.join(map(repr, MAJORITIES))}")
    check_dtype(dtype)
    return _Settings(short, r, density, majority, generator, dtype)


def _provenance(adapters: Sequence[Adapter], weights: list[float], settings: _Settings) -> dict[str, Any]:
    """What all metadata agree on, and under "combined" the rest: method, weights, each adapter's own metadata."""
    first, others = adapters[0].metadata, [adapter.metadata for adapter in adapters[1:]]
    agreed = {
        key: copy.deepcopy(value)
        for key, value in first.items()
        if key not in _OWN_KEYS and all(key in other and other[key] == value for other in others)
    }
    how: dict[str, Any] = {"method": settings.method}
    if settings.r is not None:
        how["r"] = settings.r
    if settings.method in RULES:
        how["density"] = settings.density
        if settings.method.endswith("ties"):
            how["majority_sign_method"] = settings.majority
    how["adapters"] = [
        {"weight": weight, "layers": adapter.layer_count(), "metadata": copy.deepcopy(adapter.metadata)}
        for weight, adapter in zip(weights, adapters)
    ]
    return {**agreed, "combined": how}
