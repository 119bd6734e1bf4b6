"""The cloze: one token at the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lora_diffusion as ld
from lora_diffusion.methods.prompt_template import PromptTemplate
from tests.train.text_models import model, tokenizer
from train.text_bad_rows import BadRows
from train.text_data import evaluate
from train.text_rows import Row
from train.text_tasks.masked_lm import MaskedLM
from train.text_template import TextTemplate, VirtualPrompt

FAMILIES = ("bert", "roberta", "deberta")
LIVES = TextTemplate("{x} lives in {mask} .", "{y}")


def rows(*pairs: tuple[str, str]) -> list[Row]:
    return [Row({"x": x, "y": y}, f"a.jsonl, line {n}") for n, (x, y) in enumerate(pairs, start=1)]


ROWS = rows(("Anna", "Paris"), ("The dog of Tom", "Rome"), ("Tom", "Paris"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_the_token_that_the_text_has_there(family: str) -> None:
    """The row is the whole sentence's tokens with the answer's one masked, in every tokenizer's way with spaces."""
    made, task = tokenizer(family), MaskedLM(tokenizer(family), template=LIVES)
    for row, example in zip(ROWS, task.prepare(ROWS, BadRows())):
        whole = made(f"{row['x']} lives in {row['y']} .").input_ids
        ids = example.inputs["input_ids"]
        assert [example.labels if token == made.mask_token_id else token for token in ids] == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_transformers(family: str) -> None:
    task, made = MaskedLM(tokenizer(family), template=LIVES), model(family, "ForMaskedLM")
    batch = task.collate(task.prepare(ROWS, BadRows()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(task.loss(made, batch), made(**inputs).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_p_at_1(family: str) -> None:
    task, made = MaskedLM(tokenizer(family), template=LIVES), model(family, "ForMaskedLM")
    examples = task.prepare(ROWS, BadRows())
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(25):
        task.loss(made, task.collate(examples)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = evaluate(made, task, examples, batch_size=2)
    assert found["p@1"] == 1.0
    assert found["loss"] == pytest.approx(float(task.loss(made, task.collate(examples)).detach()), rel=1e-4)
    two = rows(("Anna", "Oslo"), ("Tom", "Oslo"))
    allowed = MaskedLM(tokenizer(family), template=LIVES, allowed=["Oslo"])
    assert evaluate(made, allowed, allowed.prepare(two, BadRows()))["p@1"] == 1.0
    assert evaluate(made, task, task.prepare(two, BadRows()))["p@1"] == 0.0


def test_labels_in_words() -> None:
    template = TextTemplate("{p} ? {mask} , {h}", "{label}")
    task = MaskedLM(tokenizer("bert"), template=template, words={"entailment": "yes", "not_entailment": "no"})
    values = {"p": "The sky is blue", "h": "It is green", "label": "not_entailment"}
    example = task.prepare([Row(values, "a.jsonl, line 1")], BadRows())[0]
    assert task.preview(example) == "[CLS] the sky is blue?«[MASK]», it is green [SEP] → «no»"
    assert task.allowed is not None and len(task.allowed) == 2
    with pytest.raises(ld.DatasetError, match=r"a label without a word \('neutral'\); the labels are 'entail"):
        task.prepare([Row({**values, "label": "neutral"}, "a.jsonl, line 1")], BadRows())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("Anna", "Neu Delhi"), "an answer that is not one token ('Neu Delhi' is"),
        (("Anna [MASK]", "Paris"), "does not have one mask (2 masks)"),
        (("Anna " * 80, "Paris"), "is longer than 32 tokens (8"),
        (("Anna", "\u732b"), "an answer that is not one token"),
    ],
)
def test_bad_rows(values: tuple[str, str], words: str) -> None:
    task = MaskedLM(tokenizer("bert"), template=LIVES, max_length=32)
    with pytest.raises(ld.DatasetError) as caught:
        task.prepare(rows(("Tom", "Rome"), values), BadRows())
    assert "a.jsonl, line 2: the row" in str(caught.value) and words in str(caught.value)
    bad = BadRows("skip")
    assert len(task.prepare(rows(("Tom", "Rome"), values), bad)) == 1 and bad.total == 1


def test_an_answer_that_is_not_allowed() -> None:
    task = MaskedLM(tokenizer("bert"), template=LIVES, allowed=["Rome", "Oslo"])
    with pytest.raises(ld.DatasetError, match=r"an answer that is not allowed \('Paris'\)"):
        task.prepare(ROWS, BadRows())


def test_cutting_keeps_the_mask() -> None:
    task, bad = MaskedLM(tokenizer("bert"), template=LIVES, max_length=8, too_long="truncate"), BadRows()
    example = task.prepare(rows(("Tom " * 20 + "Anna", "Rome")), bad)[0]
    assert example.length == 8 and task.preview(example) == "[CLS] tom anna lives in«[MASK]». [SEP] → «rome»"
    assert "cut to 8 tokens" in bad.summary()[0]


def test_bad_settings() -> None:
    bert = tokenizer("bert")
    for text in ("{x} lives in", "{mask} {x} {mask}"):
        with pytest.raises(ld.ConfigError, match=r"needs one \{mask\}"):
            MaskedLM(bert, template=TextTemplate(text, "{y}"))
    with pytest.raises(ld.ConfigError, match="no mask token"):
        MaskedLM(tokenizer("gpt2"), template=LIVES)
    with pytest.raises(ld.ConfigError, match="'Neu Delhi' is not one token"):
        MaskedLM(bert, template=LIVES, allowed=["Neu Delhi"])
    with pytest.raises(ld.ConfigError, match="a word of its own"):
        MaskedLM(bert, template=LIVES, words={"a": "yes", "b": "yes"})
    with pytest.raises(ld.ConfigError, match="not both"):
        MaskedLM(bert, template=LIVES, words={"a": "yes", "b": "no"}, allowed=["yes"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", ["{P} {mask} {P:2} {x} .", (1, 2, 0)])
def test_virtual_tokens_around_the_mask(family: str, template: Any) -> None:
    made = tokenizer(family)
    size = len(made)
    virtual = VirtualPrompt(PromptTemplate.parse(template), [size, size + 1, size + 2])
    task = MaskedLM(made, template=TextTemplate(answer="{y}"), virtual=virtual)
    example = task.prepare(ROWS, BadRows())[0]
    ids = example.inputs["input_ids"]
    assert ids[1:5] == [size, made.mask_token_id, size + 1, size + 2]
    assert example.labels == made(" Paris", add_special_tokens=False).input_ids[0]
    assert task.collate([example])["positions"].tolist() == [2]
    assert (
        task.preview(example)
        .lower()
        .replace(" ", "")
        .startswith(f"{made.cls_token}[v0]«{made.mask_token}»[v1][v2]".lower())
    )
