"""Sequence-to-sequence language models: the encoder reads the prompt, the decoder says the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from train.text_bad_rows import BadRows
from train.text_rows import Row
from train.text_tasks.language_model import LanguageModel, targets_of
from train.text_tasks.task import IGNORED, Batch, Example, shown
from train.text_tasks.tokens import end_id, frame, ids_of, model_inputs, pad_id, padded
from train.text_template import Filled, TextTemplate, VirtualPrompt


class Seq2SeqLM(LanguageModel):
    """T5, mT5.

    Args:
        template: prompt and answer.
        virtual: makes the prompt instead, with virtual tokens in it.
        max_length, max_answer_length: in tokens, of the encoder's row and of the decoder's; "truncate" cuts the end of
            either.
        decoder_start: what the decoder begins with; None: the padding, as T5 does.
    """

    name: ClassVar[str] = "seq2seq-lm"
    model_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    task_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: TextTemplate,
        virtual: VirtualPrompt | None = None,
        max_length: int = 512,
        max_answer_length: int | None = None,
        too_long: str = "error",
        decoder_start: int | None = None,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length, too_long=too_long)
        template.check_answer(self.name)
        self.template, self.virtual = template, virtual
        self.max_answer_length = max_answer_length or max_length
        self.start, self.finish = frame(tokenizer)
        self.end = end_id(tokenizer)
        self._padding = pad_id(tokenizer)
        self.decoder_start = self._padding if decoder_start is None else decoder_start

    @property
    def padding(self) -> int:
        return self._padding

    def prepare(self, rows: Sequence[Row], bad: BadRows, *, training: bool = True) -> list[Example]:
        examples = []
        for row, filled in self.template.fill(rows, bad, virtual=self.virtual):
            answer = [*ids_of(self.tokenizer, filled.answer), self.end]
            prompt = self._prompt(row, filled, bad)
            if prompt is None:
                continue
            if not self._fits(len(answer), row, bad, most=self.max_answer_length, what="an answer"):
                if self.too_long != "truncate":
                    continue
                answer = answer[: self.max_answer_length]
            examples.append(Example({"input_ids": prompt}, answer, filled.answer.strip(), len(answer), row.source))
        return self._left(examples, bad)

    def _prompt(self, row: Row, filled: Filled, bad: BadRows) -> list[int] | None:
        if self.virtual is not None:
            return self._virtual(self.virtual, row, self.max_length, bad)
        prompt = [*self.start, *ids_of(self.tokenizer, filled.prompt), *self.finish]
        if self._fits(len(prompt), row, bad):
            return prompt
        cut = [*prompt[: self.max_length - len(self.finish)], *self.finish]
        return cut if self.too_long == "truncate" else None

    def prompt_ids(self, example: Example) -> list[int]:
        return list(example.inputs["input_ids"])

    def collate(self, examples: Sequence[Example], *, multiple: int = 1) -> Batch:
        """input_ids, attention_mask (rows, length); decoder_input_ids, labels (rows, answer); positions, targets."""
        batch = model_inputs([dict(one.inputs) for one in examples], self.tokenizer, multiple=multiple)
        shifted = [[self.decoder_start, *one.labels[:-1]] for one in examples]
        batch["decoder_input_ids"] = padded(shifted, self._padding, multiple=multiple)
        batch["labels"] = padded([one.labels for one in examples], IGNORED, multiple=multiple)
        batch["positions"], batch["targets"] = targets_of(batch["labels"], shift=0)
        return batch

    def preview(self, example: Example) -> str:
        """The encoder's row and, after an arrow, what the decoder has to say."""
        given = shown(self.tokenizer, example.inputs["input_ids"], set())
        return f"{given} → {shown(self.tokenizer, example.labels, set(range(len(example.labels))))}"

    def _prompts(self, examples: Sequence[Example]) -> Batch:
        return model_inputs([dict(one.inputs) for one in examples], self.tokenizer)
