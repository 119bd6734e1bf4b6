"""What PEFT does where a config is silent: which projections get a term, and which head is learned along."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from torch import nn

from ..config import LoraConfig
from ..files.peft_config import HEADS
from ..methods.prompt_tuning_config import PromptConfig
from .config import Method, named_task
from .task_type import TaskType

# Projections of architectures for which PEFT's default is not the query's and the value's.
_OTHERS: dict[str, tuple[str, ...]] = {
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "rwkv": ("key", "value", "receptance", "output"),
}


def completed(method: Method, model: nn.Module) -> Method:
    """A config as PEFT would complete it for this model.

    A LoraConfig that names no targets has the preset "attention" here; PEFT adapts the queries and the values (Hu et
    al. 2021, section 4.2), and so does whoever asks by PEFT's names. Name the projections to have others.
    A task that needs a head brings the head, where the model has one under the names that PEFT knows, as a module to
    save; a warning says where it has none. A prompt for an encoder-decoder task has as many vectors for the decoder,
    which PEFT keeps and does not use.
    Raises ConfigError for a task that PEFT does not have.
    """
    method = named_task(method)
    changes: dict[str, Any] = {}
    if isinstance(method, LoraConfig) and method.target_modules == "attention":
        architecture = getattr(getattr(model, "config", None), "model_type", "")
        changes["target_modules"] = _OTHERS.get(architecture, "attention-qv")
    if isinstance(method, PromptConfig) and _has_decoder_part(method):
        changes["num_transformer_submodules"] = 2
    heads = find_heads(model, method.task_type)
    if not heads and method.task_type in HEADS:
        names = " or ".join(HEADS[method.task_type])
        warnings.warn(
            f"task_type={method.task_type}, and this {type(model).__name__} has no module called {names}: if it has a "
            "head by another name, that stays as it is unless modules_to_save names it",
            stacklevel=2,
        )
    if heads:
        changes["modules_to_save"] = list(dict.fromkeys([*(method.modules_to_save or ()), *heads]))
    return dataclasses.replace(method, **changes) if changes else method


def _has_decoder_part(method: PromptConfig) -> bool:
    return method.task_type == TaskType.SEQ_2_SEQ_LM and getattr(method, "template", None) is None


def find_heads(model: nn.Module, task: str | None) -> list[str]:
    """Paths of the modules that PEFT learns along for a task: those whose path ends in one of its names for heads."""
    names = HEADS.get(task, ()) if task else ()
    found = [path for path, _ in model.named_modules() if names and path.endswith(names) and ".copy_" not in path]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
