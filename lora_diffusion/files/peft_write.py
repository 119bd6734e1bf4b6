"""Writing PEFT's folders, for `PeftModel.from_pretrained` and the Auto classes.

The config holds only what PEFT ≥ 0.8 knows. Layers are named by their whole paths. A layer whose rank or alpha differs
has its own pattern: its path without the first word where that is no other layer's too, since older versions match
nothing else. Scales that alpha / r cannot say (zero and below) are multiplied into B.

PEFT loads a folder onto one bare module, and names have to be that module's own: for CLIP's text encoder those of the
installed transformers, which has no `text_model.` since 5.6. CLIPTextModelWithProjection, `text_encoder_2`, keeps it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter, LowRank, inferred_config
from ..components import COMPONENTS
from ..errors import AdapterFormatError, ConfigError
from ..methods.peft_prompts import is_prompt, with_prompts
from .own import OWN_KEY, described
from .peft_config import CONFIG, HEADS
from .peft_layers import is_conv1d, is_embedding
from .peft_prompt import ENCODER, PROMPT, encoder_file, prompt_config
from .safetensors_file import write_tensor_file

TENSORS = "adapter_model.safetensors"
CARD = "README.md"

_FILES = (CONFIG, TENSORS, CARD, ENCODER)
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_folder(adapter: Adapter, path: Path) -> None:
    """One component makes a flat folder, several a sub-folder each. The folder appears, or takes the place of a PEFT
    folder, whole or not at all; a README.md that is there stays.

    Raises AdapterFormatError for what PEFT has no place for, ConfigError for a folder that holds other files.
    """
    path = path.resolve()
    _check_place(path)
    if adapter.tokens:
        word = ascii(next(iter(adapter.tokens)))
        raise AdapterFormatError(f"{path}: not written, PEFT has no place for learned words such as {word}")
    for learned in adapter.methods.values():
        for kind in (kind for kind in learned if not is_prompt(kind)):
            raise AdapterFormatError(f"{path}: not written, PEFT has no place for {kind}; format='diffusers' has")
    adapter = with_prompts(adapter)
    kinds = (adapter.components, adapter.copies, adapter.prompts)
    components = list(dict.fromkeys(name for kind in kinds for name, held in kind.items() if held))
    if not components:
        raise AdapterFormatError(f"{path}: not written, the adapter has nothing that PEFT could hold")
    parts = {component: _part(adapter, component, path) for component in components}
    with _in_place_of(path) as fresh:
        for component, (tensors, config) in parts.items():
            folder = fresh / component if len(parts) > 1 else fresh
            strings = {**adapter.foreign, "format": "pt", OWN_KEY: described(_only(adapter, component), tensors)}
            write_tensor_file(folder / TENSORS, tensors, strings)
            encoder = encoder_file(adapter, component)
            if encoder is not None:
                write_tensor_file(folder / ENCODER, *encoder)
            (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if (path / CARD).is_file():
            shutil.copy2(path / CARD, fresh / CARD)
        else:
            (fresh / CARD).write_text(_card(adapter, list(parts)), encoding="utf-8")


def _part(adapter: Adapter, component: str, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and config of one component."""
    layers, prompt = adapter.components.get(component, {}), adapter.prompts.get(component)
    copies = {_spelled(component, where): values for where, values in adapter.copies.get(component, {}).items()}
    prefix = "base_model.model." if prompt is None else "base_model."
    tensors = {f"{prefix}{where}.{key}": value for where, values in copies.items() for key, value in values.items()}
    if prompt is not None:
        if layers:
            raise AdapterFormatError(f"{path}: not written, a folder of PEFT holds either low-rank layers or a prompt")
        tensors[PROMPT] = prompt.embeddings
        config = prompt_config(prompt, str(path))
        config["base_model_name_or_path"] = config["base_model_name_or_path"] or base_model(adapter)
        return tensors, {**config, "modules_to_save": sorted(copies)} if copies else config
    if not layers:
        raise AdapterFormatError(f"{path}: not written, {component} has whole modules only, and PEFT needs a layer")
    named = {_spelled(component, where): _sound(layer, f"{component}.{where}", path) for where, layer in layers.items()}
    embeddings = {_spelled(component, where) for where in layers if is_embedding(where, adapter.metadata)}
    for where, layer in named.items():
        ending = ".weight" if where not in embeddings else ""
        factor = f"{prefix}{where}.lora_" + ("embedding_" if where in embeddings else "")
        tensors[f"{factor}A{ending}"], tensors[f"{factor}B{ending}"] = layer.a, layer.b
        if layer.magnitude is not None:
            wide = (1, -1, 1, 1) if layer.a.ndim == 4 else (-1,)
            tensors[f"{prefix}{where}.lora_magnitude_vector"] = layer.magnitude.view(wide)
    known = adapter.configs.get(component)
    task = known.task_type if known is not None else None
    if task not in _TASKS or (task in HEADS and not any(where.endswith(HEADS[task]) for where in copies)):
        task = None  # PEFT would look for a head in the file
    config = {
        **_ranks_and_alphas(named, path),
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_model(adapter),
        "target_modules": sorted(named),
        "modules_to_save": sorted(copies) or None,
        "lora_dropout": known.lora_dropout if known is not None else 0.0,
        "bias": "none",
        "fan_in_fan_out": is_conv1d(layers, adapter.metadata),
        "use_rslora": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    return tensors, config


def base_model(adapter: Adapter) -> str | None:
    """The name of the base, as the metadata gives it; a path that a recipe was called with stays private."""
    for key in ("base_model", "pretrained_model_name_or_path"):
        name = adapter.metadata.get(key)
        if isinstance(name, str) and name and (key == "base_model" or _HUB_NAME.fullmatch(name)):
            return name
    return None


def _sound(layer: LowRank, where: str, path: Path) -> LowRank:
    """The layer with a scale above zero. Raises AdapterFormatError for a convolution in groups."""
    if layer.b.shape[1] != layer.rank:
        raise AdapterFormatError(
            f"{path}: not written, {where} is a convolution of several groups, which PEFT holds in another form"
        )
    if layer.scale > 0:
        return layer
    exact = torch.promote_types(layer.b.dtype, torch.float32)
    return dataclasses.replace(layer, b=(layer.b.to(exact) * layer.scale).to(layer.b.dtype), scale=1.0)


def _ranks_and_alphas(layers: Mapping[str, LowRank], path: Path) -> dict[str, Any]:
    ranks = {where: layer.rank for where, layer in layers.items()}
    alphas = {where: _alpha(layer) for where, layer in layers.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    with_lengths = [where for where, layer in layers.items() if layer.magnitude is not None]
    if with_lengths and len(with_lengths) != len(layers):
        other = next(where for where in layers if where not in with_lengths)
        raise AdapterFormatError(
            f"{path}: not written, {with_lengths[0]} uses DoRA and {other} does not, and PEFT has one switch for all"
        )
    differ = [where for where in layers if (ranks[where], alphas[where]) != (r, alpha)]
    patterns = _patterns(differ, layers)
    fields = {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {patterns[where]: ranks[where] for where in differ if ranks[where] != r},
        "alpha_pattern": {patterns[where]: alphas[where] for where in differ if alphas[where] != alpha},
    }
    return {**fields, "use_dora": True} if with_lengths else fields  # PEFT 0.8 refuses a field that it does not know


def _alpha(layer: LowRank) -> float:
    whole = round(layer.alpha)
    return whole if whole / layer.rank == layer.scale else layer.alpha


def _patterns(wanted: Iterable[str], paths: Iterable[str]) -> dict[str, str]:
    """{path: a pattern that fits this one of `paths` only}, the same for ranks and alphas."""
    ends = Counter(".".join(path.split(".")[start:]) for path in paths for start in range(path.count(".") + 1))
    found = {}
    for path in wanted:
        short = path.partition(".")[2]
        found[path] = re.escape(short) if short and ends[short] == 1 else f"^{re.escape(path)}"
    return found


def _spelled(component: str, path: str) -> str:
    return path.removeprefix("text_model.") if component == "text_encoder" and _clip_is_flat() else path


def _clip_is_flat() -> bool:
    try:
        words = importlib.metadata.version("transformers").split(".")
    except importlib.metadata.PackageNotFoundError:
        return True
    return (int(words[0]), int(words[1])) >= (5, 6)


def _only(adapter: Adapter, component: str) -> Adapter:
    """The adapter as one component's file describes it."""
    layers = adapter.components.get(component, {})
    config = adapter.configs.get(component) or (inferred_config(layers) if layers else None)
    return dataclasses.replace(adapter, configs={component: config} if config is not None else {})


def _card(adapter: Adapter, components: list[str]) -> str:
    base = base_model(adapter)
    front = ["---", "library_name: peft", *([f"base_model: {json.dumps(base)}"] if base else []), "---", ""]
    parts = f" for {', '.join(components)}" if len(components) > 1 else ""
    return "\n".join([*front, f"# Adapter{parts}", "", "Load it with `PeftModel.from_pretrained(model, folder)`.", ""])


def _check_place(path: Path) -> None:
    """Raises ConfigError for a folder that holds anything but an adapter of PEFT: replacing it would lose that."""
    if not path.exists():
        return
    for item in path.iterdir():
        inside = list(item.iterdir()) if item.name in COMPONENTS and item.is_dir() else [item]
        strange = next((file for file in inside if file.name not in _FILES or not file.is_file()), None)
        if strange is not None:
            raise ConfigError(
                f"{path} holds {strange.name!a}, which a PEFT folder does not: give the name of a new one"
            )


@contextmanager
def _in_place_of(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill, which takes its place at the end; after an error nothing has changed."""
    fresh, old = (path.with_name(f".{path.name}.{secrets.token_hex(4)}.{word}") for word in ("tmp", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh.mkdir()
    try:
        yield fresh
        there = path.exists()
        if there:
            path.rename(old)
        try:
            fresh.rename(path)
        except BaseException:
            if there:
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
