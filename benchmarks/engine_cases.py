"""The models that are timed: attention of Stable Diffusion 1.5, CLIP-L, GPT-2 small and a Llama-shaped one.

Each takes (x, *context) and gives a tuple of tensors. Weights are random: time does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

TEXT_TOKENS, TEXT_WIDTH = 77, 768  # what the UNet of SD 1.5 attends to

SD_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
GPT2_TARGETS = ("c_attn", "c_proj", "c_fc")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Projections(nn.Module):
    """q, k, v (and out, of v) of one attention without the attention: nothing but the adapted products."""

    def __init__(self, width: int, out: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width) if out else nn.Identity()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.out_proj(self.v_proj(x))


class SDBlocks(nn.Module):
    """Transformer blocks of SD 1.5's UNet: self-attention, attention to the text, feed-forward."""

    def __init__(self, width: int, layers: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, 8, width // 8, cross_attention_dim=TEXT_WIDTH) for _ in range(layers)
        )

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for block in self.blocks:
            x = block(x, encoder_hidden_states=text)
        return (x,)


class ClipLayers(nn.Module):
    """Layers of the text encoder of SD 1.5 (CLIP ViT-L/14)."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=8, hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=layers,
            bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        self.encoder = CLIPTextModel(config).encoder

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.encoder(inputs_embeds=x, attention_mask=None, is_causal=True).last_hidden_state,)


class LanguageLayers(nn.Module):
    """Layers of a language model from transformers, given embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.model(inputs_embeds=x, use_cache=False).last_hidden_state,)


def gpt2(layers: int) -> nn.Module:
    """GPT-2 small; without the dropout of its own, which would be drawn differently for each contestant."""
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return LanguageLayers(GPT2Model(GPT2Config(vocab_size=8, n_layer=layers, bos_token_id=0, eos_token_id=1, **off)))


def llama(layers: int, width: int = 1024) -> nn.Module:
    """Llama-shaped: grouped queries (two for each key), gated feed-forward of 2.75 widths."""
    heads = width // 64
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LanguageLayers(LlamaModel(config))


@dataclass(frozen=True)
class Case:
    """One line of a table.

    build: the module, fp32 on the CPU; tokens, width: of its input x, (batch, tokens, width); text: it also wants text
    states; transposed: its weights are (in, out), transformers' Conv1D; quick: among the smallest.
    """

    name: str
    group: str
    build: Callable[[], nn.Module]
    tokens: int
    width: int
    targets: tuple[str, ...]
    text: bool = False
    transposed: bool = False
    quick: bool = False

    def inputs(
        self, batch: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """x, which wants a gradient, and the context, which does not (its encoder is frozen)."""
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(batch, self.tokens, self.width, generator=draw).to(device, dtype).requires_grad_()
        text = torch.randn(batch, TEXT_TOKENS, TEXT_WIDTH, generator=draw).to(device, dtype)
        return x, (text,) if self.text else ()


PROJECTIONS, ATTENTION, LANGUAGE = "attention projections alone", "attention blocks", "language-model blocks"


def _projections(tokens: int, width: int, quick: bool = False) -> Case:
    name = f"q, k, v, out: {tokens} × {width}"
    return Case(name, PROJECTIONS, lambda: Projections(width), tokens, width, CLIP_TARGETS, quick=quick)


def _sd_block(side: int, width: int, quick: bool = False) -> Case:
    name = f"SD 1.5 block, {side}×{side} × {width}"
    return Case(name, ATTENTION, lambda: SDBlocks(width), side * side, width, SD_TARGETS, text=True, quick=quick)


CASES = (
    _projections(1024, 320),
    _projections(256, 640),
    _projections(64, 1280, quick=True),
    _projections(77, 768, quick=True),
    _sd_block(64, 320),
    _sd_block(32, 640),
    _sd_block(16, 1280),
    _sd_block(8, 1280, quick=True),
    Case("CLIP-L, 2 layers, 77 × 768", ATTENTION, lambda: ClipLayers(2), 77, 768, CLIP_TARGETS, quick=True),
    Case("GPT-2 small, 2 layers, 128 × 768", LANGUAGE, lambda: gpt2(2), 128, 768, GPT2_TARGETS, transposed=True),
    Case(
        "GPT-2 small, 1 layer, 32 × 768", LANGUAGE, lambda: gpt2(1), 32, 768, GPT2_TARGETS, transposed=True, quick=True
    ),
    Case("Llama-shaped, 1 layer, 256 × 1024", LANGUAGE, lambda: llama(1), 256, 1024, LLAMA_TARGETS),
    Case("Llama-shaped, 1 layer, 32 × 1024", LANGUAGE, lambda: llama(1), 32, 1024, LLAMA_TARGETS, quick=True),
)


def built(case: Case, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The case's module with the same weights each time, in training mode."""
    torch.manual_seed(0)
    return case.build().to(device, dtype).train()
