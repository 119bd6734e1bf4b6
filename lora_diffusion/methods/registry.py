"""The methods that are known. A new one is a line here, a config and a module with `build`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .config import MethodConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .piece import Piece

# kind -> (the config's module, its class, the module that builds)
METHODS = {
    "prompt_tuning": ("prompt_tuning_config", "PromptTuningConfig", "prompt_tuning"),
    "p_tuning": ("prompt_encoder_config", "PromptEncoderConfig", "prompt_encoder"),
    "prefix_tuning": ("prefix_tuning_config", "PrefixTuningConfig", "prefix_tuning"),
    "bottleneck": ("bottleneck_config", "BottleneckConfig", "bottleneck"),
    "pre_layer": ("pre_layer_config", "PreLayerConfig", "pre_layer"),
    "bitfit": ("parameters_config", "BitFitConfig", "parameters"),
    "top_layers": ("parameters_config", "TopLayersConfig", "parameters"),
    "full": ("parameters_config", "FullConfig", "parameters"),
    "head": ("head_config", "HeadConfig", "head"),
}


def config_from_dict(values: Mapping[str, Any]) -> MethodConfig:
    """The way back from `MethodConfig.to_dict`. Raises ConfigError."""
    kind = values.get("kind")
    if kind not in METHODS:
        raise ConfigError(f"the method {str(kind)[:40]!a} is not known; there are {', '.join(METHODS)}")
    module, name, _ = METHODS[kind]
    cls: type[MethodConfig] = getattr(importlib.import_module(f".{module}", __package__), name)
    return cls.from_dict(values)


def build(
    component: nn.Module,
    config: MethodConfig,
    name: str,
    *,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> Piece:
    """Attach a new piece to a component, not acting.

    dtype: of what learns. generator: for initial values, a CPU generator.
    Raises ConfigError or AdapterMismatchError; the component is then as it was.
    """
    module = importlib.import_module(f".{METHODS[config.kind][2]}", __package__)
    made: Piece = module.build(component, config, name, dtype=dtype, generator=generator)
    return made
