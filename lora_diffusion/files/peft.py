"""The dialect of PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Names are `base_model.model.<module path>.<tensor>`:
    .lora_A.weight (r, in), .lora_B.weight (out, r), or (r, in, kh, kw) and (out, r, 1, 1) beside a convolution;
        beside a Conv1D they are those of a Linear layer
    .lora_embedding_A (r, entries), .lora_embedding_B (dim, r)
    .lora_magnitude_vector (out,), or (1, out, 1, 1) beside a convolution
    .<tensor> of a whole module that was learned beside (`modules_to_save`)
and `prompt_embeddings` alone for prompt tuning, P-tuning and prefix tuning.

Ranks are those of the tensors, scales come from the config; a file without a config is read with alpha = rank. The
folder of a whole pipeline has one such folder per component, `unet/`, `text_encoder/` …

CLIP text encoders are read with and without `text_model.`; what is written is `peft_write.py`'s.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..adapter import COPY, Adapter, LowRank, inferred_config
from ..components import BARE, COMPONENTS, canonical_path
from ..config import LoraConfig
from ..errors import AdapterFormatError
from .own import OWN_KEY, describe
from .pairs import Half, read_pairs
from .peft_config import CONFIG, HEADS, PROMPTS, PeftConfig, read_config
from .peft_layers import PEFT_KEY, is_embedding
from .peft_prompt import PROMPT, read_prompt
from .peft_write import TENSORS, write_folder
from .safetensors_file import TensorFile
from .source import Source

__all__ = ["NAME", "read", "read_folder", "recognise", "recognise_folder", "write_folder"]

NAME = "peft"
PICKLE = "adapter_model.bin"

_PREFIX = "base_model.model."
_HALF = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(\.weight)?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_COPY = re.compile(rf"(.+?)\.{COPY}\.(?:default\.)?(.+)")
_BASE = re.compile(r"(.+)\.(?:base_layer|original_module)\.\w+")
_NOT_BUILT = {
    r".+\.lora_[AB](\.default)?\.bias": "a LoRA bias",
    r".+\.trainable_tokens_\w+(\.default)?": "trainable tokens",
    r".+\.lora_E(\.default)?": "AdaLoRA",
}
# Tables that PEFT saves where the vocabulary grew.
_TABLES = re.compile(r"(?:.+\.)?(?:embed_tokens|lm_head|wte|word_embeddings|shared|embed_in|embed_out)")
_BY_CLASS = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}


def recognise(file: Source) -> bool:
    return PROMPT in file.tensors or any(name.startswith(_PREFIX) for name in file.tensors)


def recognise_folder(path: Path) -> bool:
    return bool(_parts(path))


def read(file: Source) -> Adapter:
    """The config is the one that lies beside the file.

    Raises AdapterFormatError for names that are not understood, for a method that is not LoRA or a prompt's, and for a
    config that is not sound.
    """
    return _read(file, None)


def read_folder(path: Path) -> Adapter:
    """Of one component, or of a pipeline's. Raises AdapterFormatError, also where the tensors are a pickle."""
    adapters = []
    for component, folder in _parts(path).items():
        tensors = folder / TENSORS
        if not tensors.is_file() and (folder / PICKLE).is_file():
            raise AdapterFormatError(
                f"{folder / PICKLE} is a pickle, and opening one can run its author's code: "
                "make a safetensors file of it with `lora-diffusion convert`, which opens it without running anything"
            )
        if not tensors.is_file():
            raise AdapterFormatError(f"{folder} has {CONFIG} and no {TENSORS}")
        file = TensorFile(tensors)
        adapter = _read(file, component)
        adapter.foreign = {key: value for key, value in file.metadata.items() if key not in (OWN_KEY, "format")}
        describe(file, adapter)
        adapters.append(adapter)
    return _joined(adapters)


def _parts(path: Path) -> dict[str | None, Path]:
    """{component: folder} of a pipeline, {None: path} of one component, {} if it is neither."""
    if (path / CONFIG).is_file() or ((path / PICKLE).is_file() and not (path / TENSORS).is_file()):
        return {None: path}
    return {component: path / component for component in COMPONENTS if (path / component / CONFIG).is_file()}


def _read(file: Source, component: str | None) -> Adapter:
    beside = file.path.parent / CONFIG
    config = read_config(beside) if beside.is_file() else None
    if config is not None and config.kind in PROMPTS:
        adapter = read_prompt(file, config)
        prefix = "base_model."
        rest = [name for name in file.tensors if name != PROMPT]
    elif PROMPT in file.tensors:
        words = f"beside a {CONFIG} of {config.kind}" if config is not None else f"and no {CONFIG} beside it"
        raise file.error(f"has {PROMPT} {words}: there is no telling what they are")
    else:
        adapter = Adapter({})
        prefix = _PREFIX
        rest = list(file.tensors)
    stray = next((name for name in rest if not name.startswith(prefix)), None)
    if stray is not None:
        raise file.error(f"has a tensor that is not understood in PEFT's dialect: {stray} (no {prefix} in front)")
    names = {name: name.removeprefix(prefix) for name in rest}
    where = component or _component(file, config, names.values())
    if adapter.prompts:
        _add_copies(file, config, adapter, where, names)
    else:
        _add_layers(file, config, adapter, where, names)
    if config is None:
        adapter.notes.append(f"no {CONFIG} beside the file: read with alpha = rank")
    else:
        adapter.notes += config.notes
        _describe(config, adapter)
    return adapter


def _add_layers(
    file: Source, config: PeftConfig | None, adapter: Adapter, component: str, names: Mapping[str, str]
) -> None:
    halves: dict[str, Half] = {}
    magnitudes: dict[str, str] = {}
    others: dict[str, str] = {}
    tables: set[str] = set()
    for name, short in names.items():
        half, lengths = _HALF.fullmatch(short), _MAGNITUDE.fullmatch(short)
        if half is not None and (half[2] or half[4]):
            path = canonical_path(component, half[1])
            halves[name] = Half(component, path, half[3].lower())
            tables |= {path} if half[2] else set()
        elif lengths is not None:
            magnitudes[name] = canonical_path(component, lengths[1])
        else:
            others[name] = short
    _add_copies(file, config, adapter, component, others)
    if not halves:
        raise file.error("has no LoRA factors")
    spelled = {h.path: names[name][: names[name].rindex(".lora_")] for name, h in halves.items()}

    def scale(_: str, path: str, rank: int) -> float:
        return config.scale(spelled[path], rank) if config is not None else 1.0

    layers = read_pairs(file, halves, scale)[component]
    _add_magnitudes(file, layers, magnitudes)
    bare = next((path for path, layer in layers.items() if layer.magnitude is None and path not in tables), None)
    if config is not None and config.fields.get("use_dora") and bare is not None:
        raise file.error(f"has no lengths for {bare}, and its {CONFIG} says that it uses DoRA")
    adapter.components[component] = layers
    adapter.configs[component] = _lora_config(config, layers, adapter.copies.get(component, {}))
    unusual = {path: path in tables for path in layers if is_embedding(path) != (path in tables)}
    if unusual:
        adapter.metadata.setdefault(PEFT_KEY, {})["embeddings"] = unusual


def _add_magnitudes(file: Source, layers: dict[str, LowRank], magnitudes: Mapping[str, str]) -> None:
    """Put DoRA's lengths to their factors; raises AdapterFormatError where there are none, or of another width."""
    for name, path in magnitudes.items():
        if path not in layers:
            raise file.error(f"has {name} without the factors that it belongs to")
        if math.prod(file.tensors[name].shape) != layers[path].b.shape[0]:
            shape = list(file.tensors[name].shape)
            raise file.error(f"has {name} with shape {shape} for {layers[path].b.shape[0]} outputs")
    values = file.read(list(magnitudes)) if magnitudes else {}
    for name, path in magnitudes.items():
        layers[path] = dataclasses.replace(layers[path], magnitude=values[name].flatten())


def _add_copies(
    file: Source, config: PeftConfig | None, adapter: Adapter, component: str, names: Mapping[str, str]
) -> None:
    """Take what is left as tensors of whole modules; raises AdapterFormatError for what is none."""
    learned: dict[tuple[str, str], str] = {}
    bases: list[str] = []
    for name, short in names.items():
        if _BASE.fullmatch(short) and COPY not in short:
            bases.append(short)
            continue
        place = _copied(config, short)
        if place is None:
            raise file.error(_why_unknown(name, config))
        place = (canonical_path(component, place[0]), place[1])
        if place in learned:
            raise file.error(f"has {place[0]} twice, as {learned[place]} and as {name}")
        learned[place] = name
    if bases:
        adapter.notes.append(
            f"the file holds weights of the base model too, such as {bases[0]}, which are not loaded: "
            "where the vocabulary was resized, resize the model's first"
        )
    values = file.read(list(learned.values())) if learned else {}
    for (path, tensor), name in learned.items():
        adapter.copies.setdefault(component, {}).setdefault(path, {})[tensor] = values[name]


def _copied(config: PeftConfig | None, short: str) -> tuple[str, str] | None:
    """(module path, tensor) of a learned copy: the outermost module whose path ends like an entry of modules_to_save,
    which is PEFT's rule."""
    explicit = _COPY.fullmatch(short)
    if explicit is not None:
        return explicit[1], explicit[2]
    if "lora_" in short:
        return None
    fields: Mapping[str, Any] = config.fields if config is not None else {}
    task = fields.get("task_type")
    heads = HEADS.get(task, ()) if config is not None and task else [h for found in HEADS.values() for h in found]
    entries = (*(fields.get(COPY) or ()), *heads)
    words = short.split(".")
    for count in range(1, len(words)):
        path = ".".join(words[:count])
        if path.endswith(entries):
            return path, ".".join(words[count:])
    path, _, tensor = short.rpartition(".")
    return (path, tensor) if _TABLES.fullmatch(path) else None


def _why_unknown(name: str, config: PeftConfig | None) -> str:
    for pattern, method in _NOT_BUILT.items():
        if re.fullmatch(pattern, name):
            return f"uses {method} ({name}), which this version cannot load"
    advice = "" if config is not None else f", and no {CONFIG} beside it that could say what it is"
    return f"has a tensor that is not understood in PEFT's dialect: {name}{advice}"


def _component(file: Source, config: PeftConfig | None, paths: Iterable[str]) -> str:
    """What our own description calls it, else what the class of the base says, else what the paths say."""
    try:
        described = json.loads(file.metadata.get(OWN_KEY, "{}"))["config"]
    except (ValueError, RecursionError, TypeError, KeyError):
        described = None
    if isinstance(described, dict) and len(described) == 1 and (only := next(iter(described))) in COMPONENTS:
        return str(only)
    mapping = config.fields.get("auto_mapping") if config is not None else None
    base = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if isinstance(base, str) and base in _BY_CLASS:
        return _BY_CLASS[base]
    paths = list(paths)
    if any(path.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for path in paths):
        return "unet"
    return "text_encoder" if paths and all(path.startswith("text_model.") for path in paths) else BARE


def _lora_config(
    config: PeftConfig | None, layers: Mapping[str, LowRank], copies: Mapping[str, Mapping[str, Any]]
) -> LoraConfig:
    inferred = dataclasses.replace(inferred_config(layers), modules_to_save=sorted(copies) or None)
    if config is None:
        return inferred
    dropout = config.fields.get("lora_dropout") or 0.0
    return dataclasses.replace(
        inferred,
        lora_dropout=dropout if 0 <= dropout < 1 else 0.0,
        task_type=config.fields.get("task_type"),
    )


def _describe(config: PeftConfig, adapter: Adapter) -> None:
    base = config.fields.get("base_model_name_or_path")
    if base:
        adapter.metadata["base_model"] = base
    if config.fields.get("fan_in_fan_out"):
        adapter.metadata.setdefault(PEFT_KEY, {})["fan_in_fan_out"] = True


def _joined(adapters: list[Adapter]) -> Adapter:
    first = adapters[0]
    for other in adapters[1:]:
        for field in ("components", "configs", "copies", "prompts"):
            getattr(first, field).update(getattr(other, field))
        first.metadata = {**other.metadata, **first.metadata}
        first.foreign = {**other.foreign, **first.foreign}
        first.notes += [note for note in other.notes if note not in first.notes]
    known = [adapter.intact for adapter in adapters]
    first.intact = False if False in known else None if None in known else True
    return first
