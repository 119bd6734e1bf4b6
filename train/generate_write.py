"""Writing on from ids, token by token, each text from a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import lora_diffusion as ld
from train.generate_config import check_drawing
from train.text_tasks.tokens import pad_id

OnPiece = Callable[[str], None]
Stop = Callable[[], bool]


@dataclass(frozen=True)
class Drawing:
    """How tokens are chosen; names and meanings are those of `GenerateConfig`. Raises ConfigError."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_drawing(self.temperature, self.top_k, self.top_p, self.num_beams)


def write(
    model: Any, tokenizer: Any, ids: Sequence[int], drawing: Drawing, on_piece: OnPiece | None = None,
    should_stop: Stop | None = None,
) -> str:  # fmt: skip
    """The text that a model writes on from `ids`, (length,), with the adapters that are active.

    The prompts of active adapters that stand in front come in front; virtual tokens of a template are among the ids.

    Args:
        on_piece: told of every piece of text as soon as it is sure; together they are the result. With beams, nothing
            is sure before the end.
        should_stop: asked after every token; True ends the text there.
    """
    from transformers import StoppingCriteriaList

    device = model.get_input_embeddings().weight.device
    batch = {"input_ids": torch.tensor([list(ids)], device=device)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    pieces = _Pieces(tokenizer, on_piece)
    stops = StoppingCriteriaList([] if should_stop is None else [_Stopping(should_stop)])
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(drawing.seed)
        made = ld.prompted_generate(
            model, batch, **_settings(model, tokenizer, drawing), stopping_criteria=stops,
            streamer=pieces if drawing.num_beams == 1 else None,
        )  # fmt: skip
    if drawing.num_beams > 1:
        pieces.ids = made[0, _given(model, ids) :].tolist()
        pieces.end()
    return pieces.text


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Ids as text without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Pieces:
    """transformers' streamer: takes tokens, gives text, characters of several tokens only whole."""

    def __init__(self, tokenizer: Any, on_piece: OnPiece | None) -> None:
        self.tokenizer, self.on_piece = tokenizer, on_piece or (lambda piece: None)
        self.ids: list[int] = []
        self.given: int | None = None
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """The first is what was given, all others are new."""
        if self.given is None:
            self.given = int(value.shape[-1])
            return
        for token in value.flatten().tolist():
            self.take(token)

    def take(self, token: int) -> None:
        self.ids.append(token)
        self._say(decoded(self.tokenizer, self.ids), whole=False)

    def end(self) -> None:
        self._say(decoded(self.tokenizer, self.ids), whole=True)

    def _say(self, text: str, *, whole: bool) -> None:
        text = text.strip()  # spaces at the end come with what follows them
        half = text.endswith("\N{REPLACEMENT CHARACTER}") and not whole
        if text == self.text or half or not text.startswith(self.text):
            return
        new, self.text = text[len(self.text) :], text
        self.on_piece(new)


class _Stopping:
    """transformers' criterion: a wish from outside."""

    def __init__(self, should_stop: Stop) -> None:
        self.should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.should_stop(), dtype=torch.bool, device=input_ids.device)


def _settings(model: Any, tokenizer: Any, drawing: Drawing) -> dict[str, Any]:
    """Keywords of `generate`; everything that the model's own defaults might say otherwise is said."""
    ends = model.generation_config.eos_token_id
    found: dict[str, Any] = {
        "max_new_tokens": drawing.max_new_tokens,
        "num_beams": drawing.num_beams,
        "repetition_penalty": drawing.repetition_penalty,
        "do_sample": drawing.temperature > 0,
        "use_cache": True,
        "pad_token_id": pad_id(tokenizer),
        "eos_token_id": tokenizer.eos_token_id if ends is None else ends,
    }
    if drawing.temperature > 0:
        found |= {"temperature": drawing.temperature, "top_k": drawing.top_k or 0, "top_p": drawing.top_p or 1.0}
    return found


def _given(model: Any, ids: Sequence[int]) -> int:
    """How many tokens of a result are not new: the input's real ones; of an encoder-decoder's the one to start with."""
    if model.config.is_encoder_decoder:
        return 1
    size = int(model.get_input_embeddings().num_embeddings)
    return max(1, sum(token < size for token in ids))
