"""Labels of texts, of pairs, of words; numbers; in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lora_diffusion as ld
from tests.train.text_models import FAMILIES, model, tokenizer
from train.text_bad_rows import BadRows
from train.text_data import evaluate
from train.text_rows import Row
from train.text_tasks.sequence_classification import SequenceClassification
from train.text_tasks.task import IGNORED
from train.text_tasks.token_classification import TokenClassification
from train.text_template import TextTemplate

PAIR = TextTemplate("{p}", "{label}", second="{h}")


def rows(*triples: tuple[str, str, Any]) -> list[Row]:
    return [
        Row({"p": p, "h": h, "label": label}, f"a.jsonl, line {n}") for n, (p, h, label) in enumerate(triples, start=1)
    ]


ROWS = rows(
    ("The sky is blue", "The sky is green", "contradiction"),
    ("Anna lives in Paris . Tom lives in Rome .", "Anna lives in Paris", "entailment"),
    ("Tom", "Anna", "contradiction"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs(family: str) -> None:
    """Loss as transformers computes it, one by one: so padding, and where a decoder's head reads, are right."""
    task = SequenceClassification(tokenizer(family), template=PAIR)
    examples = task.prepare(ROWS, BadRows())
    settings = task.model_settings()
    assert settings["id2label"] == {0: "contradiction", 1: "entailment"} and settings["num_labels"] == 2
    made = model(family, "ForSequenceClassification", **settings)
    made.config.pad_token_id = settings["pad_token_id"]
    with torch.no_grad():
        alone = [made(**_alone(one), labels=torch.tensor([one.labels])).loss for one in examples]
        torch.testing.assert_close(task.loss(made, task.collate(examples)), torch.stack(alone).mean())
    found = evaluate(made, task, examples, batch_size=2)
    assert found["loss"] == pytest.approx(float(torch.stack(alone).mean()), rel=1e-4)
    assert set(found) == {"loss", "accuracy", "f1", "f1_macro", "matthews"}
    text = task.preview(examples[0])
    assert text.endswith(" → «contradiction»") and "blue" in text.lower() and "green" in text.lower()


def _alone(example: Any) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([ids]) for name, ids in example.inputs.items()}


def test_bert_sees_two_segments_and_gpt2_a_new_line() -> None:
    bert = SequenceClassification(tokenizer("bert"), template=PAIR).prepare(ROWS, BadRows())[2]
    assert bert.inputs["token_type_ids"] == [0, 0, 0, 1, 1]
    gpt2 = SequenceClassification(tokenizer("gpt2"), template=PAIR)
    assert gpt2.preview(gpt2.prepare(ROWS, BadRows())[2]) == "Tom⏎Anna → «contradiction»"


def test_single_texts_and_whole_numbers_as_labels() -> None:
    data = rows(("blue", "", 10), ("green", "", 9), ("red", "", 10))
    task = SequenceClassification(tokenizer("bert"), template=TextTemplate("{p}", "{label}"))
    assert [one.labels for one in task.prepare(data, BadRows())] == [1, 0, 1]
    assert task.labels is not None and task.labels.names == ["9", "10"]


@pytest.mark.parametrize("family", ["roberta", "gpt2"])
def test_regression(family: str) -> None:
    data = rows(("The sky is blue", "The sky is green", 1.5), ("Tom", "Tom", "5"), ("Tom", "Anna", 0))
    task = SequenceClassification(tokenizer(family), template=PAIR, regression=True)
    examples = task.prepare(data, BadRows())
    settings = task.model_settings()
    made = model(family, "ForSequenceClassification", **settings)
    made.config.pad_token_id = settings["pad_token_id"]
    batch = task.collate(examples)
    torch.testing.assert_close(task.loss(made, batch), made(**batch).loss)
    assert set(evaluate(made, task, examples)) == {"loss", "pearson", "spearman"} and task.best_by == "pearson"
    assert task.metrics([[1.0], [9.0], [0.5]], [1.5, 5.0, 0.0])["spearman"] == pytest.approx(1.0)
    with pytest.raises(ld.DatasetError, match=r"line 1: the row has no number to predict \('high'\)"):
        task.prepare(rows(("a", "b", "high")), BadRows())


def test_a_label_never_seen() -> None:
    task = SequenceClassification(tokenizer("bert"), template=PAIR)
    with pytest.raises(ld.ConfigError, match="prepare the rows to train on first"):
        task.prepare(ROWS, BadRows(), training=False)
    task.prepare(ROWS, BadRows())
    new = rows(("a", "b", "entailmnt"), ("a", "b", "entailment"))
    with pytest.raises(ld.DatasetError) as caught:
        task.prepare(new, BadRows(), training=False)
    assert str(caught.value) == (
        "a.jsonl, line 1: the row has a label never seen in training ('entailmnt'); the labels are 'contradiction', "
        "'entailment' (did it mean 'entailment'?), or skip bad rows"
    )
    bad = BadRows("skip")
    assert len(task.prepare(new, bad, training=False)) == 1
    assert bad.summary() == ["1 row skipped: has a label never seen in training (a.jsonl, line 1)"]


def test_one_label_is_no_classification() -> None:
    with pytest.raises(ld.ConfigError, match=r"1 labels \('x'\): a classification needs from 2"):
        SequenceClassification(tokenizer("bert"), template=PAIR).prepare(rows(("a", "b", "x")), BadRows())


@pytest.mark.parametrize("family", FAMILIES)
def test_long_texts(family: str) -> None:
    data = rows(("Anna lives " * 20, "Tom " * 5, "x"), ("a", "b", "y"))
    with pytest.raises(ld.DatasetError, match=r"line 1: the row is longer than 16 tokens"):
        SequenceClassification(tokenizer(family), template=PAIR, max_length=16).prepare(data, BadRows())
    task, bad = SequenceClassification(tokenizer(family), template=PAIR, max_length=16, too_long="truncate"), BadRows()
    assert task.prepare(data, bad)[0].length == 16 and "cut to 16 tokens" in bad.summary()[0]


def test_bad_settings() -> None:
    bert = tokenizer("bert")
    for template in (TextTemplate("", "{label}"), TextTemplate("{p} {mask}", "{label}")):
        with pytest.raises(ld.ConfigError, match="needs a template of the text"):
            SequenceClassification(bert, template=template)
    with pytest.raises(ld.ConfigError, match="positive='z' is no label"):
        SequenceClassification(bert, template=PAIR, positive="z").prepare(ROWS, BadRows())
    with pytest.raises(ld.ConfigError, match="leave labels and positive out"):
        SequenceClassification(bert, template=PAIR, regression=True, labels=["a", "b"])


class TestWords:
    """Token classification."""

    ROWS: Any = (
        Row({"tokens": ["Anna", "lives", "in", "Oslo-Paris", "."], "tags": "B-PER O O B-LOC O"}, "a, line 1"),
        Row({"tokens": "Tom sleeps", "tags": "B-PER O"}, "a, line 2"),
    )  # fmt: skip

    @pytest.mark.parametrize("family", FAMILIES)
    def test_tags_stand_at_the_first_token_of_their_word(self, family: str) -> None:
        task = TokenClassification(tokenizer(family))
        for row, example in zip(self.ROWS, task.prepare(self.ROWS, BadRows())):
            words = row["tokens"].split() if isinstance(row["tokens"], str) else row["tokens"]
            ids, labels = example.inputs["input_ids"], example.labels
            assert ids == tokenizer(family)(" ".join(words)).input_ids
            places = [place for place, label in enumerate(labels) if label != IGNORED]
            assert task.labels is not None
            assert [task.labels.names[labels[place]] for place in places] == example.reference
            pieces = [ids[a:b] for a, b in zip(places, [*places[1:], len(ids) - len(task.finish)])]
            said = [tokenizer(family).decode(piece).replace(" ", "").lower() for piece in pieces]
            assert said == [word.lower() for word in words]

    @pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "gpt2", "llama", "t5"])
    def test_loss_and_figures(self, family: str) -> None:
        task = TokenClassification(tokenizer(family))
        examples = task.prepare(self.ROWS, BadRows())
        made = model(family, "ForTokenClassification", **task.model_settings())
        batch = task.collate(examples)
        torch.testing.assert_close(task.loss(made, batch), made(**batch).loss, rtol=1e-5, atol=1e-5)
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
        for _ in range(80):
            task.loss(made, task.collate(examples)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert evaluate(made, task, examples) == {"accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0}
        assert task.best_by == "f1"

    def test_parts_of_speech_have_no_entities(self) -> None:
        data = [Row({"tokens": ["a", "b"], "tags": ["DET", "NOUN"]}, "a, line 1")]
        task = TokenClassification(tokenizer("bert"))
        task.prepare(data, BadRows())
        assert set(task.metrics([["DET", "DET"]], [["DET", "NOUN"]])) == {"accuracy", "f1_macro"}
        assert task.best_by == "accuracy"
        assert task.preview(task.prepare(data, BadRows())[0]) == "[CLS] «a»/DET «b»/NOUN[SEP]"

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"tokens": ["a"], "tags": ["O", "O"]}, "another number of tags than of words (1 words, 2 tags)"),
            ({"tokens": [], "tags": []}, "has no list of words in 'tokens'"),
            ({"tokens": ["a", " "], "tags": ["O", "O"]}, "has no list of words in 'tokens'"),
            ({"tokens": ["a"], "tags": ["B-XYZ"]}, "a label never seen in training ('B-XYZ')"),
            ({"tokens": ["a", "\u200d"], "tags": ["O", "O"]}, "a word without tokens"),
            ({"tokens": ["Tom"] * 40, "tags": ["O"] * 40}, "is longer than 24 tokens (42)"),
        ],
    )
    def test_bad_rows(self, values: dict[str, Any], words: str) -> None:
        task = TokenClassification(tokenizer("bert"), max_length=24)
        task.prepare(self.ROWS, BadRows())
        with pytest.raises(ld.DatasetError) as caught:
            task.prepare([Row(values, "a, line 1")], BadRows())
        assert "a, line 1: the row " in str(caught.value) and words in str(caught.value)

    def test_cutting_leaves_whole_words(self) -> None:
        task, bad = TokenClassification(tokenizer("bert"), max_length=6, too_long="truncate"), BadRows()
        first = task.prepare(self.ROWS, bad)[0]
        assert first.reference == ["B-PER", "O", "O"] and first.length == 5
        assert bad.summary() == ["1 row cut to 6 tokens (a, line 1)"]
