"""Causal and sequence-to-sequence language models: what counts, what is padded, what is said of long rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import lora_diffusion as ld
from lora_diffusion.methods.prompt_template import PromptTemplate
from tests.train.text_models import model, tokenizer
from train.text_bad_rows import BadRows
from train.text_data import evaluate
from train.text_rows import Row
from train.text_tasks.causal_lm import CausalLM
from train.text_tasks.seq2seq_lm import Seq2SeqLM
from train.text_tasks.task import IGNORED
from train.text_template import PLAIN, TextTemplate, VirtualPrompt

QA = TextTemplate("{question}\nAnswer: ", "{answer}")
CAUSAL = ("gpt2", "llama")
TASKS: dict[str, Any] = {"gpt2": CausalLM, "llama": CausalLM, "t5": Seq2SeqLM}
CLASSES = {"gpt2": "ForCausalLM", "llama": "ForCausalLM", "t5": "ForConditionalGeneration"}


def rows(*pairs: tuple[str, str]) -> list[Row]:
    return [Row({"question": q, "answer": a}, f"a.jsonl, line {n}") for n, (q, a) in enumerate(pairs, start=1)]


ROWS = rows(("What colour is the sky ?", "blue"), ("Where does Anna live ?", "in Paris ."), ("Tom ?", "Rome"))


@pytest.mark.parametrize("family", CAUSAL)
def test_only_the_answer_counts(family: str) -> None:
    task = CausalLM(tokenizer(family), template=QA)
    example = task.prepare(ROWS, BadRows())[0]
    ids, labels = example.inputs["input_ids"], example.labels
    counted = [token for token, label in zip(ids, labels) if label != IGNORED]
    assert counted == [label for label in labels if label != IGNORED] and example.counted == len(counted)
    words = tokenizer(family).convert_ids_to_tokens(counted)
    assert words == ({"gpt2": ["Ġblue", "<|endoftext|>"], "llama": ["▁blue", "</s>"]}[family])
    assert ids[: len(task.start)] == task.start == {"gpt2": [], "llama": [1]}[family]
    assert example.reference == "blue"


@pytest.mark.parametrize("family", TASKS)
def test_the_loss_is_that_of_transformers_over_the_same_labels(family: str) -> None:
    task = TASKS[family](tokenizer(family), template=QA)
    made = model(family, CLASSES[family])
    batch = task.collate(task.prepare(ROWS, BadRows()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(task.loss(made, batch), made(**inputs).loss, rtol=1e-5, atol=1e-5)
    assert batch["targets"].shape == (sum(one.counted for one in task.prepare(ROWS, BadRows())),)


@pytest.mark.parametrize("family", TASKS)
def test_padding_changes_nothing(family: str) -> None:
    """The mean over a padded batch is that over its rows alone, each weighing what it counts."""
    task, made = TASKS[family](tokenizer(family), template=QA), model(family, CLASSES[family])
    examples = task.prepare(ROWS, BadRows())
    alone = sum(float(task.loss(made, task.collate([one])).detach()) * one.counted for one in examples)
    together = task.loss(made, task.collate(examples, multiple=16))
    assert float(together.detach()) == pytest.approx(alone / sum(one.counted for one in examples), rel=1e-5)
    assert task.collate(examples, multiple=16)["input_ids"].shape[1] % 16 == 0


@pytest.mark.parametrize("family", TASKS)
def test_figures(family: str) -> None:
    task, made = TASKS[family](tokenizer(family), template=QA), model(family, CLASSES[family])
    examples = task.prepare(ROWS, BadRows())
    made.train()
    found = evaluate(made, task, examples, batch_size=2)
    assert made.training
    made.eval()
    assert found["loss"] == pytest.approx(float(task.loss(made, task.collate(examples)).detach()), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    logits = made(
        **{k: v for k, v in task.collate(examples).items() if k not in ("positions", "targets", "labels")}
    ).logits
    batch = task.collate(examples)
    hits = (logits.flatten(0, 1)[batch["positions"]].argmax(-1) == batch["targets"]).float().mean()
    assert found["accuracy"] == pytest.approx(float(hits))


@pytest.mark.parametrize("family", TASKS)
def test_it_generates_what_greedy_decoding_gives(family: str) -> None:
    task, made = TASKS[family](tokenizer(family), template=QA), model(family, CLASSES[family])
    examples = task.prepare(ROWS, BadRows())
    texts = task.generate(made, examples, max_new_tokens=5)
    for example, text in zip(examples, texts):
        ids = torch.tensor([task.prompt_ids(example)])
        new: list[int] = []
        for _ in range(5):
            if family == "t5":
                logits = made(input_ids=ids, decoder_input_ids=torch.tensor([[0, *new]])).logits
            else:
                logits = made(torch.cat([ids, torch.tensor([new], dtype=torch.long)], dim=1)).logits
            new.append(int(logits[0, -1].argmax()))
            if new[-1] == task.tokenizer.eos_token_id:
                break
        assert text == task.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_it_learns_to_answer() -> None:
    """End to end: a few steps on three rows, and greedy decoding says the answers."""
    task, made = CausalLM(tokenizer("gpt2"), template=QA), model("gpt2", "ForCausalLM")
    examples = task.prepare(ROWS, BadRows())
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(40):
        task.loss(made, task.collate(examples)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert task.generate(made, examples, max_new_tokens=8) == [row["answer"] for row in ROWS]
    assert evaluate(made, task, examples)["exact"] == 1.0


@pytest.mark.parametrize("family", CAUSAL)
def test_plain_text_counts_all_but_its_first_token(family: str) -> None:
    task = CausalLM(tokenizer(family), template=PLAIN)
    example = task.prepare([Row({"text": "Anna lives in Paris ."}, "a.txt, line 1")], BadRows())[0]
    assert example.labels[0] == IGNORED and IGNORED not in example.labels[1:]
    assert example.counted == example.length - 1


class TestLongRows:
    LONG = rows(("What colour is the sky ?", "blue"), ("Where ? " * 20, "Paris"), ("Who ?", "Tom " * 40))

    @pytest.mark.parametrize("family", TASKS)
    def test_an_error_by_default(self, family: str) -> None:
        task = TASKS[family](tokenizer(family), template=QA, max_length=24)
        with pytest.raises(ld.DatasetError, match=r"line 2: the row is longer than 24 tokens .*truncate"):
            task.prepare(self.LONG, BadRows())

    @pytest.mark.parametrize("family", TASKS)
    def test_skipped(self, family: str) -> None:
        task, bad = TASKS[family](tokenizer(family), template=QA, max_length=24, too_long="skip"), BadRows()
        assert len(task.prepare(self.LONG, bad)) == 1
        said = bad.summary()
        assert bad.total == 2 and said[0].startswith(
            ("2 rows skipped: is longer than", "1 row skipped: is longer than")
        )
        assert (family == "t5") == (len(said) == 2) == ("an answer longer than 24 tokens" in said[-1])

    @pytest.mark.parametrize("family", CAUSAL)
    def test_cut_at_the_beginning_of_the_prompt(self, family: str) -> None:
        task, bad = CausalLM(tokenizer(family), template=QA, max_length=24, too_long="truncate"), BadRows()
        _, prompt, answer = task.prepare(self.LONG, bad)
        assert prompt.length == answer.length == 24
        assert task.preview(prompt).endswith(" Paris<|endoftext|>»" if family == "gpt2" else "Paris</s>»")
        assert prompt.inputs["input_ids"][: len(task.start)] == task.start
        assert task.preview(answer).endswith("Tom Tom»")
        assert bad.summary() == ["2 rows cut to 24 tokens (the first is a.jsonl, line 2)"] and bad.total == 0

    def test_t5_keeps_its_end_token(self) -> None:
        task = Seq2SeqLM(tokenizer("t5"), template=QA, max_length=24, too_long="truncate")
        _, prompt, answer = task.prepare(self.LONG, BadRows())
        assert prompt.length == 24 and prompt.inputs["input_ids"][-1] == 1 and len(answer.labels) == 24

    def test_plain_text_is_split(self) -> None:
        task, bad = CausalLM(tokenizer("gpt2"), template=PLAIN, max_length=8, too_long="split"), BadRows()
        pieces = task.prepare([Row({"text": "Anna lives in Paris . " * 5}, "a.txt, line 1")], bad)
        whole = [*tokenizer("gpt2")("Anna lives in Paris . " * 5).input_ids, 0]
        assert [label for piece in pieces for label in piece.labels if label != IGNORED] == whole[1:]
        assert all(piece.length <= 8 for piece in pieces) and "split into pieces of 8" in bad.summary()[0]
        with pytest.raises(ld.ConfigError, match="for plain text"):
            CausalLM(tokenizer("gpt2"), template=QA, too_long="split")


class TestPreview:
    def test_what_counts_is_marked(self) -> None:
        example = CausalLM(tokenizer("gpt2"), template=QA).prepare(ROWS, BadRows())[0]
        task = CausalLM(tokenizer("gpt2"), template=QA)
        assert task.preview(example) == "What colour is the sky ?⏎Answer:« blue<|endoftext|>»"
        t5 = Seq2SeqLM(tokenizer("t5"), template=QA)
        assert t5.preview(t5.prepare(ROWS, BadRows())[2]) == "Tom ? Answer:</s> → «Rome</s>»"

    def test_control_characters_do_not_reach_the_terminal(self) -> None:
        task = CausalLM(tokenizer("gpt2"), template=QA)
        assert "\x1b" not in task.preview(task.prepare(rows(("\x1b[31m red", "x")), BadRows())[0])


class TestVirtualTokens:
    """With the template that P-tuning has."""

    def task(self, family: str, template: Any = "{P:2} {question} {P}", extra: int = 0, **options: Any) -> Any:
        size = len(tokenizer(family)) + extra
        virtual = VirtualPrompt(PromptTemplate.parse(template), list(range(size, size + 3)))
        return TASKS[family](tokenizer(family), template=TextTemplate(answer="{answer}"), virtual=virtual, **options)

    @pytest.mark.parametrize("family", TASKS)
    def test_they_stand_in_the_row_and_count_nothing(self, family: str) -> None:
        size, task = len(tokenizer(family)), self.task(family)
        example = task.prepare(ROWS, BadRows())[0]
        ids = example.inputs["input_ids"]
        assert [token - size for token in ids if token >= size] == [0, 1, 2]
        batch = task.collate([example])
        assert int(batch["targets"].max()) < size and not [label for label in example.labels if label >= size]
        shown = task.preview(example)
        assert "[V0][V1]" in shown and shown.index("sky") < shown.index("[V2]")

    def test_the_answer_follows_the_last_of_them_as_a_word(self) -> None:
        task = self.task("gpt2")
        assert task.preview(task.prepare(ROWS, BadRows())[0]) == (
            "[V0][V1] What colour is the sky ?[V2]« blue<|endoftext|>»"
        )
        larger = self.task("gpt2", extra=28)
        assert larger.preview(larger.prepare(ROWS, BadRows())[0]).startswith("[V0][V1] What")
        llama = self.task("llama")
        assert "[V2]«blue</s>»" in llama.preview(llama.prepare(ROWS, BadRows())[0])

    @pytest.mark.parametrize("family", TASKS)
    def test_long_rows_are_never_cut_in_silence(self, family: str) -> None:
        long = rows(("Where ? " * 30, "Paris"))
        with pytest.raises(ld.DatasetError, match=r"line 1: the row is longer than 20 tokens"):
            self.task(family, max_length=20).prepare(long, BadRows())
        task, bad = self.task(family, max_length=20, too_long="truncate"), BadRows()
        example = task.prepare(long, bad)[0]
        assert example.length <= 20 and bad.summary() == ["1 row cut to 20 tokens (a.jsonl, line 1)"]
        assert "[V2]" in task.preview(example) and "Paris" in task.preview(example)
        with pytest.raises(ld.DatasetError, match="line 1: the row cannot be cut to fit"):
            self.task(family, template="{P:3} " + "anchor " * 40 + "{question}", max_length=20,
                      too_long="truncate").prepare(long, BadRows())  # fmt: skip

    def test_columns_are_checked(self) -> None:
        with pytest.raises(ld.ConfigError, match=r"no column 'questoin' in a\.jsonl; there are 'question'"):
            self.task("gpt2", "{P:3} {questoin}").prepare(ROWS, BadRows())
        with pytest.raises(ld.DatasetError, match=r"line 2: the row has nothing in 'question'"):
            self.task("gpt2").prepare(rows(("Who ?", "Tom"), (" ", "Tom")), BadRows())


class TestBadSettings:
    def test_without_an_answer(self) -> None:
        for family in TASKS:
            with pytest.raises(ld.ConfigError, match="is without the answer"):
                TASKS[family](tokenizer(family), template=TextTemplate("{question}"))

    def test_values(self) -> None:
        with pytest.raises(ld.ConfigError, match="max_length=1"):
            CausalLM(tokenizer("gpt2"), template=QA, max_length=1)
        with pytest.raises(ld.ConfigError, match="too_long='drop'"):
            CausalLM(tokenizer("gpt2"), template=QA, too_long="drop")
        with pytest.raises(ld.ConfigError, match="no end of text"):
            CausalLM(tokenizer("bert"), template=QA)
        with pytest.raises(ld.ConfigError, match="no fast tokenizer"):
            CausalLM(object(), template=QA)

    def test_no_row_is_left(self) -> None:
        task = CausalLM(tokenizer("gpt2"), template=QA)
        with pytest.raises(ld.DatasetError, match="no row can be used: 1 row skipped: has nothing in 'answer'"):
            task.prepare(rows(("Who ?", "")), BadRows("skip"))
