"""A base in few bits, made ready to carry adapters that learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ConfigError
from ..layers.quantised import is_quantised


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Freeze the model, bring what is not quantised from half precision to fp32, as PEFT does, and switch gradient
    checkpointing on where there are quantised weights.

    The fp32 copies of embeddings and head are what costs memory here; this library learns beside a base in half
    precision as well, so that calling this is not needed.
    gradient_checkpointing_kwargs: for `gradient_checkpointing_enable`; non-reentrant by default, which needs no
        gradients of the inputs.
    Returns the model. Raises ConfigError for a model without `gradient_checkpointing_enable` that should have it.
    """
    quantised = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if is_quantised(parameter):
            quantised = True
        elif parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if quantised and use_gradient_checkpointing:
        if not hasattr(model, "gradient_checkpointing_enable"):
            raise ConfigError(f"{type(model).__name__} has no gradient checkpointing: use_gradient_checkpointing=False")
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        )
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            model.enable_input_require_grads()
    return model
