"""PEFT's prompt methods: what PEFT made is read, written, and loaded by PEFT with the same logits."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_diffusion as ld

IDS = torch.tensor([[3, 7, 11, 2, 9, 1]])


def llama() -> nn.Module:
    """Keys and values of two heads for queries of four, which makes PEFT's prefixes narrower."""
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3,
        max_position_embeddings=32,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config)


def answer(model: nn.Module) -> torch.Tensor:
    model.eval()
    more = {"labels": IDS} if isinstance(model.get_base_model(), T5ForConditionalGeneration) else {}
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **more).logits


def made(build: Callable[[], nn.Module], config: peft.PeftConfig) -> tuple[nn.Module, nn.Module]:
    """(the base, PEFT's model with learned values)."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = build()
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape) * 0.3)
    return model, wrapped


KINDS: dict[str, tuple[Callable[[], nn.Module], peft.PeftConfig]] = {
    "prompt": (llama, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prompt of two": (t5, peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2)),
    "prompt and head": (bert, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)),
    "p-tuning": (gpt2, peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)),
    "p-tuning lstm": (
        gpt2,
        peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"
        ),
    ),
    "prefix": (llama, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix projected": (
        gpt2,
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
        ),
    ),
    "prefix of two": (t5, peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    build, config = KINDS[kind]
    model, wrapped = made(build, copy.deepcopy(config))
    wrapped.save_pretrained(tmp_path / "theirs")
    adapter = ld.read_adapter(tmp_path / "theirs")
    prompt = adapter.prompts["model"]
    assert prompt.kind == config.peft_type
    assert prompt.fields["num_virtual_tokens"] == config.num_virtual_tokens
    assert adapter.notes == []
    ld.write_adapter(adapter, tmp_path / "ours", format="peft")
    again = ld.read_adapter(tmp_path / "ours")
    assert torch.equal(again.prompts["model"].embeddings, prompt.embeddings)
    assert set(load_file(tmp_path / "ours" / "adapter_model.safetensors")) == set(
        load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    )
    theirs, ours = (peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / n) for n in ("theirs", "ours"))
    assert torch.equal(answer(ours), answer(theirs))
    torch.testing.assert_close(answer(ours), answer(wrapped), rtol=1e-5, atol=1e-5)


def prompt_of(kind: str, shape: tuple[int, ...], **fields: Any) -> ld.Adapter:
    g = torch.Generator().manual_seed(0)
    embeddings = torch.randn(shape, generator=g)
    return ld.Adapter({}, prompts={"model": ld.adapter.Prompt(kind, embeddings, fields)})


@pytest.mark.parametrize(
    ("build", "adapter"),
    [
        (llama, prompt_of("PROMPT_TUNING", (3, 16))),
        (gpt2, prompt_of("P_TUNING", (3, 16), template="<v><v><v> text", pure_prefix=True)),
        (llama, prompt_of("PREFIX_TUNING", (3, 32), num_layers=2, num_attention_heads=2)),
        (gpt2, prompt_of("PREFIX_TUNING", (3, 64), num_layers=2, num_attention_heads=2, prefix_projection=True)),
        (t5, prompt_of("PROMPT_TUNING", (4, 16), task_type="SEQ_2_SEQ_LM")),
    ],
)
def test_from_little(build: Callable[[], nn.Module], adapter: ld.Adapter, tmp_path: Path) -> None:
    """A prompt with hardly any fields makes a folder that PEFT takes: counts come from the embeddings."""
    ld.write_adapter(adapter, tmp_path / "a", format="peft")
    wrapped = peft.PeftModel.from_pretrained(build(), tmp_path / "a")
    assert torch.equal(wrapped.prompt_encoder["default"].embedding.weight, adapter.prompts["model"].embeddings)
    assert answer(wrapped).isfinite().all()


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (prompt_of("P_TUNING", (3, 16), template="text <v> text", pure_prefix=False), "in front of the input"),
        (prompt_of("PREFIX_TUNING", (3, 32)), "num_layers"),
        (prompt_of("PREFIX_TUNING", (3, 33), num_layers=2), "shape"),
        (prompt_of("PROMPT_TUNING", (3, 16), num_virtual_tokens=4), "shape"),
        (prompt_of("PROMPT_TUNING", (3,)), "shape"),
        (prompt_of("MULTITASK_PROMPT_TUNING", (3, 16)), "no prompts of the kind"),
    ],
)
def test_what_cannot_be_written(adapter: ld.Adapter, words: str, tmp_path: Path) -> None:
    with pytest.raises(ld.AdapterFormatError, match=words):
        ld.write_adapter(adapter, tmp_path / "a", format="peft")
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_beside_layers_cannot_be_written(tmp_path: Path) -> None:
    low_rank = ld.LowRank(torch.zeros(2, 16), torch.zeros(16, 2))
    both = dataclasses.replace(prompt_of("PROMPT_TUNING", (3, 16)), components={"model": {"a": low_rank}})
    with pytest.raises(ld.AdapterFormatError, match="either"):
        ld.write_adapter(both, tmp_path / "a", format="peft")


@pytest.mark.parametrize(
    ("fields", "shape", "words"),
    [
        ({"num_virtual_tokens": 4}, (3, 16), r"of shape \[3, 16\]"),
        ({"num_virtual_tokens": 3, "num_transformer_submodules": 2}, (3, 16), r"\[6, '\?'\]"),
        ({"token_dim": 8}, (3, 16), "of shape"),
        ({"peft_type": "PREFIX_TUNING", "num_layers": 2, "token_dim": 16}, (3, 16), r"\['\?', 64\]"),
        ({}, (3,), "of shape"),
        ({}, (0, 16), "of shape"),
        ({"num_virtual_tokens": "3"}, (3, 16), "num_virtual_tokens"),
        ({"num_virtual_tokens": -3}, (3, 16), "num_virtual_tokens"),
        ({"peft_type": "LORA"}, (3, 16), "prompt_embeddings beside"),
        ({"peft_type": "CPT"}, (3, 16), "'CPT'"),
    ],
)
def test_damaged(fields: dict[str, Any], shape: tuple[int, ...], words: str, tmp_path: Path) -> None:
    save_file({"prompt_embeddings": torch.zeros(shape)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING", **fields}))
    with pytest.raises(ld.AdapterFormatError, match=words) as caught:
        ld.read_adapter(tmp_path)
    assert str(caught.value).isprintable()


def test_without_a_config_the_method_is_unknown(tmp_path: Path) -> None:
    save_file({"prompt_embeddings": torch.zeros(3, 16)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ld.AdapterFormatError, match="no adapter_config"):
        ld.read_adapter(tmp_path / "adapter_model.safetensors")
