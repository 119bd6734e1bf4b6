"""Text models to plan for: their modules without weights, from a config file or from a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_diffusion.errors import ConfigError, ModelNotFoundError
from train.pocket_text import folder_of
from train.text_plan_architectures import TEXT_ARCHITECTURES, TextArchitecture

_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
}


def text_model(
    name: str, task: str, *, labels: int = 2, revision: str | None = None, attn_implementation: str | None = None
) -> nn.Module:
    """A model of transformers on the meta device, frozen and in evaluation mode.

    Args:
        name: one of `TEXT_ARCHITECTURES`, 'pocket-bert', 'pocket-gpt', a folder, or a hub id, of which the config file
            alone is read.
        labels: of a classification.

    Raises:
        ModelNotFoundError: there is no such model, or its config is damaged or out of reach.
        ConfigError: a model of that kind cannot do the task.
    """
    import transformers

    known = TEXT_ARCHITECTURES.get(name) if not Path(name).exists() else None
    config = _known(known) if known is not None else _read(name, revision)
    if task in ("sequence-classification", "token-classification"):
        config.num_labels = labels
    config.use_cache = False
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    maker: Any = getattr(transformers, _CLASSES[task])
    if type(config) not in maker._model_mapping:
        raise ConfigError(f"{name} is a {config.model_type}, of which transformers has no {task} model")
    try:
        with torch.device("meta"):
            model: nn.Module = maker.from_config(config, **options)
    except Exception as problem:  # transformers raises whatever a config makes it stumble over
        what = " ".join(str(problem).split())[:200]
        raise ModelNotFoundError(f"the config of {name} does not describe a {config.model_type}: {what}") from problem
    if known is not None and known.own_head:
        _untie(model)
    return model.eval().requires_grad_(False)


def _known(architecture: TextArchitecture) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(architecture.kind, **architecture.config)


def _read(name: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    place = folder_of(name) or Path(name)
    if not place.exists() and name.count("/") != 1:
        names = ", ".join(TEXT_ARCHITECTURES)
        raise ModelNotFoundError(
            f"there is no model {name}; give a folder, a hub id (owner/name), 'pocket-bert', 'pocket-gpt' or {names}"
        )
    if place.exists() and not (place / "config.json").is_file():
        raise ModelNotFoundError(f"there is no config.json in {place}")
    source = str(place) if place.exists() else name
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as problem:  # damaged files and unreachable hubs raise all kinds
        what = " ".join(str(problem).split())[:200]
        raise ModelNotFoundError(f"the config of {name} cannot be read: {type(problem).__name__}: {what}") from problem


def _untie(model: Any) -> None:
    """Give a model that ties its head to its embedding a head of its own, as loading files with both does."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
