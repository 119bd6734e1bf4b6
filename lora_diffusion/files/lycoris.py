"""LyCORIS's dialect: kohya's module names with factors of other kinds, some of which need more than two tensors.

    <module>.hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b [, hada_t1, hada_t2]                    LoHa
    <module>.lokr_w1 or lokr_w1_a, lokr_w1_b; lokr_w2 or lokr_w2_a, lokr_w2_b [, lokr_t2]       LoKr
    <module>.lora_down.weight, lora_up.weight [, lora_mid.weight: a Tucker core]                LoCon, LoRA
    <module>.diff [, diff_b]                                                                    a full difference

Beside the factors `alpha`, whose quotient by the rank is the scale (absent or 0: the scale is 1; a LoKr of two whole
matrices and a full difference have no rank, and alpha means nothing to them), `scalar`, which multiplies the scale, and
`dora_scale`, DoRA's lengths, (out, 1, …). rsLoRA is part of alpha already. Kinds of one file may differ from module to
module. Nothing is multiplied out here: see `lowering.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..adapter import Adapter, LowRank, inferred_config
from ..config import MAX_RANK
from ..structured import Dense, LoHa, LoKr, Structured, TuckerLoCon
from .kohya import METADATA_KEYS
from .kohya_names import parse
from .source import Source

__all__ = ["METADATA_KEYS", "NAME", "read", "recognise"]

NAME = "lycoris"

_Shape = tuple[int, ...]
_UP, _DOWN, _MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
_KINDS = {
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "full difference": ("diff", "diff_b"),
    "Tucker LoCon": (_MID, _UP, _DOWN),
}
_BESIDE = ("alpha", "scalar", "dora_scale")
_NOT_BUILT = {
    "on_input": "IA3",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "bm.weight": "GLoRA",
    "oft_blocks": "OFT or BOFT",
    "oft_diag": "OFT",
    "rescale": "OFT",
    "w_norm": "a change of a norm",
    "b_norm": "a change of a norm",
    "lambda_layer": "T-LoRA",
    "q_layer.weight": "T-LoRA",
    "p_layer.weight": "T-LoRA",
    "bias_indices": "a sparse bias",
    "bias_values": "a sparse bias",
    "bias_size": "a sparse bias",
}
# By itself a name ends so in IA3 only.
_IA3_WEIGHT = "weight"
_OWN = (*(ending for endings in _KINDS.values() for ending in endings if ending not in (_UP, _DOWN)), *_NOT_BUILT)
_DOTTED = tuple(f".{ending}" for ending in (*_OWN, "scalar"))
_ENDINGS = sorted((*_OWN, _UP, _DOWN, *_BESIDE, _IA3_WEIGHT), key=len, reverse=True)


@dataclass
class _Module:
    """One module's tensors, {ending: name in the file}; rank is None where its factors have none."""

    component: str
    path: str
    names: dict[str, str] = field(default_factory=dict)
    kind: str = ""
    rank: int | None = None


def recognise(source: Source) -> bool:
    return any(name.startswith(("lora_", "lycoris_")) and name.endswith(_DOTTED) for name in source.tensors)


def read(source: Source) -> Adapter:
    """Raises AdapterFormatError for names that are not understood, kinds that are not built and factors that do not
    fit each other, all from the header; nothing is skipped."""
    modules = _modules(source)
    for module in modules:
        _check(source, module)
    values = source.read(list(source.tensors))
    components: dict[str, dict[str, LowRank]] = {}
    structured: dict[str, dict[str, Structured]] = {}
    notes = _assumptions(modules, values)
    for module in modules:
        own = {ending: values[name] for ending, name in module.names.items()}
        if module.kind == "full difference":
            _refuse_biases(source, module, own)
        layer = _layer(module, own)
        if isinstance(layer, LowRank):
            components.setdefault(module.component, {})[module.path] = layer
        else:
            structured.setdefault(module.component, {})[module.path] = layer
    configs = {component: inferred_config(layers) for component, layers in components.items()}
    return Adapter(components, configs, notes=notes, structured=structured)


def _modules(source: Source) -> list[_Module]:
    """The file's modules in its order, each with its kind; names and kinds only."""
    modules: dict[str, _Module] = {}
    paths: dict[tuple[str, str], str] = {}
    for name in source.tensors:
        ending = next((ending for ending in _ENDINGS if name.endswith(f".{ending}")), None)
        if ending is None:
            raise source.error(f"has a tensor that is not understood in the lycoris dialect: {name}")
        method = "IA3" if ending == _IA3_WEIGHT else _NOT_BUILT.get(ending)
        if method is not None:
            raise source.error(f"uses {method} ({name}), which this version cannot load")
        prefix = name.removesuffix(f".{ending}")
        if prefix not in modules:
            where = parse(prefix)
            if where is None:
                raise source.error(f"has {name}, and no module of that name is known in Stable Diffusion")
            if where in paths:
                raise source.error(f"has {'.'.join(where)} twice, as {paths[where]} and as {prefix}")
            paths[where] = prefix
            modules[prefix] = _Module(*where)
        modules[prefix].names[ending] = name
    for module in modules.values():
        found = [kind for kind, endings in _KINDS.items() if any(ending in module.names for ending in endings)]
        some = next(iter(module.names.values()))
        if len(found) != 1:
            what = f"factors of more than one kind ({', '.join(found)})" if found else f"{some} without the factors"
            raise source.error(f"has {what} at {module.component}.{module.path}")
        module.kind = "LoRA" if found == ["Tucker LoCon"] and _MID not in module.names else found[0]
    return list(modules.values())


def _check(source: Source, module: _Module) -> None:
    """Shapes and ranks from the header; sets the module's rank."""
    where = f"{module.component}.{module.path}"
    shapes = {ending: source.tensors[name].shape for ending, name in module.names.items()}
    factors = {ending: shape for ending, shape in shapes.items() if ending not in (*_BESIDE, "diff_b")}
    told = ", ".join(f"{ending} {list(shape)}" for ending, shape in factors.items())
    rows = None if any(0 in shape for shape in factors.values()) else _FITS[module.kind](factors)
    if rows is None:
        raise source.error(f"has {module.kind} factors at {where} that are incomplete or do not fit each other: {told}")
    out, module.rank = rows
    if module.rank is not None and module.rank > MAX_RANK:
        raise source.error(f"has rank {module.rank:,} at {where}; the limit is {MAX_RANK:,}")
    for ending in ("alpha", "scalar"):
        if math.prod(shapes.get(ending, ())) != 1:
            raise source.error(f"has {module.names[ending]} with shape {list(shapes[ending])}; it is one number")
    if "dora_scale" in shapes:
        _check_lengths(source, module.names["dora_scale"], shapes["dora_scale"], out)


def _check_lengths(source: Source, name: str, shape: _Shape, out: int) -> None:
    if shape[:1] == (out,) and math.prod(shape) == out:
        return
    if len(shape) > 1 and shape[0] == 1 and math.prod(shape) == shape[1]:
        raise source.error(
            f"uses DoRA along the inputs ({name}, wd_on_output=False), which this version cannot load; "
            "along the outputs it can"
        )
    raise source.error(f"has {name} with shape {list(shape)} for {out} outputs")


def _fits_loha(shapes: Mapping[str, _Shape]) -> tuple[int, int] | None:
    first, second = (
        _product(shapes.get(f"hada_w{n}_a"), shapes.get(f"hada_w{n}_b"), shapes.get(f"hada_t{n}")) for n in (1, 2)
    )
    return None if first is None or first != second else (first[0][0], first[1])


def _fits_lokr(shapes: Mapping[str, _Shape]) -> tuple[int, int | None] | None:
    sizes, ranks = [], set()
    for n in (1, 2):
        left, right, core = (shapes.get(f"lokr_{part}") for part in (f"w{n}_a", f"w{n}_b", f"t{n}"))
        whole, product = shapes.get(f"lokr_w{n}"), _product(left, right, core)
        if whole is not None and left is right is core is None:
            sizes.append(whole)
        elif whole is None and product is not None:
            sizes.append(product[0])
            ranks.add(product[1])
        else:
            return None
    if len(sizes[0]) != 2 or len(sizes[1]) not in (2, 4) or len(ranks) > 1:
        return None
    return sizes[0][0] * sizes[1][0], next(iter(ranks), None)


def _fits_locon(shapes: Mapping[str, _Shape]) -> tuple[int, int] | None:
    up, down, mid = shapes.get(_UP), shapes.get(_DOWN), shapes.get(_MID)
    if up is None or down is None or len(up) != len(down) or len(up) not in (2, 4) or any(n != 1 for n in up[2:]):
        return None
    rank = up[1]
    if down[0] != rank:
        return None
    if mid is not None and (down[2:] != up[2:] or len(mid) != 4 or mid[:2] != (rank, rank)):
        return None
    return up[0], rank


def _fits_full(shapes: Mapping[str, _Shape]) -> tuple[int, None] | None:
    diff = shapes.get("diff", ())
    return (diff[0], None) if len(diff) in (2, 4) else None


# Kind -> (number of outputs, rank) of factors that are all there and fit each other, else None.
_FITS = {
    "LoHa": _fits_loha,
    "LoKr": _fits_lokr,
    "Tucker LoCon": _fits_locon,
    "LoRA": _fits_locon,
    "full difference": _fits_full,
}


def _product(left: _Shape | None, right: _Shape | None, core: _Shape | None) -> tuple[_Shape, int] | None:
    """Shape and rank of (out, r) @ (r, columns), or of (r, out) and (r, in) around a core (r, r, kh, kw)."""
    if left is None or right is None or len(left) != 2 or len(right) != 2:
        return None
    if core is None:
        return ((left[0], right[1]), right[0]) if left[1] == right[0] else None
    fits = len(core) == 4 and core[0] == core[1] == left[0] == right[0]
    return ((left[1], right[1], *core[2:]), right[0]) if fits else None


def _layer(module: _Module, own: Mapping[str, torch.Tensor]) -> LowRank | Structured:
    scale = float(own["scalar"]) if "scalar" in own else 1.0
    alpha = float(own["alpha"]) if "alpha" in own else 0.0
    if alpha != 0.0 and module.rank is not None:
        scale *= alpha / module.rank
    magnitude = own["dora_scale"].flatten() if "dora_scale" in own else None
    if module.kind == "LoHa":
        return LoHa(**_parts(own, "hada_"), scale=scale, magnitude=magnitude)
    if module.kind == "LoKr":
        return LoKr(**_parts(own, "lokr_"), scale=scale, magnitude=magnitude)
    if module.kind == "Tucker LoCon":
        return TuckerLoCon(own[_UP], own[_MID], own[_DOWN], scale, magnitude)
    if module.kind == "full difference":
        return Dense(own["diff"], scale, magnitude)
    return LowRank(own[_DOWN], own[_UP], scale, magnitude)


def _parts(own: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {ending.removeprefix(prefix): value for ending, value in own.items() if ending.startswith(prefix)}


def _refuse_biases(source: Source, module: _Module, own: Mapping[str, torch.Tensor]) -> None:
    if "diff_b" in own and own["diff_b"].any():
        raise source.error(f"changes a bias ({module.names['diff_b']}), which this version cannot load")


def _assumptions(modules: list[_Module], values: Mapping[str, torch.Tensor]) -> list[str]:
    bare = idle = zero = 0
    for module in modules:
        alpha = float(values[module.names["alpha"]]) if "alpha" in module.names else 0.0
        bare += module.rank is not None and alpha == 0.0
        idle += module.kind == "full difference" and alpha != 0.0
        zero += "diff_b" in module.names
    return [
        note
        for count, note in (
            (bare, f"{bare} modules have no alpha, or one of 0: taken to be their rank (scale 1)"),
            (idle, f"{idle} full differences have an alpha, which means nothing to them"),
            (zero, f"{zero} changes of biases (diff_b), all of them zero, were left out"),
        )
        if count
    ]
