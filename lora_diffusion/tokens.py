"""Words that an adapter brings, or learns: ids in the tokenizer, vectors beside the token embedding.

A word of several vectors is several tokens, `<dog>`, `<dog>_1`, `<dog>_2`; a diffusers pipeline writes them all where a
prompt says `<dog>` (its `maybe_convert_prompt`). The tokenizer's own state is kept as text, and is back with the last
word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .components import components_of
from .errors import AdapterMismatchError, ConfigError
from .layers import AdaptedModule
from .layers.virtual_tokens import (
    TokenVectors,
    VirtualTokens,
    add_vectors,
    check_can_take_words,
    remove_vectors,
)

Tokens = Mapping[str, Mapping[str, torch.Tensor]]
MAX_VECTORS = 1024  # of one word

_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}


@dataclass(frozen=True)
class TextualInversionConfig:
    """A word to learn (Gal et al. 2022).

    placeholder_token: the word, new to the tokenizer: "<sks>".
    initializer_token: what its vectors start from, "dog"; the mean of its tokens where it has several. None: values
        drawn like those of the table.
    num_vectors: how many tokens the word becomes.
    Raises ConfigError.
    """

    placeholder_token: str
    initializer_token: str | None = None
    num_vectors: int = 1

    def __post_init__(self) -> None:
        word = self.placeholder_token
        if not isinstance(word, str) or not word.strip() or word != word.strip() or not word.isprintable():
            raise ConfigError(f"placeholder_token={word!r}: give a word without spaces around it")
        count = self.num_vectors
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_VECTORS:
            raise ConfigError(f"num_vectors={count!r}: give a whole number from 1 to {MAX_VECTORS}")


class Words:
    """The words in one text encoder, all adapters' together. before: the tokenizer's state without them."""

    def __init__(self, text_encoder: nn.Module, tokenizer: Any) -> None:
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.before = tokenizer._tokenizer.to_str()
        self.legacy_ends = [m for m in text_encoder.modules() if m.__dict__.get("eos_token_id") == _LEGACY_END]

    @property
    def embedding(self) -> Any:
        return _embedding(self.text_encoder)

    def sync(self) -> None:
        """Bring the tokenizer, and the embedding's ids, in line with the words that the embedding carries."""
        self.tokenizer._tokenizer = type(self.tokenizer._tokenizer).from_str(self.before)
        carried = self.embedding.all_vectors() if isinstance(self.embedding, VirtualTokens) else []
        ids: dict[str, list[int]] = {}
        for part in carried:
            for word, count in part.words.items():
                names = spelled(word, count)
                self.tokenizer.add_tokens(names)
                ids[word] = self.tokenizer.convert_tokens_to_ids(names)
        for module in self.legacy_ends:
            module.eos_token_id = self.tokenizer.eos_token_id if carried else _LEGACY_END
        if carried:
            self.embedding.set_ids(ids)


# What CLIP's configs of 2022 say, and mean "the highest id"; with ids above the real end of text that is wrong.
_LEGACY_END = 2


def spelled(word: str, count: int) -> list[str]:
    """The tokens of a word of `count` vectors."""
    return [word, *(f"{word}_{k}" for k in range(1, count))]


def check_tokens(target: Any, tokens: Tokens) -> dict[str, str]:
    """{word: why it cannot go into the target}, empty when all can."""
    refused: dict[str, str] = {}
    modules = {} if isinstance(target, nn.Module) else components_of(target)
    for word, vectors in tokens.items():
        for component, vector in vectors.items():
            tokenizer = getattr(target, _TOKENIZERS.get(component, ""), None)
            if component not in modules or tokenizer is None:
                refused[word] = f"it needs a pipeline with a tokenizer for its {component}"
                continue
            refused |= _refused(word, vector, component, modules[component], tokenizer)
    return refused


def _refused(word: str, vector: torch.Tensor, component: str, module: nn.Module, tokenizer: Any) -> dict[str, str]:
    embedding = _embedding(module)
    dim = embedding.weight.shape[1]
    if getattr(tokenizer, "_tokenizer", None) is None:
        return {word: f"the tokenizer of {component} is a {type(tokenizer).__name__}, to which words cannot be added"}
    if isinstance(embedding, AdaptedModule):
        return {word: f"the token embedding of {component} carries a low-rank adapter"}
    if vector.ndim != 2 or vector.shape[1] != dim or not 1 <= vector.shape[0] <= MAX_VECTORS:
        return {word: f"its vectors have shape {tuple(vector.shape)}, {component} needs (n, {dim})"}
    vocabulary = tokenizer.get_vocab()
    known = next((name for name in [*spelled(word, vector.shape[0]), f"{word}_1"] if name in vocabulary), None)
    if known is not None:
        return {word: f"the tokenizer of {component} has {'that word' if known == word else repr(known)} already"}
    if not torch.isfinite(vector).all():
        return {word: "its vectors hold NaN or infinity"}
    return {}


def refuse_tokens(refused: Mapping[str, str], origin: str) -> None:
    """Raises AdapterMismatchError for the first word that cannot go in."""
    if refused:
        word, reason = next(iter(refused.items()))
        raise AdapterMismatchError(f"{origin} brings the word {word!a}, which cannot go in: {reason}")


def initial_vectors(
    target: Any, configs: Sequence[TextualInversionConfig], generator: torch.Generator | None
) -> dict[str, dict[str, torch.Tensor]]:
    """{word: {component: (n, dim) fp32 on the CPU}} to start learning from, for every text encoder of a pipeline.

    Raises ConfigError for a word given twice or an initializer without tokens, AdapterMismatchError for a target
    without a tokenizer.
    """
    words = [config.placeholder_token for config in configs]
    if len(set(words)) != len(words):
        raise ConfigError(f"tokens={words}: each word once")
    modules = {} if isinstance(target, nn.Module) else components_of(target)
    encoders = [c for c in modules if getattr(target, _TOKENIZERS.get(c, ""), None) is not None]
    if not encoders:
        raise AdapterMismatchError("words are learned in a pipeline with a tokenizer and a text encoder: give one")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for config in configs:
        for component in encoders:
            tokenizer = getattr(target, _TOKENIZERS[component])
            table = _embedding(modules[component]).weight.detach().float().cpu()
            if config.initializer_token is None:
                noise = torch.randn(config.num_vectors, table.shape[1], generator=generator)
                vectors = noise * table.std(dim=0) + table.mean(dim=0)
            else:
                ids = tokenizer(config.initializer_token, add_special_tokens=False).input_ids
                if not ids:
                    raise ConfigError(
                        f"initializer_token={config.initializer_token!r} has no tokens: give a known word"
                    )
                vectors = table[ids].mean(dim=0, keepdim=True).repeat(config.num_vectors, 1)
            found.setdefault(config.placeholder_token, {})[component] = vectors
    return found


def install_tokens(target: Any, name: str, tokens: Tokens, dtype: torch.dtype) -> dict[str, TokenVectors]:
    """Put the words of adapter `name` in place; returns what each component carries. Ask `check_tokens` before."""
    modules = components_of(target) if tokens else {}
    found: dict[str, TokenVectors] = {}
    for component in dict.fromkeys(component for vectors in tokens.values() for component in vectors):
        own = {word: vectors[component] for word, vectors in tokens.items() if component in vectors}
        embedding = _embedding(modules[component])
        check_can_take_words(f"the token embedding of {component}", embedding)
        stacked = torch.cat([vector.detach().to(embedding.weight.device, dtype) for vector in own.values()])
        found[component] = TokenVectors({word: len(vector) for word, vector in own.items()}, stacked)
        words = words_of(modules[component]) or Words(modules[component], getattr(target, _TOKENIZERS[component]))
        modules[component].__dict__[_ATTRIBUTE] = words
        add_vectors(embedding, name, found[component])
        words.sync()
    return found


def uninstall_tokens(text_encoder: nn.Module, name: str) -> None:
    """Take the words of adapter `name` out of a text encoder and its tokenizer."""
    words = words_of(text_encoder)
    assert words is not None, "only called where words were installed"
    remove_vectors(words.embedding, name)
    words.sync()
    if not isinstance(words.embedding, VirtualTokens):
        del text_encoder.__dict__[_ATTRIBUTE]


_ATTRIBUTE = "_lora_diffusion_words"


def words_of(text_encoder: nn.Module) -> Words | None:
    return text_encoder.__dict__.get(_ATTRIBUTE)


def _embedding(text_encoder: nn.Module) -> Any:
    return text_encoder.get_input_embeddings()
