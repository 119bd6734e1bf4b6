"""The lean loss of language models against the plain one: value, gradients, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DebertaConfig,
    DebertaForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_diffusion as ld
from lora_diffusion.planning.live_bytes import LiveBytes
from train.text_loss import answer_logits, answer_loss

VOCABULARY, ROWS, LENGTH = 64, 3, 10
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
# BART adds a bias to its logits, Cohere scales them, Gemma 2 caps them.
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "bloom": (BloomForCausalLM, BloomConfig, {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "llama": (LlamaForCausalLM, LlamaConfig, _LLAMA),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, _LLAMA),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**_LLAMA, "head_dim": 8}),
    "phi3": (Phi3ForCausalLM, Phi3Config, _LLAMA),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, _BERT),
    "cohere": (CohereForCausalLM, CohereConfig, _LLAMA),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**_LLAMA, "head_dim": 8}),
    "bert": (BertForMaskedLM, BertConfig, _BERT),
    "roberta": (RobertaForMaskedLM, RobertaConfig, _BERT),
    "deberta": (DebertaForMaskedLM, DebertaConfig, _BERT),
    "deberta-v2": (DebertaV2ForMaskedLM, DebertaV2Config, _BERT),
    "t5": (T5ForConditionalGeneration, T5Config, _T5),
    "mt5": (MT5ForConditionalGeneration, MT5Config, _T5),
    "bart": (BartForConditionalGeneration, BartConfig, _BART),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    kind, config, values = MODELS[name]
    model = kind(config(**values, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batch(model: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, shape, generator=generator)

    inputs = {"input_ids": ids(ROWS, LENGTH), "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids(ROWS, LENGTH)
    positions = torch.tensor([1, 4, 5, 6, 13, 18, 22, 28])
    return inputs, positions, ids(len(positions))


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("at_once", [2**25, 3 * VOCABULARY])
def test_it_is_the_plain_loss(name: str, at_once: int) -> None:
    model = made(name)
    inputs, positions, targets = batch(model)
    wanted = cross_entropy(model(**inputs).logits.flatten(0, 1)[positions].float(), targets)
    wanted.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = answer_loss(model, inputs, positions, targets, at_once=at_once)
    found.backward()
    assert found.shape == () and found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)


def test_it_is_transformers_own_loss_on_whole_rows() -> None:
    model = made("bloom")
    inputs, _, _ = batch(model)
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    wanted = model(**inputs, labels=labels).loss
    places = (labels.flatten() != -100).nonzero().flatten()
    found = answer_loss(model, inputs, places - 1, labels.flatten()[places], at_once=5 * VOCABULARY)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert", "t5"])
def test_the_logits_of_some_positions(name: str) -> None:
    model = made(name)
    inputs, positions, _ = batch(model)
    with torch.no_grad():
        wanted = model(**inputs).logits.flatten(0, 1)[positions]
        torch.testing.assert_close(answer_logits(model, inputs, positions), wanted, rtol=1e-6, atol=1e-6)


def test_with_an_adapter_at_the_head_and_checkpointing() -> None:
    model = made("llama")
    names = ["q_proj", "v_proj", "lm_head"]
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    inputs, positions, targets = batch(model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = cross_entropy(model(**inputs).logits.flatten(0, 1)[positions], targets)
    gradients = torch.autograd.grad(wanted, learned)
    found = answer_loss(model, inputs, positions, targets, at_once=2 * VOCABULARY)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(found, learned), gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_behind(fails: bool) -> None:
    model = made("gpt2")
    inputs, positions, targets = batch(model)
    if fails:
        inputs["input_ids"] = inputs["input_ids"] + 10**6
        with pytest.raises(IndexError):
            answer_loss(model, inputs, positions, targets, at_once=VOCABULARY)
    else:
        answer_loss(model, inputs, positions, targets, at_once=VOCABULARY)
    assert not model.lm_head._forward_pre_hooks and not model.lm_head._forward_hooks


def test_it_takes_less_memory() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=5000, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).requires_grad_(False)
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=["c_attn"]))
    inputs = {"input_ids": torch.randint(0, 5000, (1, 200))}
    positions, targets = torch.arange(199), torch.randint(0, 5000, (199,))

    def peak(places: torch.Tensor, at_once: int) -> int:
        with LiveBytes() as live:
            answer_loss(model, inputs, places, targets[: len(places)], at_once=at_once).backward()
        return live.peak

    whole = peak(positions, 2**25)
    logits = 199 * 5000 * 4
    assert whole > 2.9 * logits  # logits, their softmax, and its gradient
    assert peak(positions, 20 * 5000) < 0.35 * whole
    assert peak(positions[:5], 2**25) < 0.15 * whole
