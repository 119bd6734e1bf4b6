"""Tiny models of random weights, the same every time, for every family and head; what PEFT prints about them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

_COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_CONFIGS: dict[str, Callable[..., Any]] = {
    "Bert": lambda **k: transformers.BertConfig(**_COMMON, **k),
    "Roberta": lambda **k: transformers.RobertaConfig(**_COMMON, **k),
    "DebertaV2": lambda **k: transformers.DebertaV2Config(**_COMMON, **k),
    "GPT2": lambda **k: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64, **_IDS, **k
    ),
    "Llama": lambda **k: transformers.LlamaConfig(**_COMMON, num_key_value_heads=2, **_IDS, **k),
    "T5": lambda **k: transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0, **k
    ),
}


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """tiny("Bert", "ForSequenceClassification"): in evaluation mode, three labels (two for answers)."""

    def build(family: str, head: str) -> Any:
        config = _CONFIGS[family](num_labels=2 if head == "ForQuestionAnswering" else 3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return getattr(transformers, family + head)(config).eval()

    return build


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of seven tokens, the second with padding behind."""
    ids = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def printed() -> Callable[[Any], str]:
    """printed(model): the line of its print_trainable_parameters()."""

    def run(model: Any) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            model.print_trainable_parameters()
        return out.getvalue()

    return run


@pytest.fixture
def scramble() -> Callable[[Any], Any]:
    """scramble(model): random values for everything that learns, as training might give; returns the model."""

    def run(model: Any) -> Any:
        g = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
        return model

    return run
