"""The README.md beside a text adapter: what it is, how it was made, how good it is, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_diffusion.text import printable
from train.pocket_text import NAMES
from train.text_config import TextConfig, learning_rate_of, methods_of
from train.text_task_names import TASK_TYPES

_PIPELINES = {  # the hub's words
    "causal-lm": "text-generation",
    "seq2seq-lm": "text-generation",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "masked-lm": "fill-mask",
}
_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
}


def text_card(
    config: TextConfig,
    *,
    steps: int,
    figures: Mapping[str, Any],
    parameters: tuple[int, int],
    labels: Sequence[str] = (),
) -> str:
    """The model card of a text run (Markdown). The same run always gives the same card.

    Args:
        figures: {"test": {name: value}, …}. parameters: how many are learned, and how many the model has.
        labels: of a classification, in their order.
    """
    model, (learned, total) = config.pretrained_model_name_or_path, parameters
    front = ["---", "library_name: transformers", f"pipeline_tag: {_PIPELINES[config.task]}", f"tags: {_tags(config)}"]
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        front.append(f"base_model: {json.dumps(model)}")
    rates = ", ".join(f"{method} {learning_rate_of(config, method):g}" for method in methods_of(config))
    rows: list[tuple[str, Any]] = [
        ("base model", f"`{model}`"),
        ("task", config.task),
        ("method", config.method),
        ("learned parameters", f"{learned:,} beside {total:,} ({100 * learned / max(total, 1):.2f} %)"),
        *([("labels", ", ".join(f"`{printable(name, 40)}`" for name in labels[:20]))] if labels else []),
        ("steps", f"{steps} × batch {config.train_batch_size} × accumulation {config.gradient_accumulation_steps}"),
        ("learning rate", rates),
        ("precision of the base", {"no": "fp32"}.get(config.mixed_precision, config.mixed_precision)),
        *([("base stored in", config.quantize)] if config.quantize else []),
        ("seed", config.seed),
    ]
    for part, values in figures.items():
        listed = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, int | float))
        rows.append((part, listed))
    return "\n".join(
        [
            *front, "---", "",
            f"# An adapter for {config.task}", "",
            "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "",
            "```python",
            "import lora_diffusion as ld",
            f"from transformers import {_CLASSES[config.task]}",
            "",
            f"model = {_CLASSES[config.task]}.from_pretrained({_loadable(model)}{_labels(config, labels)})",
            'ld.load_adapter(model, "adapter.safetensors")',
            "```", "",
            "Made with lora_diffusion; `config.json` has every setting.", "",
        ]
    )  # fmt: skip


def _tags(config: TextConfig) -> str:
    peft = [TASK_TYPES[config.task]] if TASK_TYPES[config.task] else []
    return "[" + ", ".join(dict.fromkeys([*methods_of(config), *(str(one).lower() for one in peft)])) + "]"


def _labels(config: TextConfig, labels: Sequence[str]) -> str:
    if not config.task.endswith("-classification"):
        return ""
    return f", num_labels={1 if config.regression else len(labels)}"


def _loadable(model: str) -> str:
    return f'"…/train/_pocket_text/{NAMES[model]}"' if model in NAMES else json.dumps(model)
