"""PEFT's prompt methods: virtual tokens in front of a language model's input, or in front of every layer's keys.

PEFT keeps the embeddings alone, from which training cannot go on. What there is beside them, P-tuning's encoder and its
template, lies in a file of our own in the same folder, which PEFT does not look at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter, Learned, Prompt
from ..components import BARE
from ..errors import AdapterFormatError
from ..methods.peft_prompts import KINDS, is_prompt
from . import diffusers
from .own import OWN_KEY, described
from .peft_config import PROMPT_FIELDS, PeftConfig
from .safetensors_file import TensorFile
from .source import Source

PROMPT = "prompt_embeddings"
ENCODER = "prompt_encoder.safetensors"

# What is written beside the counts; initial values and encoders are done with once the embeddings are learned.
_WRITTEN: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {"prompt_tuning_init": "RANDOM"},
    "P_TUNING": {"encoder_reparameterization_type": "MLP", "encoder_num_layers": 2, "encoder_dropout": 0.0},
    "PREFIX_TUNING": {"prefix_projection": False},
}


def read_prompt(file: Source, config: PeftConfig) -> Adapter:
    """Raises AdapterFormatError for embeddings whose shape is not what the config says."""
    if PROMPT not in file.tensors:
        raise file.error(f"has no {PROMPT}, and its config is of {config.kind}")
    shape, fields = file.tensors[PROMPT].shape, config.fields
    rows, width = expected_shape(config.kind, fields)
    fits = len(shape) == 2 and 0 not in shape and rows in (None, shape[0]) and width in (None, shape[1])
    if not fits:
        raise file.error(f"has {PROMPT} of shape {list(shape)}; by its config they are {[rows or '?', width or '?']}")
    kept = {name: fields[name] for name in PROMPT_FIELDS if fields.get(name) is not None}
    prompt = Prompt(config.kind, file.read([PROMPT])[PROMPT], kept)
    return Adapter({}, prompts={BARE: prompt}, methods=_encoder_beside(file.path.parent, config.kind))


def encoder_file(adapter: Adapter, component: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Tensors and metadata of the file beside PEFT's, None where PEFT's says it all."""
    prompts = {kind: part for kind, part in adapter.methods.get(component, {}).items() if is_prompt(kind)}
    more = any(len(part.tensors) > 1 or getattr(part.config, "template", None) for part in prompts.values())
    if not more:
        return None
    alone = Adapter({}, methods={BARE: prompts})
    tensors, strings = diffusers.write(alone)
    return tensors, {**strings, OWN_KEY: described(alone, tensors)}


def _encoder_beside(folder: Path, kind: str) -> dict[str, dict[str, Learned]]:
    """What lies beside PEFT's file, if it is of the same method. Raises AdapterFormatError for a file that is not
    sound."""
    path = folder / ENCODER
    found = diffusers.read(TensorFile(path)).methods.get(BARE, {}) if path.is_file() else {}
    ours = KINDS[kind]
    return {BARE: {ours: found[ours]}} if ours in found else {}


def expected_shape(kind: str, fields: Any) -> tuple[int | None, int | None]:
    """(tokens, dim) by a prompt's fields, None where they do not say: tokens for each of the model's submodules (T5 has
    two); for prefixes one row for both, as wide as the keys and values of all layers."""
    tokens, width = fields.get("num_virtual_tokens"), fields.get("token_dim")
    if kind == "PREFIX_TUNING":
        layers = fields.get("num_layers")
        return tokens, 2 * layers * width if layers and width else None
    return tokens and tokens * submodules(fields), width


def submodules(fields: Any) -> int:
    return fields.get("num_transformer_submodules") or (2 if fields.get("task_type") == "SEQ_2_SEQ_LM" else 1)


def prompt_config(prompt: Prompt, where: str) -> dict[str, Any]:
    """The adapter_config.json of a prompt. where: the folder, for errors.

    Raises AdapterFormatError for a kind that PEFT does not have, for a template that is no plain prefix, and where the
    fields do not fit the embeddings.
    """
    fields = prompt.fields
    if prompt.kind not in _WRITTEN:
        raise AdapterFormatError(f"{where}: not written, PEFT has no prompts of the kind {prompt.kind!r}")
    if fields.get("template") is not None and fields.get("pure_prefix") is False:
        raise AdapterFormatError(
            f"{where}: not written, the prompt's template {str(fields['template'])[:60]!a} puts virtual tokens "
            "elsewhere than in front of the input, and PEFT can only put them in front"
        )
    rows, width = prompt.embeddings.shape if prompt.embeddings.ndim == 2 else (0, 0)
    prefix, parts = prompt.kind == "PREFIX_TUNING", submodules(fields)
    layers = fields.get("num_layers")
    if prefix and not layers:
        raise AdapterFormatError(f"{where}: not written, PEFT needs num_layers for a prefix, and its fields lack it")
    counts = {
        "num_virtual_tokens": rows if prefix else rows // parts,
        "token_dim": width // (2 * layers) if prefix and layers else width,
        "num_transformer_submodules": parts,
    }
    told = {name: fields[name] for name in ("num_virtual_tokens", "token_dim") if fields.get(name) is not None}
    if (rows, width) != expected_shape(prompt.kind, {**fields, **counts, **told}) or 0 in (rows, width):
        shape = list(prompt.embeddings.shape)
        raise AdapterFormatError(f"{where}: not written, its embeddings have shape {shape}, its fields say {told}")
    others = {name: fields.get(name) for name in ("num_attention_heads", "num_layers", "encoder_hidden_size")}
    if prompt.kind == "PROMPT_TUNING":
        del others["encoder_hidden_size"]
    return {
        "peft_type": prompt.kind,
        "task_type": fields.get("task_type") or "CAUSAL_LM",
        "base_model_name_or_path": fields.get("base_model_name_or_path"),
        "inference_mode": True,
        **counts,
        **others,
        **_WRITTEN[prompt.kind],
    }
