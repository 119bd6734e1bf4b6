"""Where the vectors of virtual tokens come from: they are kept as they are, or a small network makes them."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from torch import nn

from ..layers.virtual_tokens import VirtualPart
from .prompt_encoder_config import PromptEncoderConfig


class BareVectors(VirtualPart):
    """vectors: (n, dim)."""

    def __init__(self, vectors: torch.Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self) -> torch.Tensor:
        return self.vectors


class EncodedVectors(VirtualPart):
    """P-tuning's prompt encoder (Liu et al. 2021, section 3.2): an embedding of 0 … n - 1 through a bidirectional LSTM
    and two linear layers, or through linear layers alone. It runs once, on all virtual tokens of the prompt together.

    The shapes are those of the config's `encoder_shape`. Computed in the parameters' own dtype, under autocast too.
    """

    costly = True

    def __init__(self, config: PromptEncoderConfig, dim: int) -> None:
        super().__init__()
        lstm, shape = config.encoder_reparameterization_type == "LSTM", config.encoder_shape
        hidden = config.encoder_hidden_size or (max(1, dim // 2) if shape == "lama" else dim)
        self.embedding = nn.Embedding(config.rows, dim)
        self.lstm_head: nn.LSTM | None = None
        if lstm:
            layers = config.encoder_num_layers
            dropout = config.encoder_dropout if layers > 1 else 0.0
            self.lstm_head = nn.LSTM(dim, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
        widths = {
            (True, "few-shot"): (2 * hidden, dim, dim),
            (False, "few-shot"): (dim, hidden, dim),
            (False, "peft"): (dim, hidden, hidden, dim),
        }.get((lstm, shape or ""), (2 * hidden, 2 * hidden, dim))
        steps: list[nn.Module] = []
        for wide, out in itertools.pairwise(widths):
            steps += [nn.ReLU(), nn.Linear(wide, out)]
        self.mlp_head = nn.Sequential(*steps[1:])

    def forward(self) -> torch.Tensor:
        x = self.embedding.weight.unsqueeze(0)
        with _exact(x), self._differentiable(x):
            if self.lstm_head is not None:
                x = self.lstm_head(x)[0]
            rows: torch.Tensor = self.mlp_head(x)[0]
        return rows

    def _differentiable(self, x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
        """cuDNN's LSTM has no backward in evaluation mode, which a base without dropout may well be trained in."""
        if self.lstm_head is None or not x.is_cuda or self.training or not torch.is_grad_enabled():
            return contextlib.nullcontext()
        return torch.backends.cudnn.flags(enabled=False)


def _exact(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    if x.is_meta or not torch.amp.is_autocast_available(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def make_encoder(
    config: PromptEncoderConfig,
    dim: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> EncodedVectors:
    """With the values that PyTorch gives to such layers, drawn on the CPU in the order of the parameters.

    On the meta device nothing is drawn.
    """
    with torch.device("meta"):
        made = EncodedVectors(config, dim)
    if device.type == "meta":
        return made.to(dtype)
    made.to_empty(device="cpu")
    with torch.no_grad():
        made.embedding.weight.copy_(torch.randn(made.embedding.weight.shape, generator=generator))
        if made.lstm_head is not None:
            for parameter in made.lstm_head.parameters():
                _uniform(parameter, made.lstm_head.hidden_size, generator)
        for layer in made.mlp_head:
            if isinstance(layer, nn.Linear):
                _uniform(layer.weight, layer.in_features, generator)
                _uniform(layer.bias, layer.in_features, generator)
    return made.to(device, dtype)


def _uniform(parameter: torch.Tensor, fan: int, generator: torch.Generator | None) -> None:
    """Between -1/√fan and 1/√fan."""
    parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) / fan**0.5)
