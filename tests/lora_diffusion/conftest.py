"""Helpers for the ground floor's tests: inputs for the tiny models, factors that are not zero, bits to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_diffusion as ld


@pytest.fixture
def unet_output() -> Callable[..., torch.Tensor]:
    """unet_output(unet): its answer to a fixed input, (2, 4, 8, 8)."""

    def run(unet: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        g = torch.Generator().manual_seed(1)
        latents, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, 32, generator=g)
        return unet(latents.to(dtype), torch.tensor([3, 500]), text.to(dtype)).sample

    return run


@pytest.fixture
def text_output() -> Callable[[nn.Module], torch.Tensor]:
    """text_output(text_encoder): its last hidden state for fixed ids, (1, 77, 32)."""

    def run(text_encoder: nn.Module) -> torch.Tensor:
        ids = torch.randint(0, 512, (1, 77), generator=torch.Generator().manual_seed(2))
        return text_encoder(ids).last_hidden_state

    return run


@pytest.fixture
def randomise() -> Callable[..., None]:
    """randomise(target, name): give all factors values as training might, so that the adapter has an effect."""

    def run(target: Any, name: str = "default", seed: int = 3, std: float = 0.1) -> None:
        g = torch.Generator().manual_seed(seed)
        for parameters in ld.adapter_parameters(target, name).values():
            for parameter in parameters:
                parameter.data.copy_(torch.randn(parameter.shape, generator=g) * std)

    return run


@pytest.fixture
def bits() -> Callable[[nn.Module], dict[str, bytes]]:
    """bits(module): {name: bytes} of its state_dict, to show that something is untouched."""

    def run(module: nn.Module) -> dict[str, bytes]:
        return {
            name: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for name, value in module.state_dict().items()
        }

    return run


class Toy(nn.Module):
    """Two projections, a norm, a convolution and an embedding: names to match and kinds to refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attn = nn.ModuleDict({"to_q": nn.Linear(8, 6), "to_v": nn.Linear(8, 6, bias=False)})
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.attn["to_q"](x) + self.attn["to_v"](x)))


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()
