"""PEFT's `adapter_config.json`, read with suspicion: size, JSON and the types of the fields that decide something."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import is_number
from ..errors import AdapterFormatError
from .peft_patterns import Patterns

CONFIG = "adapter_config.json"
MAX_BYTES = 2**20
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")

# Heads that PEFT learns and saves for a task without being told.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
# Fields of a prompt's config, under PEFT's names, that `Prompt.fields` keeps.
PROMPT_FIELDS = (
    "base_model_name_or_path", "task_type", "num_virtual_tokens", "token_dim", "num_transformer_submodules",
    "num_attention_heads", "num_layers", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
    "tokenizer_kwargs", "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
    "encoder_dropout", "prefix_projection", "init_weights",
)  # fmt: skip
# Fields that change nothing in what the tensors mean once they are learned.
_HARMLESS = (
    "auto_mapping", "revision", "inference_mode", "peft_version", "r", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size", "velora_config", "runtime_config",
    "ensure_weight_tying", "modules_to_tie",
)  # fmt: skip
# Fields that, where set, make the layers compute something else than W·x + s·B·A·x.
_NOT_BUILT = {
    "lora_bias": "a LoRA bias",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA on bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """What of an adapter_config.json a reader needs; values are checked. fields: all that the file says."""

    kind: str
    fields: Mapping[str, Any]
    alpha: float = 8
    alphas: Patterns = field(default_factory=lambda: Patterns({}))
    notes: list[str] = field(default_factory=list)

    def scale(self, path: str, rank: int) -> float:
        """alpha / rank, or alpha / √rank with use_rslora; raises OverflowError for an alpha beyond every float."""
        alpha = float(self.alphas.value_for(path, self.alpha))
        return alpha / math.sqrt(rank) if self.fields.get("use_rslora") else alpha / rank


def read_config(path: Path) -> PeftConfig:
    """Raises AdapterFormatError, naming the file, for what is no sound config of LoRA or a prompt method."""
    fields = _table(path)
    for name, (fits, words) in _TYPES.items():
        if fields.get(name) is not None and not fits(fields[name]):
            raise _error(path, f"has {name} = {str(fields[name])[:60]!a}, which should be {words}")
    kind = fields.get("peft_type")
    if kind is None:
        raise _error(path, "has no peft_type: it is not a config of PEFT")
    if kind in PROMPTS:
        return PeftConfig(kind, fields, notes=_unknown(fields, PROMPT_FIELDS))
    if kind != "LORA":
        known = ", ".join(("LORA", *PROMPTS))
        raise _error(path, f"is of the PEFT method {kind[:40]!a}, which this version cannot load ({known})")
    for name, method in _NOT_BUILT.items():
        if fields.get(name):
            raise _error(path, f"uses {method} ({name}), which this version cannot load")
    if fields.get("bias") not in (None, "none"):
        raise _error(path, f"has bias = {fields['bias'][:40]!a}: learned biases of the base cannot be loaded")
    try:
        alphas = Patterns(fields.get("alpha_pattern") or {})
    except ValueError as error:
        raise _error(path, f"has an alpha_pattern that {error}") from None
    notes = _unknown(fields, ()) + _base_notes(fields.get("init_lora_weights"))
    alpha = fields.get("lora_alpha")
    return PeftConfig(kind, fields, 8 if alpha is None else alpha, alphas, notes)


def _table(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise _error(path, f"cannot be read ({error.strerror or error})") from None
    if len(raw) > MAX_BYTES:
        raise _error(path, f"is larger than {MAX_BYTES:,} bytes")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise _error(path, "is not JSON") from None
    if not isinstance(value, dict):
        raise _error(path, "is not a table")
    return value


def _error(path: Path, what: str) -> AdapterFormatError:
    return AdapterFormatError(f"{path} {what}")


def _unknown(fields: Mapping[str, Any], more: tuple[str, ...]) -> list[str]:
    known = {*_HARMLESS, *_NOT_BUILT, *_TYPES, *more}
    unknown = sorted(name for name, value in fields.items() if name not in known and value is not None)
    if not unknown:
        return []
    return [
        f"{CONFIG} has fields that are not known, and ignored: {', '.join(ascii(n[:40])[1:-1] for n in unknown[:8])}"
    ]


def _base_notes(init: Any) -> list[str]:
    if not isinstance(init, str) or not init.lower().startswith(_CHANGE_THE_BASE):
        return []
    return [
        f"made with init_lora_weights={init[:40]!a} and not converted: PEFT changes the base weights for it, so these "
        "factors are no difference to the original base; PEFT converts with path_initial_model_for_weight_conversion"
    ]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(_is_text(item) and item for item in value)


def _is_alphas(value: object) -> bool:
    return isinstance(value, dict) and all(is_number(item) for item in value.values())


_TRUTH: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, bool), "true or false")
_TEXT: tuple[Callable[[Any], bool], str] = (_is_text, "a text")
_COUNT: tuple[Callable[[Any], bool], str] = (_is_count, "a whole number above 0")
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": _TEXT,
    "task_type": _TEXT,
    "base_model_name_or_path": _TEXT,
    "bias": _TEXT,
    "lora_alpha": (is_number, "a finite number"),
    "alpha_pattern": (_is_alphas, "a table of finite numbers"),
    "lora_dropout": (is_number, "a finite number"),
    "use_rslora": _TRUTH,
    "use_dora": _TRUTH,
    "fan_in_fan_out": _TRUTH,
    "modules_to_save": (_is_names, "a list of names"),
    "init_lora_weights": (lambda value: isinstance(value, bool | str), "true, false or a name"),
    "num_virtual_tokens": _COUNT,
    "token_dim": _COUNT,
    "num_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "num_transformer_submodules": _COUNT,
}
