"""What is in an adapter, and what it says of itself, whoever made it: its base, the words that call it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from .adapter import Adapter, LowRank
from .checks import layers_without_effect
from .structured import Structured

MAX_TAGS = 5

# Where tools keep the base model's name and its kind, the most telling first.
_BASE_KEYS = ("base_model", "pretrained_model_name_or_path", "base_model_name_or_path")
_FOREIGN_BASE_KEYS = ("ss_sd_model_name", "modelspec.architecture", "ss_base_model_version")
_NOTHING = ("", "None", "none", "null")


def describe(adapter: Adapter) -> dict[str, Any]:
    """All of it as JSON values. Texts are as the file has them: make them printable before a terminal sees them.

    components: {name: counts, ranks, alphas, scales, dtypes, parameters, kinds of layers and their paths}.
    tokens: {word: {component: [vectors, dim]}}. prompts: {component: {"kind", "shape"}}.
    copies: {component: {path: [tensor names]}}. methods: {component: {kind: its config}}.
    without_effect: layers whose update is zero, as \"component.path\".
    """
    components = {name: _component(layers) for name, layers in adapter.layers().items()}
    tokens = {
        word: {component: list(vectors.shape) for component, vectors in parts.items()}
        for word, parts in adapter.tokens.items()
    }
    prompts = {
        component: {"kind": prompt.kind, "shape": list(prompt.embeddings.shape)}
        for component, prompt in adapter.prompts.items()
    }
    copies = {
        component: {path: sorted(values) for path, values in modules.items()}
        for component, modules in adapter.copies.items()
    }
    return {
        "dialect": adapter.dialect,
        "base": base_of(adapter),
        "trigger_words": trigger_words(adapter),
        "intact": adapter.intact,
        "layers": adapter.layer_count(),
        "parameters": _parameters(adapter),
        "components": components,
        "tokens": tokens,
        "prompts": prompts,
        "copies": copies,
        "methods": {
            component: {kind: part.config.to_dict() for kind, part in learned.items()}
            for component, learned in adapter.methods.items()
        },
        "without_effect": layers_without_effect(adapter),
        "metadata": adapter.metadata,
        "foreign": adapter.foreign,
        "notes": adapter.notes,
    }


def base_of(adapter: Adapter) -> str | None:
    """The name of the base model that the adapter was made for, as its file gives it."""
    for table, keys in ((adapter.metadata, _BASE_KEYS), (adapter.foreign, (*_BASE_KEYS, *_FOREIGN_BASE_KEYS))):
        for key in keys:
            value = table.get(key)
            if isinstance(value, str) and value not in _NOTHING:
                return value
    return None


def trigger_words(adapter: Adapter) -> list[str]:
    """What to put into a prompt: the adapter's own words, the prompt that it was trained with, its commonest tags."""
    given = adapter.metadata.get("trigger_words")
    words = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    prompt, phrase = adapter.metadata.get("instance_prompt"), adapter.foreign.get("modelspec.trigger_phrase")
    words = [word for word in [*words, prompt, phrase, *adapter.tokens] if isinstance(word, str)]
    words = [word for word in dict.fromkeys(words) if word not in _NOTHING]
    return words or _commonest_tags(adapter.foreign.get("ss_tag_frequency", ""))


def _component(layers: dict[str, LowRank | Structured]) -> dict[str, Any]:
    tensors = [tensor for layer in layers.values() for tensor in _tensors(layer)]
    return {
        "layers": len(layers),
        "kinds": dict(Counter(_kind(layer) for layer in layers.values())),
        "ranks": sorted({layer.rank for layer in layers.values()}),
        "alphas": sorted({round(layer.scale * layer.rank, 6) for layer in layers.values()}),
        "scales": sorted({round(layer.scale, 6) for layer in layers.values()}),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "paths": sorted(layers),
    }


def _kind(layer: LowRank | Structured) -> str:
    name = "LoRA" if isinstance(layer, LowRank) else layer.kind
    return name if layer.magnitude is None else f"{name} with DoRA"


def _tensors(layer: LowRank | Structured) -> list[Any]:
    own = [layer.a, layer.b] if isinstance(layer, LowRank) else list(layer.tensors().values())
    more = [] if layer.magnitude is None else [layer.magnitude]
    return own + [tensor for tensor in more if not any(tensor is one for one in own)]


def _parameters(adapter: Adapter) -> int:
    tensors = [t for layers in adapter.layers().values() for layer in layers.values() for t in _tensors(layer)]
    tensors += [t for modules in adapter.copies.values() for values in modules.values() for t in values.values()]
    tensors += [t for parts in adapter.tokens.values() for t in parts.values()]
    tensors += [prompt.embeddings for prompt in adapter.prompts.values()]
    tensors += [t for learned in adapter.methods.values() for part in learned.values() for t in part.tensors.values()]
    return sum(tensor.numel() for tensor in tensors)


def _commonest_tags(text: str) -> list[str]:
    """kohya's table: {folder: {tag: count}}."""
    try:
        folders: Any = json.loads(text)
    except (ValueError, RecursionError):
        return []
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int) and tag.strip():
                counts[tag.strip()] += count
    return [tag for tag, _ in counts.most_common(MAX_TAGS)]
