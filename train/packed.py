"""Frozen convolutions on a CPU, their weights laid out for oneDNN once rather than at every call.

PyTorch brings a convolution's weight into oneDNN's blocked layout in each forward and each backward pass, and takes a
slower path for small pictures. With a batch of one that is most of the time where there are many channels and few
pixels. A frozen weight needs it once as it is, and once turned round for the gradient of the input. The results are
those of PyTorch's own convolution up to rounding; the price is two copies of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from train.dreambooth_config import DreamBoothConfig


def packs(config: DreamBoothConfig) -> bool:
    """Whether a run packs on the CPU: where all its batches are of one size."""
    return config.aspect_ratio_buckets is None


WORTH = 2**19  # elements of a weight: with fewer, what is saved is less than what a step in Python costs


def can_be_packed(module: nn.Module) -> bool:
    """A plain, large fp32 convolution of stride 1 on the CPU whose weight and bias stay as they are."""
    return (
        type(module) is nn.Conv2d
        and module.weight.numel() >= WORTH
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and not any(parameter.requires_grad for parameter in module.parameters())
        and module.stride == (1, 1)
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and isinstance(module.padding, tuple)
        and all(pad < size for pad, size in zip(module.padding, module.kernel_size))
    )


def suit_cpu(model: nn.Module) -> None:
    """Lay out a model on the CPU as its convolutions are fastest: channels last, unless they are to be packed."""
    if not any(map(can_be_packed, model.modules())):
        model.to(memory_format=torch.channels_last)


def packed_sizes(model: nn.Module) -> list[int]:
    """The bytes of each copy."""
    return [m.weight.numel() * m.weight.element_size() for m in model.modules() if can_be_packed(m) for _ in range(2)]


@contextmanager
def packed(model: nn.Module) -> Iterator[int]:
    """Within it, every convolution of the model that can be packed is; gives their number.

    No weight may change meanwhile. A convolution is packed for the size of the first input that it trains with, and
    inputs of other sizes take PyTorch's own way: so a run that is resumed computes the same bits, if all its batches
    are of one size. Where this PyTorch has no oneDNN, nothing is packed.
    """
    chosen = [m for m in model.modules() if can_be_packed(m)] if torch.backends.mkldnn.is_available() else []
    for module in chosen:
        module.forward = _Packed(module)
    try:
        yield len(chosen)
    finally:
        for module in chosen:
            del module.forward  # the class's own is back


class _Packed:
    """In the place of one convolution's `forward`."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.module = module
        self.size: torch.Size | None = None
        self.weights: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module = self.module
        if self.weights is None and torch.is_grad_enabled() and x.dim() == 4 and x.dtype == torch.float32:
            self.weights, self.size = _lay_out(module, x), x.shape
        if self.weights is None or x.shape != self.size or x.dtype != torch.float32:
            return module._conv_forward(x, module.weight, module.bias)
        return _Convolution.apply(x, *self.weights, module.bias, module.padding, module.kernel_size)


@torch.no_grad()
def _lay_out(module: nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight, and the one that the output's gradient is convolved with: input and output channels exchanged, the
    kernel turned by half a circle."""
    turned = module.weight.flip(2, 3).transpose(0, 1).contiguous()
    height, width = (x.shape[n] + 2 * module.padding[n - 2] - module.kernel_size[n - 2] + 1 for n in (2, 3))
    back = _padding_back(module.padding, module.kernel_size)
    pack = torch.ops.mkldnn._reorder_convolution_weight
    return (
        pack(module.weight.contiguous(), module.padding, (1, 1), (1, 1), 1, list(x.shape)),
        pack(turned, back, (1, 1), (1, 1), 1, [x.shape[0], module.out_channels, height, width]),
    )


def _padding_back(padding: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size - 1 - pad for size, pad in zip(kernel, padding))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, turned: torch.Tensor, bias: torch.Tensor | None,
        padding: tuple[int, ...], kernel: tuple[int, ...],
    ) -> torch.Tensor:  # fmt: skip
        ctx.turned, ctx.back = turned, _padding_back(padding, kernel)
        return _convolve(x, weight, bias, padding)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return _convolve(grad, ctx.turned, None, ctx.back), None, None, None, None, None


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, ...]
) -> torch.Tensor:
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, (1, 1), (1, 1), 1, "none", [], "")
