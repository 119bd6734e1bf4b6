"""An average over the course of training, which is steadier than its last step (Polyak & Juditsky, 1992)."""

from __future__ import annotations

from typing import Any

import torch


class Average:
    """The exponential moving average of parameters: diffusers' `EMAModel`, in fp32 on their device.

    The decay grows with the steps until it reaches `decay`, so that a short run is not held back by where it began: as
    (1 + n) / (10 + n) after n steps, or with `warmup` as 1 - (1 + n)^(-2/3).

    Args:
        parameters: what is averaged; they may be moved elsewhere in between, but not replaced.
        decay: what stays of the average in each step, at most.
        warmup: the other of the two ways to get there.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float, *, warmup: bool = False) -> None:
        from diffusers.training_utils import EMAModel

        self._parameters = parameters
        self._model = EMAModel(parameters, decay=decay, use_ema_warmup=warmup, foreach=True)

    def step(self) -> None:
        """Take in the parameters as they are now."""
        self._model.step(self._parameters)

    def copy_to_parameters(self) -> None:
        self._model.copy_to(self._parameters)

    def state_dict(self) -> dict[str, Any]:
        return self._model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises ValueError if it is of other parameters."""
        shapes = [tensor.shape for tensor in state["shadow_params"]]
        if shapes != [parameter.shape for parameter in self._parameters]:
            raise ValueError("the average is of other parameters")
        self._model.load_state_dict(state)
        self._model.to(device=self._parameters[0].device)
