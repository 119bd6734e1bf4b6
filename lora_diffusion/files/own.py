"""Our own description inside a file, whatever its dialect: one JSON string under one name that other tools skip.

    {"version": 1, "config": {component: LoraConfig fields}, "metadata": {…},
     "methods": {component: [MethodConfig fields, …]},
     "base": {component: fingerprint}, "sha256": of the tensors}

It only describes. What is not understood becomes a note, not an error; the tensors and their scales decide.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from ..adapter import Adapter, LowRank
from ..config import LoraConfig
from ..errors import ConfigError
from ..methods.config import MethodConfig
from ..methods.registry import config_from_dict
from .safetensors_file import TensorFile, tensor_bytes, word_of
from .source import Source

OWN_KEY = "lora_diffusion"
OWN_VERSION = 1


def described(adapter: Adapter, tensors: Mapping[str, torch.Tensor]) -> str:
    """The string for a file that holds `tensors`. Raises ConfigError for metadata that is not JSON."""
    methods = {c: [one.config.to_dict() for one in learned.values()] for c, learned in adapter.methods.items()}
    value = {
        "version": OWN_VERSION,
        "config": {component: config.to_dict() for component, config in adapter.configs.items()},
        **({"methods": methods} if methods else {}),
        "metadata": adapter.metadata,
        "base": adapter.bases,
        "sha256": _digest(tensors),
    }
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"metadata: only finite numbers, strings, lists and dicts can go into a file ({error})"
        ) from None


def method_configs(source: Source) -> dict[tuple[str, str], MethodConfig]:
    """{(component, kind): config} of the methods other than low rank.

    Raises AdapterFormatError: without its config, what a method has learned means nothing.
    """
    value = (_parsed(source.metadata[OWN_KEY]) or {}) if OWN_KEY in source.metadata else {}
    methods = value.get("methods", {})
    found: dict[tuple[str, str], MethodConfig] = {}
    for component, configs in methods.items() if isinstance(methods, dict) else ():
        for fields in configs if isinstance(configs, list) else ():
            try:
                config = config_from_dict(fields)
            except (ConfigError, AttributeError, TypeError) as error:
                reason = ascii(str(error))[1:-1][:200]
                raise source.error(f"has a config of {component!a} that is not understood: {reason}") from None
            found[component, config.kind] = config
    return found


def describe(source: Source, adapter: Adapter) -> None:
    """Put what the file says of itself into an adapter that was read from it: configs, metadata, whether intact."""
    if isinstance(source, TensorFile) and "sshs_model_hash" in source.metadata:
        adapter.intact = source.metadata["sshs_model_hash"] == source.sha256()
    if OWN_KEY not in source.metadata:
        return
    value = _parsed(source.metadata[OWN_KEY])
    if value is None:
        adapter.notes.append("the file's own description was not understood (it is no JSON table)")
        return
    if value.get("version") != OWN_VERSION:
        adapter.notes.append(f"written in version {str(value.get('version'))[:20]!a}")
    if isinstance(value.get("metadata"), dict):
        adapter.metadata = value["metadata"]
    if isinstance(value.get("base"), dict):
        adapter.bases = {name: base for name, base in value["base"].items() if isinstance(base, dict)}
    configs = value.get("config")
    for component, fields in (configs if isinstance(configs, dict) else {}).items():
        try:
            adapter.configs.update({component: LoraConfig.from_dict(fields)} if component in adapter.configs else {})
        except (ConfigError, TypeError) as error:
            reason = ascii(str(error))[1:-1][:200]  # it quotes the file: no control characters to the terminal
            adapter.notes.append(
                f"the file's own config of {component} was not understood, and inferred instead ({reason})"
            )
    for component, layers in adapter.components.items():
        for path, layer in layers.items():
            layers[path] = _without_padding(layer, adapter.configs[component].rank_for(path))
    if isinstance(value.get("sha256"), str) and isinstance(source, TensorFile):
        adapter.intact = value["sha256"] == source.sha256(with_names=True)


def _without_padding(layer: LowRank, rank: int) -> LowRank:
    """A layer without the zeros that a format of one rank for all asked for, if that is all that is beyond `rank`."""
    if rank >= layer.rank or layer.b.shape[1] != layer.rank or layer.a[rank:].any() or layer.b[:, rank:].any():
        return layer
    return dataclasses.replace(layer, a=layer.a[:rank].clone(), b=layer.b[:, :rank].clone())


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """`TensorFile.sha256(with_names=True)` of the file that `write_tensor_file` makes of these tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {word_of(tensors[name])} {list(tensors[name].shape)}\n".encode())
    for name in sorted(tensors):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
