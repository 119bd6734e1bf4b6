"""The dialect of diffusers, `pytorch_lora_weights.safetensors`.

Names are `<component>.<module path>.<factor>`. Three spellings of the factor are read, the first is written:
`.lora_A.weight` / `.lora_B.weight`, `.lora.down.weight` / `.lora.up.weight`, and for text encoders
`.lora_linear_layer.down.weight` / `.lora_linear_layer.up.weight`.

DoRA's lengths are `<component>.<module path>.lora_magnitude_vector`, (out,), or (1, out, 1, 1) beside a convolution.

Whole modules that were learned beside are `<component>.<module path>.modules_to_save.<tensor>`, an addition of ours:
diffusers loads the rest of such a file and warns of these.

Words that the adapter brings are `lora_tokens.<word>.<component>`, (vectors, dim), ours too: diffusers, which reads by
component, does not look at them.

What a method other than low rank has learned is `<component>.adapter_parts.<kind>.<tensor>`, with its config in our own
description.

There are no alpha tensors. Scales come from the JSON under `lora_adapter_metadata` (diffusers ≥ 0.34), with keys
`<component>.<LoraConfig field>`; without it alpha equals the rank. Because tools drop that metadata, what is written
has every scale multiplied into B, and says alpha = rank: losing the metadata changes nothing. Nor may ranks differ
within a component: without alphas, diffusers up to 0.35 scales each layer by the first one's rank over its own. Smaller
ranks are padded with zeros, which reading our own files takes off again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..adapter import COPY, PARTS, Adapter, Learned, LowRank, inferred_config
from ..components import COMPONENTS, canonical_path
from ..config import is_number
from ..errors import AdapterFormatError
from .own import method_configs
from .pairs import Half, read_pairs
from .source import Source

NAME = "diffusers"
METADATA_KEY = "lora_adapter_metadata"
METADATA_KEYS = (METADATA_KEY,)

_SPELLINGS = {
    "a": (".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight"),
    "b": (".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight"),
}
_MAGNITUDE = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_NOT_BUILT = {".lora_B.bias": "a LoRA bias", ".lora_A.bias": "a LoRA bias"}
_COPY = re.compile(rf"({'|'.join(COMPONENTS)})\.(.+?)\.{COPY}\.(.+)")
_PART = re.compile(rf"({'|'.join(COMPONENTS)})\.{PARTS}\.(\w+)\.(.+)")
_TOKEN = re.compile(rf"lora_tokens\.(.+)\.({'|'.join(COMPONENTS)})")
_LITERAL = re.compile(r"\^?[\w.\\-]+\$?")


def recognise(file: Source) -> bool:
    own = (_TOKEN, _PART, _COPY)
    return any(_half(name) is not None or any(one.fullmatch(name) for one in own) for name in file.tensors)


def read(file: Source) -> Adapter:
    """Raises AdapterFormatError for names that are not understood (nothing is skipped) and for broken metadata."""
    halves: dict[str, Half] = {}
    magnitudes: dict[str, tuple[str, str]] = {}
    copies: dict[str, tuple[str, str, str]] = {}
    words = {name: place for name in file.tensors if (place := _TOKEN.fullmatch(name))}
    parts = {name: place for name in file.tensors if (place := _PART.fullmatch(name))}
    for name in file.tensors:
        half, lengths, copied = _half(name), _magnitude(name), _COPY.fullmatch(name)
        if name in words or name in parts:
            continue
        if half is not None:
            halves[name] = half
        elif lengths is not None:
            magnitudes[name] = lengths
        elif copied is not None:
            copies[name] = (copied[1], canonical_path(copied[1], copied[2]), copied[3])
        else:
            raise file.error(_why_unknown(name))
    described = _described(file)
    components = read_pairs(file, halves, lambda component, path, rank: _scale(file, described, component, path, rank))
    _add_magnitudes(file, described, components, magnitudes)
    configs = {component: inferred_config(layers) for component, layers in components.items()}
    for name in words:
        if len(file.tensors[name].shape) != 2:
            raise file.error(f"has {name} with shape {list(file.tensors[name].shape)}; (vectors, dim) is known")
    methods = method_configs(file)
    for name, place in parts.items():
        if (place[1], place[2]) not in methods:
            raise file.error(f"has {name}, and does not say how that part was made")
    values = file.read([*copies, *words, *parts])
    learned: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for name, (component, path, tensor) in copies.items():
        learned.setdefault(component, {}).setdefault(path, {})[tensor] = values[name]
    tokens: dict[str, dict[str, torch.Tensor]] = {}
    for name, place in words.items():
        tokens.setdefault(place[1], {})[place[2]] = values[name]
    made: dict[str, dict[str, Learned]] = {}
    for (component, kind), config in methods.items():
        mine = {place[3]: values[name] for name, place in parts.items() if (place[1], place[2]) == (component, kind)}
        made.setdefault(component, {})[kind] = Learned(config, mine)
    return Adapter(components, configs, copies=learned, tokens=tokens, methods=made)


def write(adapter: Adapter) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of the file. Scales other than 1 go into B, computed in fp32 or better.

    Raises AdapterFormatError for virtual tokens of a language model.
    """
    if adapter.prompts:
        raise AdapterFormatError("not written: the diffusers format has no place for virtual tokens, format='peft' has")
    tensors: dict[str, torch.Tensor] = {}
    described: dict[str, Any] = {}
    for component, layers in adapter.components.items():
        layers = _of_one_rank(layers)
        for path, layer in layers.items():
            key = f"{component}.{canonical_path(component, path)}"
            tensors[f"{key}.lora_A.weight"] = layer.a
            tensors[f"{key}.lora_B.weight"] = _folded(layer)
            if layer.magnitude is not None:
                wide = (1, -1, 1, 1) if layer.a.ndim == 4 else (-1,)
                tensors[f"{key}.lora_magnitude_vector"] = layer.magnitude.view(wide)
        described.update({f"{component}.{field}": value for field, value in _minimal(component, layers).items()})
    for component, modules in adapter.copies.items():
        for path, values in modules.items():
            tensors.update({f"{component}.{path}.{COPY}.{name}": value for name, value in values.items()})
    for word, vectors in adapter.tokens.items():
        tensors.update({f"lora_tokens.{word}.{component}": vector for component, vector in vectors.items()})
    for component, learned in adapter.methods.items():
        for kind, part in learned.items():
            tensors.update({f"{component}.{PARTS}.{kind}.{name}": value for name, value in part.tensors.items()})
    return tensors, {"format": "pt", METADATA_KEY: json.dumps(described, sort_keys=True)}


def _half(name: str) -> Half | None:
    component, _, rest = name.partition(".")
    if component in COMPONENTS:
        for side, endings in _SPELLINGS.items():
            for ending in endings:
                path = rest.removesuffix(ending)
                if path and path != rest:
                    return Half(component, canonical_path(component, path), side)
    return None


def _magnitude(name: str) -> tuple[str, str] | None:
    """(component, path) of a tensor that holds DoRA's lengths."""
    component, _, rest = name.partition(".")
    for ending in _MAGNITUDE:
        path = rest.removesuffix(ending)
        if component in COMPONENTS and path and path != rest:
            return component, canonical_path(component, path)
    return None


def _add_magnitudes(
    file: Source,
    described: Mapping[str, Any],
    components: dict[str, dict[str, LowRank]],
    magnitudes: Mapping[str, tuple[str, str]],
) -> None:
    """Put DoRA's lengths to their factors; raises AdapterFormatError where there are none, or of another width."""
    for name, (component, path) in magnitudes.items():
        layer = components.get(component, {}).get(path)
        if layer is None:
            raise file.error(f"has {name} without the factors that it belongs to")
        if math.prod(file.tensors[name].shape) != layer.b.shape[0]:
            raise file.error(f"has {name} with shape {list(file.tensors[name].shape)} for {layer.b.shape[0]} outputs")
    values = file.read(list(magnitudes)) if magnitudes else {}
    for name, (component, path) in magnitudes.items():
        layer = components[component][path]
        components[component][path] = dataclasses.replace(layer, magnitude=values[name].flatten())
    for component, layers in components.items():
        bare = [path for path, layer in layers.items() if layer.magnitude is None]
        if described.get(f"{component}.use_dora") is True and bare:
            raise file.error(f"says that it uses DoRA, and has no lengths for {component}.{bare[0]}")


def _why_unknown(name: str) -> str:
    for ending, method in _NOT_BUILT.items():
        if name.endswith(ending):
            return f"uses {method} ({name}), which this version cannot load"
    return f"has a tensor that is not understood in the diffusers dialect: {name}"


def _folded(layer: LowRank) -> torch.Tensor:
    if layer.scale == 1.0:
        return layer.b
    exact = torch.promote_types(layer.b.dtype, torch.float32)
    return (layer.b.to(exact) * layer.scale).to(layer.b.dtype)


def _of_one_rank(layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The same layers, all of the largest rank; grouped convolutions, whose ranks are in blocks, as they are."""
    most = max(layer.rank for layer in layers.values())
    padded = {}
    for path, layer in layers.items():
        more = most - layer.rank
        if more and layer.b.shape[1] == layer.rank:
            a = torch.cat([layer.a, layer.a.new_zeros(more, *layer.a.shape[1:])])
            b = torch.cat([layer.b, layer.b.new_zeros(layer.b.shape[0], more, *layer.b.shape[2:])], dim=1)
            layer = dataclasses.replace(layer, a=a, b=b)
        padded[path] = layer
    return padded


def _minimal(component: str, layers: Mapping[str, LowRank]) -> dict[str, Any]:
    """The least that diffusers needs, per component; one unknown field more and older readers refuse the file.

    Names are whole paths, so that no layer beside them is touched; without CLIP's `text_model.`, whose presence depends
    on the transformers version, they match as suffixes.
    """
    ranks = {path.removeprefix("text_model."): layer.rank for path, layer in layers.items()}
    r = max(dict.fromkeys(ranks.values()), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != r}
    fields = {
        "r": r,
        "lora_alpha": r,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    return {**fields, "use_dora": True} if any(layer.magnitude is not None for layer in layers.values()) else fields


def _described(file: Source) -> dict[str, Any]:
    """The parsed `lora_adapter_metadata`, or {}."""
    if METADATA_KEY not in file.metadata:
        return {}
    return _parsed(file, METADATA_KEY)


def _scale(file: Source, described: Mapping[str, Any], component: str, path: str, rank: int) -> float:
    """alpha / rank, or alpha / √rank, with alpha from the metadata's pattern or default, else the rank."""
    alpha = described.get(f"{component}.lora_alpha", rank)
    patterns = described.get(f"{component}.alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise file.error(f"has metadata that is not understood: {component}.alpha_pattern is no table")
    for pattern, value in patterns.items():
        if _LITERAL.fullmatch(pattern) is None:
            raise file.error(f"has an alpha_pattern that is more than a name, which is not followed: {pattern[:80]!r}")
        name = pattern.strip("^$").replace("\\", "")
        if any(spelled == name or spelled.endswith(f".{name}") for spelled in (path, path.removeprefix("text_model."))):
            alpha = value
            break
    if not is_number(alpha):
        raise file.error(f"has metadata that is not understood: alpha of {component}.{path} is {str(alpha)[:40]!r}")
    return alpha / math.sqrt(rank) if described.get(f"{component}.use_rslora") is True else alpha / rank


def _parsed(file: Source, key: str) -> dict[str, Any]:
    try:
        value = json.loads(file.metadata[key])
    except (ValueError, RecursionError):
        raise file.error(f"has metadata {key!r} that is not JSON") from None
    if not isinstance(value, dict):
        raise file.error(f"has metadata {key!r} that is not a table")
    return value
