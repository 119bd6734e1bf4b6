"""What differs between two modules of one architecture, and which of it a low-rank adapter can hold."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import AdapterMismatchError
from ..layers import AdaptedModule, base_class
from ..layers.conv1d import is_conv1d
from ..layers.learned_copy import CopiedModule
from ..layers.quantised import is_quantised
from .factored import Form, working_device


def brought_modules(model: nn.Module) -> dict[int, nn.Module]:
    """{id: module} of all that adapters put into a model: low-rank parts and learned copies."""
    parts: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, AdaptedModule):
            parts += module.all_parts()
        elif isinstance(module, CopiedModule):
            parts += [module.learned(name) for name in module.copy_names()]
    return {id(inner): inner for part in parts for inner in part.modules()}


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and floating-point buffers by name, all names of shared ones, without those of adapters."""
    brought = brought_modules(model).values()
    theirs = {id(t) for m in brought for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)]}
    parameters = list(model.named_parameters(remove_duplicate=False))
    buffers = [(name, b) for name, b in model.named_buffers(remove_duplicate=False) if b.is_floating_point()]
    return {name: tensor.detach() for name, tensor in [*parameters, *buffers] if id(tensor) not in theirs}


def differ(old: torch.Tensor, new: torch.Tensor, where: str) -> bool:
    """Whether two tensors hold different values; rounding of one to the other's dtype is no difference.

    Raises AdapterMismatchError for tensors without values.
    """
    if old.is_meta or new.is_meta:
        raise AdapterMismatchError(f"{where} has no values (it is on the meta device): load both models in full")
    old = old.to(new.device)
    if old.shape != new.shape:
        return True
    return not (torch.equal(old.to(new.dtype), new) or torch.equal(old, new.to(old.dtype)))


def why_not(module: nn.Module, leaf: str, old: torch.Tensor, new: torch.Tensor, r: int) -> str | None:
    """Why the difference of a module's tensor `leaf` cannot be in an adapter, in words, or None if it can."""
    kind = base_class(module).__name__
    if leaf != "weight" or new.ndim < 2:
        return f"it is no weight matrix but the {leaf} of class {kind}"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its owner (nn.MultiheadAttention) uses its weight without calling it"
    if not (isinstance(module, nn.Linear | nn.Conv2d) or is_conv1d(module)):
        return f"its module is of class {kind}, and only Linear, Conv2d and Conv1D layers are extracted"
    if is_quantised(module.weight) or not (old.is_floating_point() and new.is_floating_point()):
        return f"its weight is quantised ({str(new.dtype).removeprefix('torch.')})"
    if isinstance(module, nn.Conv2d) and r % module.groups:
        return f"it is a convolution in {module.groups} groups, which cannot share r={r} evenly"
    return None


def difference(module: nn.Module, old: torch.Tensor, new: torch.Tensor) -> tuple[Form, torch.Tensor]:
    """ΔW in fp32, (groups, out/groups, fan_in's product), and its form. transformers' Conv1D weighs (in, out)."""
    device = working_device(new.device)
    delta = new.to(torch.float32).to(device) - old.to(torch.float32).to(device)
    if is_conv1d(module):
        delta = delta.t()
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    form = Form(delta.shape[0], tuple(delta.shape[1:]), groups)
    return form, delta.reshape(groups, form.out // groups, -1)
