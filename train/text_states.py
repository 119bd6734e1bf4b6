"""Prompts as the denoiser reads them: token ids, then what the text encoders make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lora_diffusion.errors import ConfigError
from train.families import Prompts, Sizes, family_of


def token_count(pipe: Any, text: str) -> int:
    """How many tokens a prompt has, those that begin and end it included; the most, where tokenizers differ."""
    return max(
        len(tokenizer(pipe.maybe_convert_prompt(text, tokenizer), truncation=False).input_ids)
        for tokenizer in _tokenizers(pipe)
    )


def token_limit(pipe: Any) -> int:
    """How many tokens the text encoders read."""
    limits = [tokenizer.model_max_length for tokenizer in _tokenizers(pipe)]
    limits += [encoder.config.max_position_embeddings for encoder in family_of(pipe).encoders_of(pipe).values()]
    return int(min(limits))


class TextStates:
    """The prompts of a run, each tokenised once; encoded once, or anew for each batch where encoders are trained.

    Args:
        pipe: the pipeline whose tokenizers and text encoders are used.
        max_length: tokens to which each prompt is padded (default: as many as the encoders read).
        use_mask: give the encoders the mask of the padding.
        resolution: side of the pictures, for those whose sizes are not told (default: the model's own).

    Raises:
        ConfigError: `max_length` is more than the encoders read.
    """

    def __init__(
        self, pipe: Any, *, max_length: int | None = None, use_mask: bool = False, resolution: int | None = None
    ) -> None:
        limit = token_limit(pipe)
        if max_length is not None and max_length > limit:
            raise ConfigError(f"--tokenizer_max_length {max_length} is more than the text encoder reads, {limit}")
        self._pipe, self._family = pipe, family_of(pipe)
        self._length = max_length or limit
        self._use_mask = use_mask
        self._resolution = resolution
        self._tokens: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # (ids, mask) for each encoder
        self._cached: dict[str, dict[str, torch.Tensor]] | None = None

    def add(self, texts: Sequence[str]) -> None:
        """Take in prompts that `states` may be asked for. Raises ConfigError for one that is too long."""
        for text in dict.fromkeys(texts):
            count = token_count(self._pipe, text)
            if count > self._length:
                raise ConfigError(
                    f"the prompt {text!r} has {count} tokens, {self._length} is the limit; make it shorter"
                )
            encoders = self._family.encoders_of(self._pipe).values()
            self._tokens[text] = []
            for tokenizer, encoder in zip(_tokenizers(self._pipe), encoders):
                tokens = tokenizer(
                    [self._pipe.maybe_convert_prompt(text, tokenizer)],
                    padding="max_length", truncation=True, max_length=self._length, return_tensors="pt",
                )  # fmt: skip
                self._tokens[text].append(
                    (tokens.input_ids.to(encoder.device), tokens.attention_mask.to(encoder.device))
                )

    def cache(self) -> None:
        """Encode all prompts now and never again; the encoders may leave the device."""
        with torch.no_grad():
            self._cached = {
                text: {name: rows.detach() for name, rows in self._encode([text]).items()} for text in self._tokens
            }

    def states(self, texts: Sequence[str], sizes: Sequence[Sizes] | None = None) -> dict[str, Any]:
        """The denoiser's keyword arguments for a batch with these prompts, one for each row.

        `encoder_hidden_states`: (rows, tokens, dim) in the encoders' precision; for SDXL also `added_cond_kwargs`, a
        dict of `text_embeds` (rows, dim) and `time_ids` (rows, 6). With a graph unless they are cached.

        Args:
            sizes: for each row (original height, original width, top, left, target height, target width) in pixels;
                without it, pictures are taken to be whole and of the training resolution.
        """
        if self._cached is not None:
            first = self._cached[texts[0]]
            rows = {name: torch.cat([self._cached[text][name] for text in texts]) for name in first}
        else:
            distinct = list(dict.fromkeys(texts))
            numbers = [distinct.index(text) for text in texts]
            rows = {
                name: values.index_select(0, torch.tensor(numbers, device=values.device))
                for name, values in self._encode(distinct).items()
            }
        return self._family.conditioning(rows, sizes or [self._whole()] * len(texts))

    def _whole(self) -> Sizes:
        side = self._resolution
        if side is None:
            own = self._family.denoiser_of(self._pipe).config.sample_size
            side = (own if isinstance(own, int) else min(own)) * self._pipe.vae_scale_factor
        return (side, side, 0, 0, side, side)

    def _encode(self, texts: list[str]) -> dict[str, torch.Tensor]:
        tokens = [self._tokens[text] for text in texts]
        each = range(len(self._family.text_encoders))
        ids = [torch.cat([one[encoder][0] for one in tokens]) for encoder in each]
        masks = [torch.cat([one[encoder][1] for one in tokens]) for encoder in each]
        return self._family.states(self._pipe, Prompts(texts, ids, masks, self._use_mask))


def _tokenizers(pipe: Any) -> list[Any]:
    return [getattr(pipe, one.tokenizer) for one in family_of(pipe).text_encoders]
