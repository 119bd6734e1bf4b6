"""Causal language models: a prompt and its answer, the loss on the answer only; or plain text, all of it counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from lora_diffusion.errors import ConfigError
from train.text_bad_rows import BadRows
from train.text_rows import Row
from train.text_tasks.language_model import LanguageModel, targets_of
from train.text_tasks.task import IGNORED, TOO_LONG, Batch, Example
from train.text_tasks.tokens import end_id, frame, ids_of, model_inputs, pad_id, padded
from train.text_template import Filled, TextTemplate, VirtualPrompt, words_together


class CausalLM(LanguageModel):
    """GPT-2, Llama, Qwen, Mistral.

    Args:
        template: its `prompt` may be empty: then the whole text counts, but for its first token.
        virtual: makes the prompt instead, with virtual tokens in it.
        too_long: "truncate" cuts the prompt's beginning and keeps the answer; an answer that is too long by itself
            loses its end. "split" makes several examples of a plain text.
        end: append the end of text to the answer, so that the model learns to stop.
    """

    name: ClassVar[str] = "causal-lm"
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    task_type: ClassVar[str | None] = "CAUSAL_LM"

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: TextTemplate,
        virtual: VirtualPrompt | None = None,
        max_length: int = 512,
        too_long: str = "error",
        end: bool = True,
    ) -> None:
        template.check_answer(self.name)
        self.template, self.virtual = template, virtual
        self.splits = too_long == "split"
        if self.splits and (template.prompt or virtual is not None):
            raise ConfigError("too_long='split' is for plain text; a row with a prompt cannot be split")
        super().__init__(tokenizer, max_length=max_length, too_long=TOO_LONG[0] if self.splits else too_long)
        self.start, self.finish = frame(tokenizer)
        self.end = [end_id(tokenizer)] if end else []
        self._padding = pad_id(tokenizer)

    @property
    def padding(self) -> int:
        return self._padding

    def prepare(self, rows: Sequence[Row], bad: BadRows, *, training: bool = True) -> list[Example]:
        examples: list[Example] = []
        for row, filled in self.template.fill(rows, bad, virtual=self.virtual):
            examples += self._examples(row, filled, bad)
        return self._left(examples, bad)

    def _examples(self, row: Row, filled: Filled, bad: BadRows) -> Iterator[Example]:
        if self.virtual is not None:
            # after a virtual token the answer is a word within a text, so it has its space
            answer = [*ids_of(self.tokenizer, f" {filled.answer.strip()}"), *self.end]
            given = self._virtual(self.virtual, row, self.max_length - len(answer), bad)
            if given is None:
                return
            prompt = given[: -len(self.finish)] if self.finish and given[-len(self.finish) :] == self.finish else given
        else:
            text, answer_text = words_together(filled.prompt, filled.answer)
            prompt, answer = [*self.start, *ids_of(self.tokenizer, text)], ids_of(self.tokenizer, answer_text)
            answer += self.end
            if self.splits and len(prompt) + len(answer) > self.max_length:
                yield from self._pieces([*prompt, *answer], filled, row, bad)
                return
            if not self._fits(len(prompt) + len(answer), row, bad):
                if self.too_long != "truncate":
                    return
                prompt, answer = self._cut(prompt, answer)
        labels = [*[IGNORED] * len(prompt), *answer]
        labels[0] = IGNORED  # nothing stands before the first token that could predict it
        counted = sum(label != IGNORED for label in labels)
        if not counted:
            bad.report(row.source, "is a single token, which nothing can be learned from", "write more")
            return
        yield Example({"input_ids": [*prompt, *answer]}, labels, filled.answer.strip(), counted, row.source)

    def _cut(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """A row of `max_length`: from the prompt's beginning, its start token kept, then from the answer's end."""
        text = prompt[len(self.start) :]
        room = self.max_length - len(self.start) - len(answer)
        prompt = [*self.start, *(text[-room:] if room > 0 else [])]
        return prompt, answer[: self.max_length - len(prompt)]

    def _pieces(self, ids: list[int], filled: Filled, row: Row, bad: BadRows) -> Iterator[Example]:
        """Pieces of `max_length`, each beginning with the last token of the one before, so that every token but the
        first is predicted once."""
        bad.change(row.source, f"split into pieces of {self.max_length:,} tokens")
        for place in range(0, len(ids) - 1, self.max_length - 1):
            piece = ids[place : place + self.max_length]
            labels = [IGNORED, *piece[1:]]
            yield Example({"input_ids": piece}, labels, filled.answer.strip(), len(piece) - 1, row.source)

    def prompt_ids(self, example: Example) -> list[int]:
        """Up to the first token that counts; of a plain text its first token."""
        first = next(place for place, label in enumerate(example.labels) if label != IGNORED)
        return list(example.inputs["input_ids"][:first])

    def collate(self, examples: Sequence[Example], *, multiple: int = 1) -> Batch:
        """input_ids, attention_mask, labels (rows, length); positions, targets (counted,)."""
        batch = model_inputs([dict(one.inputs) for one in examples], self.tokenizer, multiple=multiple)
        batch["labels"] = padded([one.labels for one in examples], IGNORED, multiple=multiple)
        batch["positions"], batch["targets"] = targets_of(batch["labels"], shift=1)
        return batch

    def _prompts(self, examples: Sequence[Example]) -> Batch:
        return model_inputs([{"input_ids": self.prompt_ids(one)} for one in examples], self.tokenizer, left=True)
