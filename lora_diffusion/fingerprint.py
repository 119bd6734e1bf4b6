"""Is this the base that the adapter was made for? A few hundred bytes that tell base models apart.

A fingerprint holds the shapes of all weights, hashed, and a few values of a few of them. Values are compared with a
tolerance, so that a model is the same in fp32, fp16 and bf16; a fine-tune of it is not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .components import canonical_path
from .config import is_number
from .layers.host import base_class
from .layers.quantised import is_quantised, weight_shape
from .state import state_of

WEIGHTS = 8
VALUES = 6
TOLERANCE = 0.02  # of the largest value of a weight's sample; bf16 rounds by up to 0.004

SAME, TUNED, OTHER, UNKNOWN = "same", "other weights", "other architecture", "unknown"


def fingerprint(component: str, module: nn.Module) -> dict[str, Any]:
    """{"class", "shapes": hash, "values": {weight: [float, …]}}, JSON values; adapters inside do not count."""
    weights = dict(_weights(component, module))
    shapes = hashlib.sha256("".join(f"{n} {weight_shape(w)}\n" for n, w in sorted(weights.items())).encode())
    readable = [name for name, weight in sorted(weights.items()) if not is_quantised(weight) and weight.numel()]
    readable = [name for name in readable if weights[name].device.type != "meta"]
    chosen = [readable[k * len(readable) // WEIGHTS] for k in range(WEIGHTS)] if readable else []
    values = {name: [_rounded(value) for value in _sample(weights[name])] for name in dict.fromkeys(chosen)}
    return {"class": base_class(module).__name__, "shapes": shapes.hexdigest()[:16], "values": values}


def compare(made_for: Any, component: str, module: nn.Module) -> str:
    """SAME, TUNED (the same architecture with other weights), OTHER, or UNKNOWN where `made_for` is no fingerprint."""
    if not isinstance(made_for, Mapping) or not isinstance(made_for.get("values"), Mapping):
        return UNKNOWN
    weights = dict(_weights(component, module))
    mine = fingerprint(component, module)
    seen = 0
    for name, values in made_for["values"].items():
        weight = weights.get(name)
        if weight is None:
            return OTHER
        if is_quantised(weight) or weight.device.type == "meta":
            continue
        own = _sample(weight)
        if not isinstance(values, list) or len(values) != len(own) or not all(map(is_number, values)):
            return OTHER
        largest = max(map(abs, values), default=0.0)
        if any(abs(a - b) > TOLERANCE * largest for a, b in zip(values, own)):
            return TUNED if mine["shapes"] == made_for.get("shapes") else OTHER
        seen += 1
    if not seen:
        return UNKNOWN
    quantised = any(is_quantised(weight) for weight in weights.values())
    return SAME if quantised or mine["shapes"] == made_for.get("shapes") else OTHER


def _weights(component: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(canonical name, weight) of the base's own weights: without learned copies, and as before a merge."""
    state = state_of(module)
    own = {id(layer): weight for layer, weight, _ in state.merged.weights} if state is not None and state.merged else {}
    for installed in state.adapters.values() if state is not None else ():
        for piece in installed.pieces.values():
            own.update({id(owner): weight for owner, weight in piece.base_weights()})
    for path, part in module.named_modules():
        weight = own.get(id(part), part._parameters.get("weight"))
        if weight is not None and weight.ndim >= 2 and ".copy_" not in f".{path}":
            yield canonical_path(component, f"{path}.weight"), weight


def _sample(weight: torch.Tensor) -> list[float]:
    flat = weight.detach().reshape(-1)
    places = [k * (flat.numel() - 1) // max(VALUES - 1, 1) for k in range(VALUES)]
    return [float(value) for value in flat[places].float().cpu()]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0
