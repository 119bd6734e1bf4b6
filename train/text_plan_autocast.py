"""Autocast as it is on CUDA, for fake tensors on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_HALVES = (torch.float16, torch.bfloat16)
# Of CUDA's list of operations that autocast runs in fp32, those that the CPU's lacks and language models use.
_IN_FP32 = frozenset(
    (
        F.layer_norm, torch.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax, F.log_softmax,
        torch.log_softmax, torch.Tensor.log_softmax, torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt,
        torch.Tensor.rsqrt, torch.exp, torch.Tensor.exp, torch.sum, torch.Tensor.sum, torch.cumsum,
        torch.Tensor.cumsum, torch.norm, F.mse_loss, F.cross_entropy, F.nll_loss,
    )
)  # fmt: skip


class CudaAutocast(TorchFunctionMode):
    """Where `torch.autocast("cpu")` is on within it, what CUDA's autocast computes in fp32 is computed in fp32."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self._on = on

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._on and func in _IN_FP32 and torch.is_autocast_enabled("cpu") and "dtype" not in kwargs:
            args = [_full(one) for one in args]
            kwargs = {name: _full(one) for name, one in kwargs.items()}
        return func(*args, **kwargs)


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALVES else value


def backward(loss: torch.Tensor) -> None:
    """`loss.backward()` without the detour that takes the mode off, which checkpointing needs when it recomputes."""
    from torch.autograd.graph import _engine_run_backward

    ones = torch.ones_like(loss)
    _engine_run_backward((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)
