"""Language models of every family, tiny and of random weights, and an answer of theirs to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
_ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_SIZES)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_SIZES)),
    "deberta": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(**_SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], conv_kernel_size=3)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64, **_ENDS)
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES, num_key_value_heads=2, **_ENDS)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_SIZES, num_key_value_heads=2, **_ENDS)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_SIZES, num_key_value_heads=2, **_ENDS)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=99, decoder_start_token_id=0)
    ),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=99, **_ENDS)
    ),
}  # fmt: skip


@pytest.fixture
def text_model() -> Callable[[str], Any]:
    """text_model(family): a new model in eval mode, the same weights every time."""

    def build(family: str) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _FAMILIES[family]().eval()

    return build


@pytest.fixture
def text_answer() -> Callable[..., torch.Tensor]:
    """text_answer(model, rows=3): its logits for fixed ids; keywords go to the model's forward. Without gradients,
    unless `learning`: PyTorch chooses its attention kernel by who wants gradients, and they round differently."""

    def run(model: Any, rows: int = 3, learning: bool = False, **kwargs: Any) -> torch.Tensor:
        ids = torch.randint(3, 99, (rows, 7), generator=torch.Generator().manual_seed(2))
        if model.config.is_encoder_decoder:
            kwargs["decoder_input_ids"] = ids[:, :5]
        with torch.set_grad_enabled(learning):
            return model(input_ids=ids, **kwargs).logits

    return run
