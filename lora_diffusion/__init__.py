"""lora_diffusion: adapters for diffusion and language models.

Importing this package is cheap: torch is imported when the first name that needs it is used (PEP 562).

    import lora_diffusion as ld

    ld.add_adapter(pipeline, ld.LoraConfig(r=4))                   # train it, then
    ld.save_adapter(pipeline, "dog.safetensors")
    ld.load_adapter(other_pipeline, "dog.safetensors", weight=0.8)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    AdapterFormatError,
    AdapterMismatchError,
    ConfigError,
    DatasetError,
    LoraDiffusionError,
    ModelNotFoundError,
    TrainingError,
)

if TYPE_CHECKING:
    from .adapter import Adapter, LowRank
    from .arithmetic import Derived, combine, extract, resize
    from .checks import layers_without_effect, layers_without_gradient
    from .config import LoraConfig
    from .exchange import load_adapter, save_adapter
    from .files import read_adapter, write_adapter
    from .hotswap import reserve_adapter
    from .inject import (
        adapter_parameters,
        add_adapter,
        delete_adapter,
        get_adapter,
        put_adapter,
        unload,
    )
    from .merge import merge_adapters, unmerge_adapters
    from .merge_folder import merge_folder
    from .merge_layer import MergeReport
    from .per_sample import adapters_per_sample
    from .pipeline_folder import ModelFolder
    from .planning.plan import Plan, plan
    from .report import LoadReport, SaveReport
    from .switch import active_adapters, disable_adapters, list_adapters, set_adapters
    from .tokens import TextualInversionConfig

# Public name -> module that defines it.
_LAZY = {
    "Adapter": "adapter",
    "LowRank": "adapter",
    "LoraConfig": "config",
    "LoadReport": "report",
    "SaveReport": "report",
    "MergeReport": "merge_layer",
    "TextualInversionConfig": "tokens",
    "ModelFolder": "pipeline_folder",
    "Plan": "planning.plan",
    "plan": "planning.plan",
    "adapters_per_sample": "per_sample",
    "Derived": "arithmetic",
    "combine": "arithmetic",
    "extract": "arithmetic",
    "resize": "arithmetic",
    "layers_without_effect": "checks",
    "layers_without_gradient": "checks",
    "merge_adapters": "merge",
    "merge_folder": "merge_folder",
    "reserve_adapter": "hotswap",
    "unmerge_adapters": "merge",
    "load_adapter": "exchange",
    "save_adapter": "exchange",
    "read_adapter": "files",
    "write_adapter": "files",
    "add_adapter": "inject",
    "adapter_parameters": "inject",
    "delete_adapter": "inject",
    "get_adapter": "inject",
    "put_adapter": "inject",
    "unload": "inject",
    "active_adapters": "switch",
    "disable_adapters": "switch",
    "list_adapters": "switch",
    "set_adapters": "switch",
}

__all__ = [
    "Adapter",
    "AdapterFormatError",
    "AdapterMismatchError",
    "ConfigError",
    "DatasetError",
    "Derived",
    "LoadReport",
    "LoraConfig",
    "LoraDiffusionError",
    "LowRank",
    "MergeReport",
    "ModelFolder",
    "ModelNotFoundError",
    "Plan",
    "SaveReport",
    "TextualInversionConfig",
    "TrainingError",
    "active_adapters",
    "adapter_parameters",
    "adapters_per_sample",
    "add_adapter",
    "combine",
    "delete_adapter",
    "disable_adapters",
    "extract",
    "get_adapter",
    "layers_without_effect",
    "layers_without_gradient",
    "list_adapters",
    "load_adapter",
    "merge_adapters",
    "merge_folder",
    "plan",
    "put_adapter",
    "read_adapter",
    "reserve_adapter",
    "resize",
    "save_adapter",
    "set_adapters",
    "unload",
    "unmerge_adapters",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
