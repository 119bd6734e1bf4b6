"""The module between a PeftModel and its model."""

from __future__ import annotations

from typing import Any

from torch import nn


class Tuner(nn.Module):
    """What PEFT has between a PeftModel and the model: `peft_model.base_model.model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)
