"""Prompts as the denoiser reads them: token ids, then the text encoder's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lora_diffusion.errors import ConfigError


def token_count(pipe: Any, text: str) -> int:
    """How many tokens a prompt has, those that begin and end it included."""
    return len(pipe.tokenizer(text, truncation=False).input_ids)


class TextStates:
    """The prompts of a run, each tokenised once; encoded once, or anew for each batch where the encoder is trained.

    Args:
        pipe: the pipeline whose tokenizer and text encoder are used.
        max_length: tokens to which each prompt is padded (default: the tokenizer's own length).
        use_mask: give the encoder the mask of the padding.
    """

    def __init__(self, pipe: Any, *, max_length: int | None = None, use_mask: bool = False) -> None:
        self._pipe, self._encoder = pipe, pipe.text_encoder
        self._length = max_length or pipe.tokenizer.model_max_length
        self._use_mask = use_mask
        self._ids: dict[str, torch.Tensor] = {}
        self._masks: dict[str, torch.Tensor] = {}
        self._cached: dict[str, torch.Tensor] | None = None

    def add(self, texts: Sequence[str]) -> None:
        """Take in prompts that `states` may be asked for. Raises ConfigError for one that is too long."""
        for text in dict.fromkeys(texts):
            count = token_count(self._pipe, text)
            if count > self._length:
                raise ConfigError(
                    f"the prompt {text!r} has {count} tokens, {self._length} is the limit; make it shorter"
                )
            tokens = self._pipe.tokenizer(
                [text], padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
            )
            self._ids[text] = tokens.input_ids.to(self._encoder.device)
            self._masks[text] = tokens.attention_mask.to(self._encoder.device)

    def cache(self) -> None:
        """Encode all prompts now and never again; the encoder may leave the device."""
        with torch.no_grad():
            self._cached = {text: self._encode([text]).detach() for text in self._ids}

    def states(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The denoiser's keyword arguments for a batch with these prompts, one for each row.

        encoder_hidden_states: (rows, tokens, dim) in the encoder's precision; with a graph unless they are cached.
        """
        if self._cached is not None:
            return {"encoder_hidden_states": torch.cat([self._cached[text] for text in texts])}
        distinct = list(dict.fromkeys(texts))
        rows = torch.tensor([distinct.index(text) for text in texts], device=self._encoder.device)
        return {"encoder_hidden_states": self._encode(distinct).index_select(0, rows)}

    def _encode(self, texts: list[str]) -> torch.Tensor:
        ids = torch.cat([self._ids[text] for text in texts])
        mask = torch.cat([self._masks[text] for text in texts]) if self._use_mask else None
        return self._encoder(ids, attention_mask=mask)[0]
