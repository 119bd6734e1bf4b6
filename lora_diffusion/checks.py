"""Questions that a training or a save should ask: does this adapter learn, did it learn?"""

from __future__ import annotations

from typing import Any

from .adapter import Adapter
from .components import canonical_path
from .state import holders


def layers_without_gradient(target: Any, name: str = "default") -> list[str]:
    """The layers, as "component.path", whose B got no gradient or only zeros in the last backward.

    Ask after `backward` and before the gradients are cleared. B is asked, because A's gradient is zero as long as B is.
    A layer that stays on this list for the first steps will never learn: it is not called, or cut off from the loss.
    """
    idle = []
    for component, state in holders(target, name).items():
        for path, layer in state.adapters[name].layers.items():
            part = layer.part(name)
            gradient = part.lora_B.grad
            embedding_start = part.lora_A.grad is not None and bool(part.lora_A.grad.count_nonzero())
            if not embedding_start and (gradient is None or not bool(gradient.count_nonzero())):
                idle.append(f"{component}.{canonical_path(component, path)}")
    return idle


def layers_without_effect(adapter: Adapter) -> list[str]:
    """The layers, as "component.path", whose A or B is all zero: they do what the base does, trained or not."""
    return [
        f"{component}.{path}"
        for component, layers in adapter.components.items()
        for path, layer in layers.items()
        if layer.magnitude is None and not (bool(layer.b.count_nonzero()) and bool(layer.a.count_nonzero()))
    ]
