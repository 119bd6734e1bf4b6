"""The models of the LoRA paper's tables, built on the meta device from their published configurations: shapes, no
weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model, GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel


def _roberta(width: int, blocks: int) -> RobertaModel:
    return RobertaModel(
        RobertaConfig(
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
        )
    )


def _deberta_xxl() -> DebertaV2Model:
    return DebertaV2Model(
        DebertaV2Config(
            vocab_size=128100,
            max_position_embeddings=512,
            type_vocab_size=0,
            hidden_size=1536,
            num_hidden_layers=48,
            num_attention_heads=24,
            intermediate_size=6144,
            relative_attention=True,
            position_buckets=256,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            conv_kernel_size=3,
            conv_act="gelu",
        )
    )


def _gpt2(width: int, blocks: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=blocks, n_head=width // 64))


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "RoBERTa base": lambda: _roberta(768, 12),
    "RoBERTa large": lambda: _roberta(1024, 24),
    "DeBERTa XXL": _deberta_xxl,
    "GPT-2 medium": lambda: _gpt2(1024, 24),
    "GPT-2 large": lambda: _gpt2(1280, 36),
}


def build(name: str) -> nn.Module:
    """One of the architectures by its name in the tables, on the meta device."""
    with torch.device("meta"):
        return _BUILDERS[name]()
