"""What a target is made of: the components of a pipeline, or one bare module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .errors import AdapterMismatchError, ConfigError

# The attributes of a diffusers pipeline that may carry adapters, and the word for a bare module.
PIPELINE_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
BARE = "model"
COMPONENTS = (*PIPELINE_COMPONENTS, BARE)

# A bare module whose class says which part of a pipeline it is gets that part's name, so its files fit the pipeline.
_BY_CLASS = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}

# transformers 5.6 flattened CLIPTextModel; files and other tools keep the older spelling.
_CLIP_PREFIX = "text_model."
_CLIP_PARTS = ("encoder.layers.", "embeddings.", "final_layer_norm")


def components_of(target: Any) -> dict[str, nn.Module]:
    """{"unet": module, …} for a pipeline; {"model": module} (or the part that its class names) for a bare module.

    Wrappers of torch.compile and of (Distributed)DataParallel are looked through.
    Raises ConfigError if `target` is neither.
    """
    if isinstance(target, nn.Module):
        module = unwrap(target)
        return {_BY_CLASS.get(type(module).__name__, BARE): module}
    found = {name: getattr(target, name, None) for name in PIPELINE_COMPONENTS}
    modules = {name: unwrap(module) for name, module in found.items() if isinstance(module, nn.Module)}
    if not modules:
        raise ConfigError(f"target is a {type(target).__name__}: give an nn.Module or a diffusers pipeline")
    return modules


def choose_components(target: Any, names: Iterable[str] | None) -> dict[str, nn.Module]:
    """The named components of `target`; without names the denoiser of a pipeline, or the bare module itself.

    Raises AdapterMismatchError for a component that the target does not have.
    """
    modules = components_of(target)
    if names is None:
        first = next((name for name in ("unet", "transformer") if name in modules), next(iter(modules)))
        return {first: modules[first]}
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ConfigError("components is empty: name at least one")
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise AdapterMismatchError(
            f"the target has no component {', '.join(map(repr, unknown))}; it has {', '.join(modules)}"
        )
    return {name: modules[name] for name in names}


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile and data parallelism, whose names it would otherwise change."""
    while True:
        if "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]
        elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        else:
            return module


def canonical_path(component: str, path: str) -> str:
    """The spelling used in `Adapter` and in files: `text_model.encoder.layers…` for CLIP text encoders."""
    if component.startswith("text_encoder") and path.startswith(_CLIP_PARTS):
        return _CLIP_PREFIX + path
    return path


def resolve_path(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The name under which the model in hand has the module that an adapter calls `path`, or None."""
    spellings = (path, path.removeprefix(_CLIP_PREFIX), _CLIP_PREFIX + path)
    return next((spelling for spelling in spellings if spelling in modules), None)
