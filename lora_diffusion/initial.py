"""Initial values of the low-rank factors."""

from __future__ import annotations

import math

import torch


def initial_factors(
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    init: bool | str,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in fp32 on the CPU; a_shape: (r, in, …), b_shape: (out, r, …).

    True: A from U(-1/√fan_in, 1/√fan_in), which is Kaiming's rule with a=√5, and B zero (Microsoft's loralib, PEFT).
    "gaussian": A from N(0, 1/r²) and B zero (diffusers' scripts). False: both by the rule for A, so ΔW is not zero.
    """
    a, b = torch.empty(a_shape), torch.zeros(b_shape)
    if init == "gaussian":
        a.normal_(0.0, 1.0 / a_shape[0], generator=generator)
        return a, b
    _uniform(a, generator)
    if init is False:
        _uniform(b, generator)
    return a, b


def _uniform(tensor: torch.Tensor, generator: torch.Generator | None) -> None:
    bound = 1.0 / math.sqrt(math.prod(tensor.shape[1:]))
    tensor.uniform_(-bound, bound, generator=generator)
