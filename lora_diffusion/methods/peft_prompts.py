"""Between PEFT's prompts, which are embeddings in front of an input, and what the methods here have learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter, Learned, Prompt
from ..errors import AdapterFormatError
from .prompt_encoder_config import PromptEncoderConfig
from .prompt_given import rows_of
from .prompt_tuning_config import PromptConfig, PromptTuningConfig

# PEFT's word for a method: ours.
KINDS = {"PROMPT_TUNING": "prompt_tuning", "P_TUNING": "p_tuning", "PREFIX_TUNING": "prefix_tuning"}
_WORDS = {ours: peft for peft, ours in KINDS.items()}

_SHAPE = ("num_layers", "num_attention_heads")
# The end of a transformers class's name: PEFT's word for its task.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def is_prompt(kind: str) -> bool:
    """Whether PEFT has this method as a prompt."""
    return kind in _WORDS


def with_methods(adapter: Adapter) -> Adapter:
    """The adapter with its PEFT prompts as methods, for a model to take.

    Where the folder held our encoder as well (`files/peft_prompt.py`), that goes in, if it still makes the embeddings
    that PEFT saw; else bare vectors do, and a note says so.
    Raises AdapterFormatError for fields that make no config.
    """
    if not adapter.prompts:
        return adapter
    methods = {component: dict(learned) for component, learned in adapter.methods.items()}
    notes = list(adapter.notes)
    for component, prompt in adapter.prompts.items():
        kind = KINDS[prompt.kind]
        kept = methods.setdefault(component, {}).get(kind)
        if kept is not None and _same(prompt_of(kept).embeddings, prompt.embeddings):
            continue
        if kept is not None:
            notes.append("the prompt's encoder no longer makes the embeddings beside it, and is left out")
        methods[component][kind] = learned_of(prompt)
    return dataclasses.replace(adapter, prompts={}, methods=methods, notes=notes)


def with_prompts(adapter: Adapter, modules: Mapping[str, nn.Module] | None = None) -> Adapter:
    """The adapter with PEFT's form of its prompts beside our own, of which more can be kept.

    modules: the components, if they are at hand, for what only they can say.
    A template that is a plain prefix goes along: its virtual tokens come after what a tokenizer puts first ([CLS]),
    and PEFT's before that, which is one thing for tokenizers that put nothing there, such as GPT-2's.
    Raises AdapterFormatError for two prompts in one component.
    """
    prompts = dict(adapter.prompts)
    for component, learned in adapter.methods.items():
        kinds = [kind for kind in learned if is_prompt(kind)]
        if len(kinds) > 1:
            raise AdapterFormatError(f"{component} has {' and '.join(kinds)}, and a folder of PEFT holds one prompt")
        if kinds and component not in prompts:
            prompts[component] = prompt_of(learned[kinds[0]], (modules or {}).get(component))
    return dataclasses.replace(adapter, prompts=prompts)


def learned_of(prompt: Prompt) -> Learned:
    """Bare vectors. Raises AdapterFormatError for another kind of prompt and for fields that make no config."""
    if prompt.kind == "PREFIX_TUNING":
        from .prefix_tuning import from_prompt

        return from_prompt(prompt)
    fields, (rows, dim) = prompt.fields, prompt.embeddings.shape
    told = fields.get("num_virtual_tokens")
    common: dict[str, Any] = {
        "num_virtual_tokens": told or rows,
        "num_transformer_submodules": max(1, rows // (told or rows)),
        "task_type": fields.get("task_type"),
        "token_dim": dim,
        **{name: fields.get(name) for name in _SHAPE},
    }
    if prompt.kind == "P_TUNING":
        config: PromptConfig = PromptEncoderConfig(**common, encoder_reparameterization_type="NONE")
    elif prompt.kind == "PROMPT_TUNING":
        config = PromptTuningConfig(**common)
    else:
        raise AdapterFormatError(f"a prompt of the kind {prompt.kind[:40]!a} has no place here")
    return Learned(config, {"vectors": prompt.embeddings})


def prompt_of(learned: Learned, component: nn.Module | None = None) -> Prompt:
    """PEFT's form. component: the model that it is for, for what the config does not say.

    Raises AdapterMismatchError where the tensors are not those of the config.
    """
    if learned.config.kind == "prefix_tuning":
        from .prefix_tuning import to_prompt

        return to_prompt(learned, component)
    config = learned.config
    assert isinstance(config, PromptConfig), "asked for prompts only"
    rows = rows_of(learned).to(torch.float32)
    told = getattr(component, "config", None)
    fields = {
        "task_type": config.task_type or _task(component),
        "num_virtual_tokens": config.tokens,
        "num_transformer_submodules": config.num_transformer_submodules,
        "token_dim": rows.shape[1],
        "num_layers": config.num_layers or getattr(told, "num_hidden_layers", None),
        "num_attention_heads": config.num_attention_heads or getattr(told, "num_attention_heads", None),
    }
    if isinstance(config, PromptEncoderConfig) and config.parsed is not None:
        fields.update(template=config.parsed.text, pure_prefix=config.parsed.is_prefix)
    return Prompt(_WORDS[config.kind], rows, {name: value for name, value in fields.items() if value is not None})


def _task(component: nn.Module | None) -> str | None:
    if component is None:
        return None
    name = type(component).__name__
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), "FEATURE_EXTRACTION")


def _same(made: torch.Tensor, given: torch.Tensor) -> bool:
    return made.shape == given.shape and torch.allclose(made, given.to(made.dtype), rtol=1e-3, atol=1e-4)
