"""Tiny models of random weights, one of each family that takes prefixes, and a batch for each."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

CAUSAL, ENCODERS, TWO_STACKS = ("gpt2", "llama", "qwen2", "mistral"), ("bert", "roberta", "deberta"), ("t5", "mt5")
OTHERS = ("qwen3", "gemma3", "phi3", "gpt_neox", "electra")  # that work the same way; seen beside PEFT only
FAMILIES = (*CAUSAL, *ENCODERS, *TWO_STACKS)
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "decoder_start_token_id": 0}
_DEBERTA = {
    **_SIZES,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 4,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
_CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, {**_SIZES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, _GROUPED),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, _GROUPED),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig, _GROUPED),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, {**_GROUPED, "head_dim": 12}),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, {**_GROUPED, "head_dim": 8}),
    "phi3": (tf.Phi3ForCausalLM, tf.Phi3Config, _GROUPED),
    "gpt_neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, _SIZES),
    "electra": (tf.ElectraForSequenceClassification, tf.ElectraConfig, {**_SIZES, "embedding_size": 32}),
    "bert": (tf.BertForSequenceClassification, tf.BertConfig, _SIZES),
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig, {**_SIZES, "pad_token_id": 1}),
    "deberta": (tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config, _DEBERTA),
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config, _T5),
    "mt5": (tf.MT5ForConditionalGeneration, tf.MT5Config, _T5),
}


def model(family: str, attention: str = "sdpa", layers: int = 2, **fields: Any) -> Any:
    """In eval mode. Llama, Qwen2 and Mistral have grouped queries: keys of 2 heads for 4."""
    cls, config_class, sizes = _CLASSES[family]
    attention = "eager" if family == "deberta" else attention  # it has no other
    count = {"num_layers" if family in TWO_STACKS else "num_hidden_layers": layers}
    torch.manual_seed(0)
    return cls._from_config(config_class(**{**sizes, **count, **fields}), attn_implementation=attention).eval()


def batch(family: str) -> dict[str, torch.Tensor]:
    """Three rows of seven tokens; the first is padded, on the left for decoders. T5 has labels of five as well."""
    ids = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    if family in (*ENCODERS, "electra"):
        mask = mask.flip(1)
    ids[mask == 0] = 1 if family == "roberta" else 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "labels": ids[:, :5].clamp(min=3)} if family in TWO_STACKS else inputs


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A model's logits, 0 at padding that a decoder was given on the left: what stands there means nothing."""
    found: torch.Tensor = model(**inputs).logits
    if found.shape[:2] == inputs["input_ids"].shape and "attention_mask" in inputs:
        found = found * inputs["attention_mask"][..., None]
    return found


def generated(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    """Six new tokens for each row, greedily or by the settings."""
    given = {name: value for name, value in inputs.items() if name != "labels"}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}
    found: torch.Tensor = model.generate(**given, **settings)
    return found
