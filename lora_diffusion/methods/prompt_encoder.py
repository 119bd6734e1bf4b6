"""P-tuning: the vectors of virtual tokens, out of a network that is learned (Liu et al. 2021)."""

from __future__ import annotations

import torch
from torch import nn

from ..layers.virtual_tokens import VirtualPart
from .prompt_encoder_config import PromptEncoderConfig
from .prompt_networks import BareVectors, make_encoder
from .prompt_piece import PromptPiece, prompt_hosts


def build(
    component: nn.Module,
    config: PromptEncoderConfig,
    name: str,
    *,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> PromptPiece:
    """Raises AdapterMismatchError for a model that takes no prompt."""
    hosts = prompt_hosts(component, config)
    table = hosts[0].weight
    dim, device = table.shape[1], table.device
    part: VirtualPart
    if config.encoder_reparameterization_type != "NONE":
        part = make_encoder(config, dim, device=device, dtype=dtype, generator=generator)
    elif table.is_meta:
        part = BareVectors(torch.empty(config.rows, dim, device="meta", dtype=dtype))
    else:
        part = BareVectors(torch.randn(config.rows, dim, generator=generator).to(device, dtype))
    return PromptPiece(config, name, hosts, part)
