"""Prompts as the UNet reads them: token ids, then the text encoder's hidden states."""

from __future__ import annotations

from typing import Any

import torch

from lora_diffusion.errors import ConfigError


def token_count(pipe: Any, text: str) -> int:
    """How many tokens a prompt has, those that begin and end it included."""
    return len(pipe.tokenizer(text, truncation=False).input_ids)


class Prompts:
    """The few prompts of a run, tokenised once; encoded once, or anew for each batch where the encoder is trained.

    Args:
        pipe: the pipeline whose tokenizer and text encoder are used.
        texts: the prompts, in the order in which `states` gives them back.
        max_length: tokens to which each is padded (default: the tokenizer's own length).
        use_mask: give the encoder the mask of the padding.

    Raises:
        ConfigError: a prompt is longer than that.
    """

    def __init__(self, pipe: Any, texts: list[str], *, max_length: int | None = None, use_mask: bool = False) -> None:
        tokenizer = pipe.tokenizer
        length = max_length or tokenizer.model_max_length
        for text in texts:
            count = token_count(pipe, text)
            if count > length:
                raise ConfigError(f"the prompt {text!r} has {count} tokens, {length} is the limit; make it shorter")
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        self._encoder = pipe.text_encoder
        self._ids = tokens.input_ids.to(self._encoder.device)
        self._mask = tokens.attention_mask.to(self._encoder.device) if use_mask else None
        self._cached: torch.Tensor | None = None

    def cache(self) -> None:
        """Encode now and never again; the encoder may leave the device."""
        with torch.no_grad():
            self._cached = self.states().detach()

    def states(self) -> torch.Tensor:
        """(prompts, tokens, dim) in the encoder's precision; with a graph unless they are cached."""
        if self._cached is not None:
            return self._cached
        return self._encoder(self._ids, attention_mask=self._mask)[0]
