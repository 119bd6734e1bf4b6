"""Memory that CUDA kernels take on the side while they run, estimated from the shapes they are given."""

from __future__ import annotations

from typing import Any

import torch

_aten = torch.ops.aten
_CONVOLUTION = _aten.convolution.default
_CONVOLUTION_BACKWARD = _aten.convolution_backward.default
_ATTENTION_BACKWARD = (
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    _aten._scaled_dot_product_flash_attention_backward.default,
    _aten._scaled_dot_product_efficient_attention_backward.default,
)

# cuBLAS takes one workspace for the thread that computes forward and one for that of backward.
CUBLAS = 2 * 8_519_680
CUBLAS_HOPPER = 2 * 32 * 2**20


def cuda_workspace(func: Any, args: Any, result: Any) -> int:
    """The bytes for one operation; for most of them none.

    Convolutions of tensors that are not channels-last are computed on transposed copies of what they read and write
    (cuDNN's tensor-core kernels). The backward pass of fused attention sums dq in fp32, in rows padded to 128 and heads
    padded to 32, and keeps a row-wise sum beside it (FlashAttention-2).
    """
    if func is _CONVOLUTION:
        return 0 if _is_channels_last(args[0]) else sum(map(_size, (args[0], args[1], result)))
    if func is _CONVOLUTION_BACKWARD:
        gradient, x, weight = args[:3]
        return 0 if _is_channels_last(x) else sum(map(_size, (gradient, x, weight)))
    if func in _ATTENTION_BACKWARD:
        batch, heads, rows, width = args[1].shape
        padded = -(-rows // 128) * 128
        return int(batch * heads * padded * (-(-width // 32) * 32 + 1) * 4)
    return 0


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
