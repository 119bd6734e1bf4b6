"""Room for an adapter that is not there yet, and another adapter into the same room: nothing in the model changes but
numbers, so compiled code goes on as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .adapter import Adapter, LowRank
from .components import choose_components, components_of
from .config import LoraConfig
from .errors import AdapterMismatchError, ConfigError
from .layers import LoraFactors, layer_kind
from .state import check_layers, check_new_name, holders, install, state_of
from .targets import find_targets


def reserve_adapter(
    target: Any,
    r: int,
    name: str = "default",
    *,
    target_modules: str | Iterable[str] = "attention",
    components: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, list[str]]:
    """Make an active adapter without effect, with room for any adapter of rank up to `r` in these modules.

    Call it before `torch.compile`, then `load_adapter(target, file, name, hotswap=True)` as often as you like: ranks,
    scales, targets and which components the file has may differ each time, and nothing is compiled again. Unused room
    is zeros and costs its arithmetic.
    components: default, all that a pipeline has.
    Returns {component: paths}. Raises ConfigError or AdapterMismatchError as `add_adapter` does.
    """
    check_new_name(target, name)
    names = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(r=r, lora_alpha=r, target_modules=names)
    modules = components_of(target) if components is None else choose_components(target, components)
    found = {component: find_targets(module, config) for component, module in modules.items()}
    for layers in found.values():
        check_layers(name, layers)
    for component, layers in found.items():
        parts = {path: (layer, _empty(layer, r, dtype)) for path, layer in layers.items()}
        install(modules[component], name, config, parts)
        state = state_of(modules[component])
        assert state is not None, "the adapter was installed just before"
        state.weights[name] = 1.0
        state.apply()
    return {component: list(layers) for component, layers in found.items()}


@torch.no_grad()
def swap_in(target: Any, name: str, adapter: Adapter, chosen: Mapping[str, Mapping[str, LowRank]]) -> None:
    """Overwrite the adapter `name` with `chosen` ({component: {path in the model: LowRank}}), in place.

    Raises AdapterMismatchError, the adapter being as it was, where a layer has no room for it.
    """
    rooms = {component: state.adapters[name] for component, state in holders(target, name).items()}
    for component, layers in chosen.items():
        for path, low_rank in layers.items():
            room = rooms[component].layers.get(path) if component in rooms else None
            if room is None:
                raise AdapterMismatchError(f"adapter {name!r} has no room at {component}.{path}: reserve it too")
            part = room.part(name)
            if low_rank.rank > part.rank:
                raise AdapterMismatchError(
                    f"adapter {name!r} has room for rank {part.rank} at {component}.{path}, and the new one has rank "
                    f"{low_rank.rank}: reserve more, or resize it"
                )
            if low_rank.magnitude is not None or part.lora_magnitude_vector is not None or part.anchor_A is not None:
                raise AdapterMismatchError(f"{component}.{path}: DoRA, PiSSA and OLoRA cannot be swapped in place")
            if getattr(room, "groups", 1) > 1:
                raise AdapterMismatchError(f"{component}.{path} is a grouped convolution, where no rank is but its own")
    for component, installed in rooms.items():
        for path, layer in installed.layers.items():
            part, source = layer.part(name), chosen.get(component, {}).get(path)
            part.lora_A.zero_()
            part.lora_B.zero_()
            if source is not None:
                part.lora_A[: source.rank].copy_(source.a)
                part.lora_B[:, : source.rank].copy_(source.b.float() * (source.scale / part.scale))
        installed.metadata = dict(adapter.metadata)


def _empty(layer: nn.Module, r: int, dtype: torch.dtype) -> LoraFactors:
    kind = layer_kind(layer)
    assert kind is not None, "find_targets() returns adaptable modules only"
    if r % getattr(layer, "groups", 1):
        raise ConfigError(f"r={r}: a grouped convolution needs a multiple of its {layer.groups} groups")
    a_shape, b_shape = kind.shapes(layer, r)
    device = layer.weight.device
    a, b = (torch.zeros(shape, dtype=dtype, device=device) for shape in (a_shape, b_shape))
    part = LoraFactors(a, b, 1.0)
    part.requires_grad_(False)
    return part
