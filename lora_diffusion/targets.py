"""Which modules of a model an adapter goes to: presets, names, suffixes, regexes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from torch import nn

from .config import LoraConfig, pattern_fits
from .errors import AdapterMismatchError
from .layers import LoraLinear, layer_kind, why_not
from .methods.config import MethodConfig

# Last parts of the module paths of attention projections: UNet (to_*), CLIP and Llama-like (*_proj), BERT-like
# (query …), GPT-2 (c_attn, attn.c_proj), GPT-NeoX, Falcon and BLOOM (query_key_value), T5 (SelfAttention.q).
_QV = r"to_q|to_v|q_proj|v_proj|query|value|query_proj|value_proj|query_key_value|c_attn|(Self|EncDec)Attention\.[qv]"
_QKVO = (
    rf"{_QV}|to_k|to_out\.0|k_proj|out_proj|o_proj|key|attention\.output\.dense|attention\.dense|self_attention\.dense"
    r"|key_proj|attn\.c_proj|(Self|EncDec)Attention\.[ko]"
)
PRESETS = {
    "attention": re.compile(rf"(.*\.)?({_QKVO})"),
    "attention-qv": re.compile(rf"(.*\.)?({_QV})"),
    "all-linear": re.compile(r".*"),
}
_PLAIN_NAME = re.compile(r"[\w.]+")


def find_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """{path: module} of the modules in `model` that `config` names, in the order of `named_modules()`.

    A list entry is a whole path or a suffix of one; a string that is no preset is a regex for the whole path, or a
    plain name meant as a list of one. A preset passes over modules of kinds that cannot be adapted.
    Raises AdapterMismatchError, with the nearest names, if nothing matches, and if a name that was asked for belongs
    to a module that cannot be adapted.
    """
    modules = weighted_modules(model)
    preset = isinstance(config.target_modules, str) and config.target_modules in PRESETS
    matched = {path: module for path, module in modules.items() if matches(config.target_modules, path)}
    if config.exclude_modules is not None:
        matched = {path: module for path, module in matched.items() if not matches(config.exclude_modules, path)}
    if config.target_modules == "all-linear":
        head = _output_head(model)
        matched = {path: m for path, m in matched.items() if m is not head and _is_linear(m)}
    matched = {path: module for path, module in matched.items() if config.chooses_layer(path)}
    whole = tuple(find_copies(model, config))
    matched = {path: m for path, m in matched.items() if not f"{path}.".startswith(tuple(f"{w}." for w in whole))}
    refused = {path: why_not(module) for path, module in matched.items() if layer_kind(module) is None}
    usable = {path: module for path, module in matched.items() if path not in refused}
    if refused and not (preset and usable):
        path, reason = next(iter(refused.items()))
        raise AdapterMismatchError(
            f"target_modules={_shown(config.target_modules)} names {len(refused)} modules that cannot be adapted, "
            f"the first is {path}: {reason}; name others or put it into exclude_modules"
        )
    if not usable:
        adaptable = [path for path, module in modules.items() if layer_kind(module) is not None]
        raise AdapterMismatchError(
            f"target_modules={_shown(config.target_modules)} matches no module of {type(model).__name__}; "
            f"{nearest_words(config.target_modules, adaptable)}"
        )
    return usable


def find_copies(model: nn.Module, config: LoraConfig | MethodConfig) -> dict[str, nn.Module]:
    """{path: module} of what `modules_to_save` names: whole paths or suffixes of one.

    Raises AdapterMismatchError for a name that matches nothing, with the nearest names, and for modules that lie in
    each other.
    """
    found: dict[str, nn.Module] = {}
    paths = {path: module for path, module in model.named_modules() if path and ".adapter_" not in path}
    for name in config.modules_to_save or ():
        mine = {path: module for path, module in paths.items() if matches([name], path)}
        if not mine:
            raise AdapterMismatchError(f"modules_to_save: {name!r} matches nothing; {nearest_words(name, paths)}")
        found.update(mine)
    for path in found:
        inside = next((other for other in found if other.startswith(f"{path}.")), None)
        if inside is not None:
            raise AdapterMismatchError(f"modules_to_save names {path} and {inside}, which is a part of it: name one")
    return found


def weighted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of the modules with a weight matrix of their own; shared modules once, under their first path."""
    return {
        path: module
        for path, module in model.named_modules()
        if path and getattr(module, "weight", None) is not None and getattr(module.weight, "ndim", 0) >= 2
    }


def matches(names: str | Iterable[str], path: str) -> bool:
    """Whether a `target_modules` or `exclude_modules` value names the module at `path`."""
    if not isinstance(names, str):
        return any(path == name or path.endswith(f".{name}") for name in names)
    if names in PRESETS:
        return PRESETS[names].fullmatch(path) is not None
    if _PLAIN_NAME.fullmatch(names) and (path == names or path.endswith(f".{names}")):
        return True
    return re.fullmatch(names, path) is not None


def nearest_words(wanted: str | Iterable[str], available: Iterable[str]) -> str:
    """A clause for an error message: the nearest names, whole paths for paths and last parts for short names."""
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    paths = list(dict.fromkeys(available))
    leaves = list(dict.fromkeys(_leaf(path) for path in paths))
    if not paths:
        return "it has no module that can be adapted"
    found: list[str] = []
    for name in wanted[:3]:
        near = difflib.get_close_matches(name, paths, n=2, cutoff=0.6) if "." in name else []
        found += near or difflib.get_close_matches(_leaf(name), leaves, n=3, cutoff=0.5)
    if found:
        return f"the nearest names are {', '.join(dict.fromkeys(found))}"
    shown = ", ".join(leaves[:8]) + (" …" if len(leaves) > 8 else "")
    return f"no name is near; there are {shown}"


def _leaf(path: str) -> str:
    parts = path.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() and len(parts) > 1 else parts[-1]


def _is_linear(module: nn.Module) -> bool:
    kind = layer_kind(module)
    return kind is not None and issubclass(kind, LoraLinear)


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None


def _shown(names: str | Iterable[str]) -> str:
    text = repr(names if isinstance(names, str) else list(names))
    return text if len(text) <= 120 else text[:117] + "…"


def unmatched_patterns(patterns: Mapping[str, object], paths: Iterable[str]) -> list[str]:
    """The keys of a rank_pattern or alpha_pattern that fit none of `paths`."""
    paths = list(paths)
    return [pattern for pattern in patterns if not any(pattern_fits(pattern, path) for path in paths)]
