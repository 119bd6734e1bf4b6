"""A PeftModel's `state_dict`: the adapters' tensors and nothing of the base.

Trainers keep whatever `state_dict` gives, at every checkpoint; of a base that stays as it is they need no copy, and
weights that it holds under two names could not be written to safetensors at all. What is missing when such a state is
loaded is the base, and is not missed. The whole state is `model.base_model.state_dict()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..state import states


def keep_adapters_only(model: nn.Module) -> None:
    """Give `state_dict` and `load_state_dict` of a PeftModel this meaning, wherever it is a part of something."""
    model.register_state_dict_post_hook(_drop_base)
    model.register_load_state_dict_post_hook(_excuse_base)


def _drop_base(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    ours = tuple(_prefixes(model))
    for name in [name for name in state if name.startswith(prefix) and not name[len(prefix) :].startswith(ours)]:
        del state[name]


def _excuse_base(model: nn.Module, keys: Any) -> None:
    ours = tuple(f".{prefix}" for prefix in _prefixes(model))
    keys.missing_keys[:] = [key for key in keys.missing_keys if any(prefix in f".{key}" for prefix in ours)]


def _prefixes(model: Any) -> list[str]:
    """Names, from the PeftModel on, under which the modules with learned tensors lie; an adapter may have none."""
    learned = {id(module) for module in _learned_modules(model.get_base_model())}
    return [f"{path}." for path, module in model.named_modules() if id(module) in learned]


def _learned_modules(base: nn.Module) -> Iterator[nn.Module]:
    for state in states(base).values():
        for name, installed in state.adapters.items():
            for layer in installed.layers.values():
                yield layer.part(name)
            for module in installed.copies.values():
                yield module.learned(name)
            for piece in installed.pieces.values():
                yield from piece.modules()
