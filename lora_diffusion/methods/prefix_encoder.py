"""What prefix tuning learns: the keys and values in front of every layer's, as they are or through a small network."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .prefix_tuning_config import PrefixTuningConfig


class PrefixEncoder(nn.Module):
    """The prefix of one adapter: n keys and n values for each of `layers` layers, of `heads` heads and `width` numbers.

    embedding: (n, 2 · layers · width): the keys of layer 0, its values, the keys of layer 1 … With prefix_projection it
        is (n, width), and what stands above is
        output_weight · tanh(hidden_weight · embedding + hidden_bias) + output_bias,
        hidden_weight: (hidden, width), output_weight: (2 · layers · width, hidden): P-tuning v2's prefix encoder.

    Bare parameters rather than nn.Linear, so that no adapter on the model's linear layers lands on them.
    """

    def __init__(
        self,
        config: PrefixTuningConfig,
        layers: int,
        heads: int,
        width: int,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Values are drawn on the CPU, whatever the device."""
        super().__init__()
        self.tokens, self.layers, self.heads, self.width = config.num_virtual_tokens, layers, heads, width
        self.dropout, self.projects = config.prefix_dropout, config.prefix_projection
        self._known: tuple[Any, Any, torch.Tensor] | None = None
        zero, whole = config.init_weights == "zero", 2 * layers * width
        if not self.projects:
            start = torch.zeros(self.tokens, whole)
            self.embedding = nn.Parameter((start if zero else start.normal_(generator=generator)).to(device, dtype))
            return
        hidden = config.encoder_hidden_size or width
        bounds = 1 / math.sqrt(width), 0.0 if zero else 1 / math.sqrt(hidden)
        tokens = torch.zeros(self.tokens, width).normal_(generator=generator)
        self.embedding = nn.Parameter(tokens.to(device, dtype))
        self.hidden_weight = nn.Parameter(_uniform((hidden, width), bounds[0], generator).to(device, dtype))
        self.hidden_bias = nn.Parameter(_uniform((hidden,), bounds[0], generator).to(device, dtype))
        self.output_weight = nn.Parameter(_uniform((whole, hidden), bounds[1], generator).to(device, dtype))
        self.output_bias = nn.Parameter(_uniform((whole,), bounds[1], generator).to(device, dtype))

    def layer(self, index: int, cache: object = None) -> torch.Tensor:
        """(n, 2, heads, head size): keys and values of one layer.

        Each layer computes its own share, so that it can be recomputed with the layer (gradient checkpointing); a
        network runs once for all steps of a generation, which `cache`, the layer's, tells from others.
        """
        first, last = 2 * index * self.width, 2 * (index + 1) * self.width
        if not self.projects:
            own = self.embedding[:, first:last]
        elif cache is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            own = functional.linear(self._hidden(), self.output_weight[first:last], self.output_bias[first:last])
        else:
            own = self._remembered(cache)[:, first:last]
        return own.unflatten(1, (2, self.heads, -1))

    def for_batch(self, index: int, batch: int, cache: object = None) -> torch.Tensor:
        """(batch, n, 2, heads, head size): one layer's for every row; in training each row drops its own numbers."""
        own = self.layer(index, cache).expand(batch, -1, -1, -1, -1)
        return functional.dropout(own, self.dropout, self.training) if self.dropout else own

    def _hidden(self) -> torch.Tensor:
        return torch.tanh(functional.linear(self.embedding, self.hidden_weight, self.hidden_bias))

    def _remembered(self, cache: object) -> torch.Tensor:
        """The prefix of all layers, as long as the cache and the parameters are the same."""
        state = [(parameter.data_ptr(), parameter._version) for parameter in self.parameters()]
        if self._known is None or self._known[0]() is not cache or self._known[1] != state:
            self._known = weakref.ref(cache), state, flat(dict(self.named_parameters()))
        return self._known[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}


def flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(n, 2 · layers · width): the prefix of all layers by what an encoder learns; PEFT's prompt_embeddings."""
    if "hidden_weight" not in tensors:
        return tensors["embedding"]
    hidden = torch.tanh(functional.linear(tensors["embedding"], tensors["hidden_weight"], tensors["hidden_bias"]))
    return functional.linear(hidden, tensors["output_weight"], tensors["output_bias"])


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator | None) -> torch.Tensor:
    """Between -bound and bound: how nn.Linear starts, with bound = 1/√inputs."""
    return torch.zeros(shape).uniform_(-bound, bound, generator=generator)
