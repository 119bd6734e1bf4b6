"""The dialect of kohya's trainers, which A1111, Forge and ComfyUI read.

Per module `<name>.lora_down.weight` (r, in) or (r, in, kh, kw), `<name>.lora_up.weight` (out, r) or (out, r, 1, 1),
`<name>.alpha` with one number, and from LyCORIS `<name>.dora_scale` (out, 1) or (out, 1, 1, 1), DoRA's lengths.
`kohya_names.py` has the names. The scale is alpha / r; without alpha, or with an alpha of 0, it is 1.

Not every reader honours an alpha per module (diffusers takes the commonest one for all), so what is written has one
alpha for all of a component, and what is left of the scales is multiplied into `lora_up`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..adapter import Adapter, LowRank, inferred_config
from ..config import is_number
from ..errors import AdapterFormatError
from .kohya_names import PREFIXES, TEXT, TEXT_2, UNET, parse, spell
from .pairs import Half, read_pairs
from .safetensors_file import tensor_bytes
from .source import Source

NAME = "kohya"
# Hashes of the tensors that were read: of any other file they would be wrong.
METADATA_KEYS = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")

_DOWN, _UP, _ALPHA, _DORA = ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale"
_Place = tuple[str, str]  # component, module path

# What the file says of its base: ss_base_model_version, modelspec.architecture (None: there are several), whether SD2.
_BASES = {
    "sd1": ("sd_v1", "stable-diffusion-v1/lora", False),
    "sd2": ("sd_v2", None, True),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", False),
}
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_ONLY_SDXL = re.compile(r"add_embedding\..*|.*\.transformer_blocks\.[1-9].*")


def recognise(file: Source) -> bool:
    starts = tuple(PREFIXES)
    return any(name.endswith((_DOWN, _UP)) and name.replace(".", "_").startswith(starts) for name in file.tensors)


def read(file: Source) -> Adapter:
    """Raises AdapterFormatError for names that are not understood (nothing is skipped) and for misshapen tensors."""
    halves: dict[str, Half] = {}
    alphas: dict[_Place, str] = {}
    lengths: dict[_Place, str] = {}
    for name in file.tensors:
        ending = next((ending for ending in (_DOWN, _UP, _ALPHA, _DORA) if name.endswith(ending)), None)
        if ending is None:
            raise file.error(f"has a tensor that is not understood in the kohya dialect: {name}")
        place = parse(name.removesuffix(ending))
        if place is None:
            raise file.error(f"has a tensor for a module that Stable Diffusion 1, 2 and XL do not have: {name}")
        if ending in (_DOWN, _UP):
            halves[name] = Half(*place, "a" if ending == _DOWN else "b")
        else:
            _note(file, alphas if ending == _ALPHA else lengths, place, name)
    pairs = {(half.component, half.path) for half in halves.values()}
    for place, name in (*alphas.items(), *lengths.items()):
        if place not in pairs:
            raise file.error(f"has {name} without the factors that it belongs to")
    values = _alphas(file, alphas)
    components = read_pairs(file, halves, lambda component, path, rank: (values.get((component, path)) or rank) / rank)
    _add_lengths(file, components, lengths)
    configs = {component: inferred_config(layers) for component, layers in components.items()}
    return Adapter(components, configs, notes=_assumptions(pairs, values))


def write(adapter: Adapter) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of the file. Raises AdapterFormatError for what the format has no place or no name for."""
    _refuse_what_has_no_place(adapter)
    base = _base(adapter)
    tensors: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for component, layers in adapter.components.items():
        alphas[component] = alpha = _common_alpha(layers.values())
        for path, layer in layers.items():
            name = spell(component, path, sdxl=base == "sdxl")
            if name is None:
                family = "Stable Diffusion XL" if base == "sdxl" else "Stable Diffusion"
                raise AdapterFormatError(
                    f"not written: the kohya format has no name for {component}.{path} in {family}; "
                    "format='diffusers' has"
                )
            tensors[name + _DOWN] = layer.a
            tensors[name + _ALPHA] = stored = torch.tensor(alpha, dtype=layer.b.dtype)
            tensors[name + _UP] = _folded(layer, float(stored))
            if layer.magnitude is not None:
                tensors[name + _DORA] = layer.magnitude.view(-1, *(1 for _ in layer.a.shape[1:]))
    strings = {"format": "pt", **_about_base(adapter, base), **_about_network(adapter, alphas), **_about_run(adapter)}
    strings["sshs_model_hash"] = _model_hash(tensors)
    return tensors, strings


def _note(file: Source, places: dict[_Place, str], place: _Place, name: str) -> None:
    if place in places:
        raise file.error(f"has {'.'.join(place)} twice, as {places[place]} and as {name}")
    places[place] = name


def _alphas(file: Source, names: Mapping[_Place, str]) -> dict[_Place, float]:
    for name in names.values():
        if file.tensors[name].shape not in ((), (1,)):
            raise file.error(f"has {name} with shape {list(file.tensors[name].shape)}; one number is known")
    values = file.read(list(names.values()))
    return {place: float(values[name]) for place, name in names.items()}


def _add_lengths(file: Source, components: dict[str, dict[str, LowRank]], names: Mapping[_Place, str]) -> None:
    """Put DoRA's lengths to their factors; raises AdapterFormatError for lengths that are not the outputs'."""
    for (component, path), name in names.items():
        shape, outputs = file.tensors[name].shape, components[component][path].b.shape[0]
        if shape[:1] == (1,) and outputs > 1:
            raise file.error(
                f"uses DoRA with lengths per input ({name}, shape {list(shape)}), which this version cannot load; "
                "lengths per output (LyCORIS: wd_on_output) are known"
            )
        if shape[:1] != (outputs,) or any(size != 1 for size in shape[1:]):
            raise file.error(f"has {name} with shape {list(shape)} for {outputs} outputs")
    values = file.read(list(names.values()))
    for (component, path), name in names.items():
        layer = components[component][path]
        components[component][path] = dataclasses.replace(layer, magnitude=values[name].flatten())


def _assumptions(pairs: Iterable[_Place], alphas: Mapping[_Place, float]) -> list[str]:
    bare = sum(not alphas.get(place) for place in pairs)
    return [f"{bare} modules have no alpha, or one of 0: taken to be their rank (scale 1)"] if bare else []


def _refuse_what_has_no_place(adapter: Adapter) -> None:
    for held, what, advice in (
        (adapter.tokens, "learned words", "format='diffusers' has"),
        (adapter.copies, "whole modules (modules_to_save)", "format='diffusers' has"),
        (adapter.prompts, "virtual tokens of a language model", "format='peft' has"),
        (adapter.methods, "methods other than low rank", "format='diffusers' has"),
    ):
        if held:
            raise AdapterFormatError(
                f"not written: the kohya format has no place for {what} ({next(iter(held))}); {advice}"
            )
    for component in adapter.components:
        if component not in (UNET, TEXT, TEXT_2):
            raise AdapterFormatError(
                f"not written: the kohya format is for Stable Diffusion's UNets and text encoders, the adapter is for "
                f"{component!r}; format='diffusers' or 'peft' has a place for it"
            )


def _base(adapter: Adapter) -> str | None:
    """The family of the base model, as far as the adapter shows it: a key of _BASES."""
    if adapter.components.get(TEXT_2):
        return "sdxl"
    layers = adapter.components.get(UNET, {})
    for path, layer in layers.items():
        if path.endswith(("attn2.to_k", "attn2.to_v")) and layer.a.shape[1] in _WIDTHS:
            return _WIDTHS[layer.a.shape[1]]
    said = (adapter.foreign.get("ss_base_model_version", ""), adapter.foreign.get("modelspec.architecture", ""))
    if (
        said[0].startswith("sdxl")
        or said[1].startswith("stable-diffusion-xl")
        or any(map(_ONLY_SDXL.fullmatch, layers))
    ):
        return "sdxl"
    return None


def _common_alpha(layers: Iterable[LowRank]) -> float:
    """The layers' alpha if they have the same and their dtypes hold it exactly, else their commonest rank."""
    layers = list(layers)
    alphas = {float(torch.tensor(layer.alpha, dtype=torch.float32)) for layer in layers}
    if len(alphas) == 1:
        (alpha,) = alphas
        if alpha > 0 and all(float(torch.tensor(alpha, dtype=layer.b.dtype)) == alpha for layer in layers):
            return alpha
    ranks = [layer.rank for layer in layers]
    return float(max(dict.fromkeys(ranks), key=ranks.count))


def _folded(layer: LowRank, alpha: float) -> torch.Tensor:
    """B times what alpha / rank leaves of the scale, computed in fp64."""
    rest = layer.alpha / alpha
    return layer.b if abs(rest - 1) < 1e-7 else (layer.b.double() * rest).to(layer.b.dtype)


def _about_base(adapter: Adapter, base: str | None) -> dict[str, str]:
    """Only what the adapter shows, and only where the file that it came from says nothing itself."""
    strings = {"modelspec.implementation": "diffusers", "modelspec.title": "LoRA"}
    if base is not None:
        version, architecture, is_v2 = _BASES[base]
        strings |= {"ss_base_model_version": version, "ss_v2": str(is_v2)}
        if architecture is not None:
            strings |= {"modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": architecture}
    if base == "sdxl":
        strings["modelspec.implementation"] = "https://github.com/Stability-AI/generative-models"
    return {key: value for key, value in strings.items() if key not in adapter.foreign}


def _about_network(adapter: Adapter, alphas: Mapping[str, float]) -> dict[str, str]:
    """Ranks and alphas; those of convolutions of more than 1×1 apart, as kohya has them."""
    found = [
        (layer, alphas[component]) for component, layers in adapter.components.items() for layer in layers.values()
    ]
    wide = [(layer.rank, alpha) for layer, alpha in found if max(layer.a.shape[2:], default=1) > 1]
    rest = [(layer.rank, alpha) for layer, alpha in found if max(layer.a.shape[2:], default=1) == 1]
    dora = any(layer.magnitude is not None for layer, _ in found)
    args = {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"} if dora else {}
    if wide:
        args |= {"conv_dim": _only(rank for rank, _ in wide), "conv_alpha": _only(alpha for _, alpha in wide)}
    return {
        "ss_network_module": "lycoris.kohya" if dora else "networks.lora",
        "ss_network_dim": _only(rank for rank, _ in rest or wide),
        "ss_network_alpha": _only(alpha for _, alpha in rest or wide),
        "ss_network_args": json.dumps(args),
    }


def _only(values: Iterable[float]) -> str:
    """The value that all have, or kohya's word for several."""
    different = set(values)
    return str(*different) if len(different) == 1 else "Dynamic"


def _about_run(adapter: Adapter) -> dict[str, str]:
    """What the adapter's own metadata says of its training, under kohya's names."""
    settings = adapter.metadata.get("settings")
    known: dict[str, Any] = {**(settings if isinstance(settings, Mapping) else {}), **adapter.metadata}
    numbers = {"steps": "ss_steps", "learning_rate": "ss_learning_rate", "seed": "ss_seed"}
    strings = {key: str(known[name]) for name, key in numbers.items() if is_number(known.get(name))}
    side = known.get("resolution")
    if is_number(side):
        strings |= {"ss_resolution": f"({side}, {side})", "modelspec.resolution": f"{side}x{side}"}
    words = known.get("trigger_words")
    phrase = ", ".join(map(str, words)) if isinstance(words, list) else known.get("instance_prompt")
    texts = {
        "modelspec.trigger_phrase": phrase,
        "modelspec.title": known.get("title"),
        "ss_sd_model_name": known.get("base_model"),
    }
    return {**strings, **{key: text for key, text in texts.items() if isinstance(text, str) and text}}


def _model_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """`TensorFile.sha256()` of the file that `write_tensor_file` makes of these tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()
