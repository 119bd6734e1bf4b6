"""The frozen base in parts: each process keeps a share of every weight and borrows the rest block by block (FSDP2).

Only the base is taken apart. The adapter stays whole and plain in each process, unnoticed by whatever learns, saves or
judges it. A block is what the model's own code calls one that must not be split.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

import lora_diffusion as ld
from lora_diffusion.components import components_of
from lora_diffusion.errors import ConfigError
from lora_diffusion.fingerprint import fingerprint
from lora_diffusion.state import state_of


def check_sharding() -> None:
    """Raises ConfigError where this PyTorch cannot leave the adapter out of what it takes apart."""
    try:
        from torch.distributed.fsdp import fully_shard

        known = inspect.signature(fully_shard).parameters
    except ImportError:
        known = {}  # type: ignore[assignment, unused-ignore]
    if "ignored_params" not in known:
        raise ConfigError(f"--fsdp needs a newer PyTorch than {torch.__version__}: fully_shard with ignored_params")


def shard(target: Any, components: list[str], device: torch.device, *, cpu_offload: bool = False) -> tuple[int, int]:
    """Take the named components' frozen weights apart, over all processes.

    Adapters are there already, and get the base's fingerprint while it can still be read.

    Args:
        target: a pipeline or a model.
        device: where the model computes.
        cpu_offload: keep the parts in main memory.

    Returns:
        Bytes of the base that this process keeps, and that there are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    size = torch.distributed.get_world_size()
    learned = {p for parameters in ld.adapter_parameters(target).values() for p in parameters}
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (size,)),
        "ignored_params": learned,
        "reshard_after_forward": True,
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy(),
    }
    kept = total = 0
    for component in components:
        module = components_of(target)[component]
        _keep_fingerprint(component, module)
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()
        blocks = [one for one in module.modules() if type(one).__name__ in (module._no_split_modules or ())]
        for block in reversed(blocks):  # the innermost first
            fully_shard(block, **options)
        fully_shard(module, **options)
        for parameter in (one for one in module.parameters() if one not in learned):
            total += parameter.numel() * parameter.element_size()
            kept += parameter.to_local().numel() * parameter.element_size()
    return kept, total


def is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _keep_fingerprint(component: str, module: nn.Module) -> None:
    state = state_of(module)
    for installed in state.adapters.values() if state is not None else ():
        installed.base = installed.base or fingerprint(component, module)
