"""What learns is what PEFT lets learn, down to the printed line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MT5Config, MT5ForConditionalGeneration

import lora_diffusion as ld

peft = pytest.importorskip("peft")

CASES = [
    *[(f, "ForSequenceClassification", "SEQ_CLS") for f in ("Bert", "Roberta", "DebertaV2", "GPT2", "Llama")],
    *[(f, "ForTokenClassification", "TOKEN_CLS") for f in ("Bert", "Roberta", "DebertaV2", "GPT2", "Llama", "T5")],
    *[(f, "ForQuestionAnswering", "QUESTION_ANS") for f in ("Bert", "Roberta", "DebertaV2", "GPT2", "Llama", "T5")],
    *[(f, "Model", "FEATURE_EXTRACTION") for f in ("Bert", "Roberta", "DebertaV2", "GPT2", "Llama", "T5")],
    ("GPT2", "LMHeadModel", "CAUSAL_LM"),
    ("Llama", "ForCausalLM", "CAUSAL_LM"),
    ("T5", "ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("Bert", "ForMaskedLM", None),
    ("Roberta", "ForMaskedLM", None),
]
METHODS: dict[str, dict[str, Any]] = {
    "PromptTuningConfig": {"num_virtual_tokens": 5},
    "PromptEncoderConfig": {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "PrefixTuningConfig": {"num_virtual_tokens": 5},
}


@pytest.mark.parametrize(("family", "head", "task"), CASES)
def test_lora_by_default(
    family: str, head: str, task: str | None, tiny: Callable[..., Any], printed: Callable[[Any], str]
) -> None:
    """A LoraConfig that names no targets adapts what PEFT's adapts, and a task's head is learned along."""
    theirs = peft.get_peft_model(tiny(family, head), peft.LoraConfig(task_type=task, r=4))
    ours = ld.get_peft_model(tiny(family, head), ld.LoraConfig(task_type=task, r=4))
    assert printed(ours) == printed(theirs)
    assert type(ours).__name__ == type(theirs).__name__


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("family", "head", "task"),
    [
        case
        for case in CASES
        if case[2] is not None and case[0] in ("Bert", "GPT2", "Llama", "T5") and case[1] != "Model"
    ],
)
def test_prompts(
    method: str, family: str, head: str, task: str, tiny: Callable[..., Any], printed: Callable[[Any], str]
) -> None:
    if method == "PrefixTuningConfig" and family == "T5" and task != "SEQ_2_SEQ_LM":
        pytest.skip("PEFT's prefix for T5 is for the whole of it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny(family, head), getattr(peft, method)(task_type=task, **METHODS[method]))
    ours = ld.get_peft_model(tiny(family, head), getattr(ld, method)(task_type=task, **METHODS[method]))
    assert printed(ours) == printed(theirs)


def test_head_by_another_name_is_said(tiny: Callable[..., Any], printed: Callable[[Any], str]) -> None:
    """T5's classification_head is none of PEFT's names: it stays frozen there, and here too, but not in silence."""
    config = {"task_type": "SEQ_CLS", "r": 4}
    theirs = peft.get_peft_model(tiny("T5", "ForSequenceClassification"), peft.LoraConfig(**config))
    with pytest.warns(UserWarning, match="no module called classifier or score"):
        ours = ld.get_peft_model(tiny("T5", "ForSequenceClassification"), ld.LoraConfig(**config))
    assert printed(ours) == printed(theirs)
    named = ld.LoraConfig(**config, modules_to_save=["classification_head"])
    with pytest.warns(UserWarning):
        more = ld.get_peft_model(tiny("T5", "ForSequenceClassification"), named)
    assert more.get_nb_trainable_parameters()[0] > ours.get_nb_trainable_parameters()[0]


def test_mt5_large_as_in_the_lecture(printed: Callable[[Any], str]) -> None:
    config = MT5Config(d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, vocab_size=250112)
    lecture: dict[str, Any] = {"task_type": ld.TaskType.SEQ_2_SEQ_LM, "r": 8, "lora_alpha": 32, "lora_dropout": 0.1}

    def build() -> MT5ForConditionalGeneration:
        with torch.device("meta"):
            return MT5ForConditionalGeneration(config)

    ours = ld.get_peft_model(build(), ld.LoraConfig(**lecture))
    assert printed(ours) == "trainable params: 2,359,296 || all params: 975,825,920 || trainable%: 0.2418\n"
    assert printed(peft.get_peft_model(build(), peft.LoraConfig(**lecture))) == printed(ours)


def test_two_adapters_and_half_precision(tiny: Callable[..., Any], printed: Callable[[Any], str]) -> None:
    """Only the adapter that acts learns; adapters are fp32 beside a base in half precision unless asked otherwise."""
    ours = ld.get_peft_model(tiny("GPT2", "LMHeadModel").half(), ld.LoraConfig(task_type="CAUSAL_LM", r=4))
    theirs = peft.get_peft_model(tiny("GPT2", "LMHeadModel").half(), peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    for model, config in ((ours, ld.LoraConfig(task_type="CAUSAL_LM", r=2)), (theirs, peft.LoraConfig(r=2))):
        model.add_adapter("other", config)
        assert model.active_adapters == ["default"]
    assert printed(ours) == printed(theirs)
    for model in (ours, theirs):
        model.set_adapter("other")
    assert printed(ours) == printed(theirs)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    half = ld.get_peft_model(tiny("GPT2", "LMHeadModel").half(), ld.LoraConfig(r=2), autocast_adapter_dtype=False)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float16}
