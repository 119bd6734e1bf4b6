"""A cloze: the masked model says the one token that belongs at the mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy

from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable
from train.text_bad_rows import BadRows
from train.text_loss import answer_logits, answer_loss
from train.text_metrics import accuracy
from train.text_rows import Row
from train.text_tasks.labels import Labels
from train.text_tasks.task import IGNORED, Batch, Example, Task, shown
from train.text_tasks.tokens import frame, ids_of, model_inputs, padded
from train.text_template import MASK, MASK_MARK, Filled, TextTemplate, VirtualPrompt

_OWN = ("labels", "positions", "targets")


@dataclass(frozen=True)
class Guess:
    """token: the most likely one, of the allowed where there are any. nll: -log p of the right one, over the whole
    vocabulary."""

    token: int
    nll: float


class MaskedLM(Task):
    """BERT, RoBERTa, DeBERTa; the LAMA probe, and classification in words.

    Args:
        template: "{x} lives in {mask} ." with one {mask}, and the column of the answer.
        virtual: makes the prompt instead, with virtual tokens and the mask in it.
        words: label -> word that stands for it at the mask; the answers are then labels, and these words alone are
            allowed.
        allowed: words that may be predicted; None allows all. The loss is over the whole vocabulary all the same.
        too_long: "truncate" shortens what is left of the mask, from its beginning, before what is right of it.

    Raises:
        ConfigError: no mask token, no {mask} or several, a word of `words` or `allowed` that is not one token.
    """

    name: ClassVar[str] = "masked-lm"
    model_class: ClassVar[str] = "AutoModelForMaskedLM"
    task_type: ClassVar[str | None] = None

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: TextTemplate,
        virtual: VirtualPrompt | None = None,
        words: Mapping[str, str] | None = None,
        allowed: Sequence[str] | None = None,
        max_length: int = 512,
        too_long: str = "error",
    ) -> None:
        super().__init__(tokenizer, max_length=max_length, too_long=too_long)
        template.check_answer(self.name)
        if tokenizer.mask_token_id is None:
            raise ConfigError(f"the tokenizer has no mask token: {self.name} needs a masked model, such as BERT")
        if virtual is None and template.prompt.count(f"{{{MASK}}}") != 1:
            raise ConfigError(
                f"the template {printable(template.prompt)!a} needs one {{mask}}: it is where the answer goes"
            )
        if words is not None and allowed is not None:
            raise ConfigError("give words or allowed, not both: the words are what is allowed")
        self.template, self.virtual = template, virtual
        self.mask = int(tokenizer.mask_token_id)
        self.start, self.finish = frame(tokenizer)
        before = template.prompt.partition(f"{{{MASK}}}")[0]
        self._space = virtual is not None or before[-1:].isspace()
        self.words = None if words is None else {label: self._given(word) for label, word in words.items()}
        self.labels = None if words is None else Labels(list(words))
        if self.words is not None and len(set(self.words.values())) != len(self.words):
            raise ConfigError(f"words={dict(words or {})!r}: each label needs a word of its own")
        self.allowed = sorted(set(self.words.values())) if self.words else None
        if allowed is not None:
            self.allowed = sorted({self._given(word) for word in allowed})
            if not self.allowed:
                raise ConfigError("allowed holds no word")

    def prepare(self, rows: Sequence[Row], bad: BadRows, *, training: bool = True) -> list[Example]:
        examples = []
        for row, filled in self.template.fill(rows, bad, virtual=self.virtual):
            answer = self._answer(filled.answer.strip(), row, bad)
            ids = None if answer is None else self._prompt(row, filled, bad)
            if ids is None or answer is None:
                continue
            if ids.count(self.mask) != 1:
                bad.report(row.source, "does not have one mask", "leave the mask token out of the texts",
                           f"{ids.count(self.mask)} masks")  # fmt: skip
                continue
            examples.append(Example({"input_ids": ids}, answer, answer, 1, row.source))
        return self._left(examples, bad)

    def _answer(self, text: str, row: Row, bad: BadRows) -> int | None:
        if self.words is not None and self.labels is not None:
            if text not in self.words:
                bad.report(row.source, "has a label without a word", self.labels.advice(text), ascii(printable(text)))
            return self.words.get(text)
        found = self._tokens(text)
        if len(found) != 1 or found[0] == self.tokenizer.unk_token_id:
            what = f"{printable(text)!a} is {len(found)}" if len(found) != 1 else f"{printable(text)!a} is none"
            bad.report(row.source, "has an answer that is not one token", "shorten the answer, or choose causal-lm",
                       what)  # fmt: skip
            return None
        if self.allowed is not None and found[0] not in self.allowed:
            bad.report(row.source, "has an answer that is not allowed", "add it to the allowed words",
                       ascii(printable(text)))  # fmt: skip
            return None
        return found[0]

    def _prompt(self, row: Row, filled: Filled, bad: BadRows) -> list[int] | None:
        if self.virtual is not None:
            return self._virtual(self.virtual, row, self.max_length, bad)
        before, after = filled.prompt.split(MASK_MARK)
        # A tokenizer keeps the space before a word in the word: what the mask stands for begins with it.
        ids = ids_of(self.tokenizer, before.rstrip() + self.tokenizer.mask_token + after)
        if ids.count(self.mask) != 1:
            return ids
        place = ids.index(self.mask)
        left, right = ids[:place], ids[place + 1 :]
        length = len(self.start) + len(left) + 1 + len(right) + len(self.finish)
        if not self._fits(length, row, bad):
            if self.too_long != "truncate":
                return None
            over = length - self.max_length
            left, over = left[over:], max(0, over - len(left))
            right = right[: len(right) - over]
        return [*self.start, *left, self.mask, *right, *self.finish]

    def _tokens(self, word: str) -> list[int]:
        """Of a word at the mask's place."""
        return ids_of(self.tokenizer, f" {word}" if self._space else word)

    def _given(self, word: str) -> int:
        found = self._tokens(word)
        if len(found) != 1 or found[0] == self.tokenizer.unk_token_id:
            raise ConfigError(f"{word!a} is not one token of this tokenizer ({len(found)}): choose another word")
        return found[0]

    def collate(self, examples: Sequence[Example], *, multiple: int = 1) -> Batch:
        """input_ids, attention_mask, labels (rows, length); positions, targets (rows,)."""
        batch = model_inputs([dict(one.inputs) for one in examples], self.tokenizer, multiple=multiple)
        rows = [
            [one.labels if token == self.mask else IGNORED for token in one.inputs["input_ids"]] for one in examples
        ]
        batch["labels"] = padded(rows, IGNORED, multiple=multiple)
        batch["positions"] = (batch["labels"].flatten() != IGNORED).nonzero().flatten()
        batch["targets"] = batch["labels"].flatten()[batch["positions"]]
        return batch

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return answer_loss(model, _inputs(batch), batch["positions"], batch["targets"])

    def predict(self, model: Any, batch: Batch) -> list[Guess]:
        logits = answer_logits(model, _inputs(batch), batch["positions"]).float()
        nll = cross_entropy(logits, batch["targets"], reduction="none").tolist()
        if self.allowed is None:
            best = logits.argmax(dim=-1)
        else:
            allowed = torch.tensor(self.allowed, device=logits.device)
            best = allowed[logits[:, allowed].argmax(dim=-1)]
        return [Guess(token, value) for token, value in zip(best.tolist(), nll)]

    def metrics(self, predictions: Sequence[Guess], references: Sequence[int]) -> dict[str, float]:
        """loss over the whole vocabulary; p@1: how often the likeliest (allowed) token is the right one."""
        return {
            "loss": sum(one.nll for one in predictions) / max(len(predictions), 1),
            "p@1": accuracy([one.token for one in predictions], references),
        }

    @property
    def best_by(self) -> str:
        return "p@1"

    def preview(self, example: Example) -> str:
        """The row with the mask and, after an arrow, the token that belongs there."""
        ids = example.inputs["input_ids"]
        text = shown(self.tokenizer, ids, {ids.index(self.mask)})
        return f"{text} → {shown(self.tokenizer, [example.labels], {0})}"


def _inputs(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in _OWN}
