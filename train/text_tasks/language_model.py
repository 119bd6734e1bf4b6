"""What causal and sequence-to-sequence language models have in common: a loss over tokens, and text to generate."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from train.text_loss import answer_logits, answer_loss
from train.text_metrics import perplexity
from train.text_tasks.task import IGNORED, Batch, Example, Task

_OWN = ("labels", "positions", "targets")  # what a batch holds for the loss and the model does not take


@dataclass(frozen=True)
class Scored:
    """An answer as the model judges it, given its true beginning at every token.

    nll: the sum of -log p over its tokens, in nats. tokens: how many. right: how many of them are the most likely one.
    first: whether the first is.
    """

    nll: float
    tokens: int
    right: int
    first: bool


class LanguageModel(Task):
    """Tokens are predicted one by one; the answer's count."""

    @abstractmethod
    def prompt_ids(self, example: Example) -> list[int]:
        """What generating begins with."""

    @property
    def best_by(self) -> str:
        return "loss"

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return answer_loss(model, _inputs(batch), batch["positions"], batch["targets"])

    def predict(self, model: Any, batch: Batch) -> list[Scored]:
        logits = answer_logits(model, _inputs(batch), batch["positions"]).float()
        nll = cross_entropy(logits, batch["targets"], reduction="none").tolist()
        right = (logits.argmax(dim=-1) == batch["targets"]).tolist()
        rows = (batch["positions"] // batch["labels"].shape[1]).tolist()
        own: list[list[int]] = [[] for _ in range(batch["labels"].shape[0])]
        for place, row in enumerate(rows):
            own[row].append(place)
        found = []
        for places in own:
            hits = [right[place] for place in places]
            found.append(Scored(math.fsum(nll[place] for place in places), len(places), sum(hits), any(hits[:1])))
        return found

    def metrics(self, predictions: Sequence[Scored], references: Sequence[Any]) -> dict[str, float]:
        """loss and perplexity per token; accuracy of tokens; p@1, of first tokens; whole answers that greedy decoding
        would give (exact)."""
        tokens = sum(one.tokens for one in predictions)
        loss = math.fsum(one.nll for one in predictions) / max(tokens, 1)
        count = max(len(predictions), 1)
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "accuracy": sum(one.right for one in predictions) / max(tokens, 1),
            "p@1": sum(one.first for one in predictions) / count,
            "exact": sum(one.right == one.tokens for one in predictions) / count,
        }

    @torch.no_grad()
    def generate(
        self, model: Any, examples: Sequence[Example], *, max_new_tokens: int = 64, num_beams: int = 1
    ) -> list[str]:
        """Continuations of the examples' prompts, without sampling, as one batch."""
        batch = self._prompts(examples)
        device = next(model.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        made = model.generate(
            **inputs, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False,
            pad_token_id=self.padding, eos_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        new = made if model.config.is_encoder_decoder else made[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    @property
    @abstractmethod
    def padding(self) -> int:
        """The id that fills rows up."""

    @abstractmethod
    def _prompts(self, examples: Sequence[Example]) -> Batch:
        """The prompts as a batch to generate from."""


def _inputs(batch: Batch) -> dict[str, Any]:
    """What the model takes. Without a cache, which nothing here reads; with one, transformers no longer sees that texts
    are packed."""
    return {**{name: value for name, value in batch.items() if name not in _OWN}, "use_cache": False}


def targets_of(labels: torch.Tensor, *, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where, in the flattened (rows, length) of the logits, the counted labels are predicted, and these labels.

    shift: how far before its label a logit stands: 1 for a causal model. Found on the CPU, so that no loss waits for
    the device.
    """
    flat = labels.flatten()
    places = (flat != IGNORED).nonzero().flatten()
    return places - shift, flat[places]
