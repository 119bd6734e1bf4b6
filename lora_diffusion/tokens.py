"""Words that an adapter brings along (textual inversion, Gal et al. 2022): vectors for the token embedding.

Putting them into a pipeline's tokenizer and text encoder is diffusers' `load_textual_inversion`; here is the
bookkeeping that takes them out with the adapter that brought them, and the checks before.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .components import components_of
from .errors import AdapterMismatchError
from .layers import AdaptedModule

Tokens = Mapping[str, Mapping[str, torch.Tensor]]

_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class _Words:
    """What was put into one text encoder. embedding, rows: its embedding and that one's weight before the first word
    (growing it changes the module in place)."""

    def __init__(self, embedding: Any) -> None:
        self.embedding = embedding
        self.rows: torch.Tensor = embedding.weight.data
        self.by_adapter: dict[str, dict[str, torch.Tensor]] = {}


_words: weakref.WeakKeyDictionary[nn.Module, _Words] = weakref.WeakKeyDictionary()


def check_tokens(target: Any, tokens: Tokens) -> dict[str, str]:
    """{word: why it cannot go into the target}, empty when all can."""
    refused: dict[str, str] = {}
    modules = {} if isinstance(target, nn.Module) else components_of(target)
    for word, vectors in tokens.items():
        for component, vector in vectors.items():
            tokenizer = getattr(target, _TOKENIZERS.get(component, ""), None)
            if component not in modules or tokenizer is None or not hasattr(target, "load_textual_inversion"):
                refused[word] = f"it needs a pipeline with a tokenizer for its {component}"
                continue
            embedding: Any = modules[component].get_input_embeddings()
            if isinstance(embedding, AdaptedModule):
                refused[word] = f"the token embedding of {component} carries an adapter: add the words before it"
            elif vector.ndim != 2 or vector.shape[1] != embedding.weight.shape[1]:
                wanted = embedding.weight.shape[1]
                refused[word] = f"its vectors have shape {tuple(vector.shape)}, {component} needs (n, {wanted})"
            elif word in tokenizer.get_vocab() or f"{word}_1" in tokenizer.get_vocab():
                refused[word] = f"the tokenizer of {component} has that word already"
            elif not torch.isfinite(vector).all():
                refused[word] = "its vectors hold NaN or infinity"
    return refused


def add_tokens(target: Any, name: str, tokens: Tokens) -> None:
    """Put the words into the pipeline on behalf of the adapter `name`. Ask `check_tokens` before."""
    modules = components_of(target) if tokens else {}
    for word, vectors in tokens.items():
        for component, vector in vectors.items():
            text_encoder: Any = modules[component]
            embedding = text_encoder.get_input_embeddings()
            words = _words.setdefault(text_encoder, _Words(embedding))
            wanted = embedding.weight.requires_grad
            target.load_textual_inversion(
                {word: vector.detach().to(embedding.weight)},
                tokenizer=getattr(target, _TOKENIZERS[component]),
                text_encoder=text_encoder,
            )
            text_encoder.get_input_embeddings().weight.requires_grad_(wanted)
            words.by_adapter.setdefault(name, {})[word] = vector.detach().to("cpu", copy=True)


def remove_tokens(target: Any, name: str) -> None:
    """Take out what the adapter `name` brought; with the last word the text encoder's own embedding is back."""
    for component, words in _present(target, name).items():
        text_encoder: Any = components_of(target)[component]
        vectors = words.by_adapter.pop(name)
        spelled = [f"{w}_{i}" if i else w for w, vector in vectors.items() for i in range(vector.shape[0])]
        target.unload_textual_inversion(
            spelled, tokenizer=getattr(target, _TOKENIZERS[component]), text_encoder=text_encoder
        )
        if not words.by_adapter:
            words.embedding.weight.data = words.rows
            words.embedding.num_embeddings = text_encoder.config.vocab_size = words.rows.shape[0]
            text_encoder.set_input_embeddings(words.embedding)
            del _words[text_encoder]


def tokens_of(target: Any, name: str) -> dict[str, dict[str, torch.Tensor]]:
    """{word: {component: (n, dim)}} of what the adapter `name` brought."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for component, words in _present(target, name).items():
        for word, vector in words.by_adapter[name].items():
            found.setdefault(word, {})[component] = vector.clone()
    return found


def refuse_tokens(refused: Mapping[str, str], origin: str) -> None:
    """Raises AdapterMismatchError for the first word that cannot go in."""
    if refused:
        word, reason = next(iter(refused.items()))
        raise AdapterMismatchError(f"{origin} brings the word {word!a}, which cannot go in: {reason}")


def _present(target: Any, name: str) -> dict[str, _Words]:
    if isinstance(target, nn.Module):
        return {}
    found = {component: _words.get(module) for component, module in components_of(target).items()}
    return {component: words for component, words in found.items() if words is not None and name in words.by_adapter}
