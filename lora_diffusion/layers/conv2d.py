"""The low-rank term beside a convolution (LoCon): a convolution with the base's kernel to r channels, then a 1×1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .composed import compose, compose_all
from .host import AdaptedModule
from .rows import Gather


class LoraConv2d(AdaptedModule):
    """x: (n, in, h, w), A: (r, in/groups, kh, kw), B: (out, r/groups, 1, 1).

    With one group that is every tool's LoCon. With more, A and B are block by block as the base is, so that the update
    can be merged; PEFT's A that sees all channels, (r, in, kh, kw), is taken too, and cannot be.
    """

    channels = 1

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        groups = module.groups
        return (rank, module.in_channels // groups, *module.kernel_size), (module.out_channels, rank // groups, 1, 1)

    @classmethod
    def misfit(cls, module: nn.Module, a: torch.Tensor, b: torch.Tensor) -> str | None:
        rank, groups = int(a.shape[0]), module.groups
        if rank % groups:
            return f"rank {rank} is no multiple of its {groups} groups"
        if groups > 1 and tuple(a.shape) == (rank, module.in_channels, *module.kernel_size):
            a = a[:, : module.in_channels // groups]  # PEFT's form
        return super().misfit(module, a, b)

    @staticmethod
    def delta(module: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        groups = module.groups
        if a.shape[1] != module.in_channels // groups:
            raise ValueError("a low-rank term that mixes the groups of a convolution has no weight of its own")
        rank, out = a.shape[0], b.shape[0]
        per_group = b.view(groups, out // groups, rank // groups) @ a.reshape(groups, rank // groups, -1)
        return per_group.view(out, *a.shape[1:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() and self._rows is None:
            return compose_all(self, x, super().forward(x))
        if not self._active and self._rows is None:
            return super().forward(x)
        return compose(self, x, super().forward(x))

    def low(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return self._convolve(x, a, 1 if a.shape[1] == self.in_channels else self.groups)

    def up(self, h: torch.Tensor, b: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        b = b.to(h.dtype)
        plain = onto is not None and self.groups == 1 and onto.dtype == h.dtype
        if onto is not None and plain and onto.is_contiguous():
            # A 1×1 convolution is a product, which can add to what is there.
            b = b.flatten(1).expand(onto.shape[0], -1, -1)
            return torch.baddbmm(onto.flatten(2), b, h.flatten(2)).view(onto.shape)
        if onto is not None and plain and onto.is_contiguous(memory_format=torch.channels_last):
            rows, low = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (onto, h))
            n, out, high, wide = onto.shape
            return torch.addmm(rows, low, b.flatten(1).t()).view(n, high, wide, out).permute(0, 3, 1, 2)
        term = F.conv2d(h, b, groups=self.groups)
        return term if onto is None else onto + term.to(onto.dtype)

    def low_rows(self, x: torch.Tensor, a: torch.Tensor, gather: Gather) -> torch.Tensor:
        """One convolution of batch · groups: every row of the batch is a group of its own."""
        rows, most = gather.index.shape
        own = a.index_select(0, gather.index.flatten())
        h = self._convolve(x.reshape(1, -1, *x.shape[2:]), own, rows)
        return h.view(rows, most, *h.shape[2:]) * gather.strength.to(h.dtype)[:, :, None, None]

    def up_rows(self, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (b.to(h.dtype).mT @ h.flatten(2)).view(h.shape[0], -1, *h.shape[2:])

    def base(self, x: torch.Tensor) -> torch.Tensor:
        return self._convolve(x, self.matrix(self), self.groups)

    def _convolve(self, x: torch.Tensor, kernel: torch.Tensor, groups: int) -> torch.Tensor:
        kernel, padding = kernel.to(x.dtype), self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return F.conv2d(x, kernel, None, self.stride, padding, self.dilation, groups)
