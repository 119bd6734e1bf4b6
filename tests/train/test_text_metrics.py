"""Figures, beside those of scipy, scikit-learn, SQuAD's script and values worked out by hand."""

from __future__ import annotations

import math
import random
import sys

import pytest

import lora_diffusion as ld
from train import text_metrics as m
from train.text_entities import entities, entity_scores

draws = random.Random(0)
TRUE = [draws.randrange(3) for _ in range(60)]
SAID = [one if draws.random() < 0.6 else draws.randrange(3) for one in TRUE]
VALUES = [draws.randrange(8) + draws.random() * (draws.random() < 0.5) for _ in range(60)]
OTHERS = [value + draws.gauss(0, 2) for value in VALUES]


def test_classes_as_in_scikit_learn() -> None:
    reference = pytest.importorskip("sklearn.metrics")
    two, said = [one == 1 for one in TRUE], [one == 1 for one in SAID]
    assert m.accuracy(SAID, TRUE) == pytest.approx(reference.accuracy_score(TRUE, SAID))
    assert m.f1_binary(SAID, TRUE, 1) == pytest.approx(reference.f1_score(two, said))
    assert m.f1_macro(SAID, TRUE) == pytest.approx(reference.f1_score(TRUE, SAID, average="macro"))
    assert m.matthews(SAID, TRUE) == pytest.approx(reference.matthews_corrcoef(TRUE, SAID))
    assert m.matthews(said, two) == pytest.approx(reference.matthews_corrcoef(two, said))
    assert m.matthews([1] * 60, TRUE) == reference.matthews_corrcoef(TRUE, [1] * 60) == 0


def test_correlations_as_in_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    ties = [float(round(value)) for value in VALUES]
    for one, other in ((VALUES, OTHERS), (ties, OTHERS), (ties, ties[::-1])):
        assert m.pearson(one, other) == pytest.approx(stats.pearsonr(one, other).statistic)
        assert m.spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
    assert math.isnan(m.pearson([1.0, 1.0], [1.0, 2.0]))


def test_by_hand() -> None:
    assert m.accuracy([1, 2, 3], [1, 2, 4]) == pytest.approx(2 / 3)
    # of class 1: found 3, there 2, both 1
    assert m.f1_binary([1, 1, 1, 0], [1, 0, 0, 1], 1) == pytest.approx(2 / 5)
    assert m.f1_binary([0], [0], 1) == 0.0
    assert m.matthews([1, 1, 0, 0], [1, 1, 0, 0]) == 1.0 and m.matthews([0, 0, 1, 1], [1, 1, 0, 0]) == -1.0
    assert m.perplexity(math.log(50)) == pytest.approx(50) and m.perplexity(1e4) == math.inf
    assert m.spearman([1, 2, 3], [1, 10, 1000]) == pytest.approx(1)
    with pytest.raises(ld.ConfigError, match="1 predictions beside 2 references"):
        m.accuracy([1], [1, 2])


def test_answers_as_squad_compares_them() -> None:
    assert m.exact_match("The Eiffel-Tower!", ["eiffeltower", "x"]) == 1.0
    assert m.exact_match("a b", ["b c"]) == 0.0
    # "cat sat" and "cat sat down": two of two, two of three
    assert m.token_f1("the cat sat", ["x", "a cat sat down"]) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert m.token_f1("", []) == m.exact_match("", []) == 1.0 and m.token_f1("x", []) == 0.0


def test_entities() -> None:
    assert entities(["B-PER", "I-PER", "O", "B-LOC", "B-LOC"]) == {("PER", 0, 1), ("LOC", 3, 3), ("LOC", 4, 4)}
    assert entities(["I-PER", "I-LOC", "O", "I-LOC"]) == {("PER", 0, 0), ("LOC", 1, 1), ("LOC", 3, 3)}
    assert entities(["B-PER", "E-PER", "S-LOC", "I-LOC"]) == {("PER", 0, 1), ("LOC", 2, 2), ("LOC", 3, 3)}
    assert entities(["O", "NOUN", "X-1"]) == set()
    scores = entity_scores([["B-PER", "I-PER", "O"], ["B-LOC"]], [["B-PER", "O", "O"], ["B-LOC"]])
    assert scores == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert entity_scores([["O"]], [["O"]])["f1"] == 0.0


class TestGenerated:
    def test_bleu(self) -> None:
        pytest.importorskip("sacrebleu")
        texts = ["Blue Spice is a coffee shop in the city centre .", "Aromi is a pub ."]
        assert m.bleu(texts, [[one] for one in texts]) == pytest.approx(100)
        # unigrams 4/5, bigrams 3/4, trigrams 2/3, four-grams 1/2, same length
        assert m.bleu(["a b c d x"], [["a b c d e"]]) == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 / 2) ** 0.25)
        several = m.bleu(["a b c d x", "k l m n"], [["z z z z z z", "a b c d e"], ["k l m n"]])
        assert several == pytest.approx(100 * (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25)
        assert math.isnan(m.bleu([], []))

    def test_rouge(self) -> None:
        pytest.importorskip("rouge_score")
        found = m.rouge(["a b c d"], [["z", "a c d e"]])
        # unigrams 3 of 4 and 4; bigrams only "c d" of 3 and 3; longest common a c d
        assert found == pytest.approx({"rouge1": 75, "rouge2": 100 / 3, "rougeL": 75})

    def test_all_of_them(self) -> None:
        pytest.importorskip("sacrebleu")
        pytest.importorskip("rouge_score")
        found = m.generation_metrics(["blue is the sky now"], [["blue is the sky now"]])
        assert found == pytest.approx({"bleu": 100, "rouge1": 100, "rouge2": 100, "rougeL": 100, "exact_match": 1})

    def test_without_the_libraries(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
        monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
        with pytest.raises(ld.ConfigError, match=r"sacrebleu: pip install 'lora-diffusion\[text\]'"):
            m.bleu(["a"], [["a"]])
        with pytest.raises(ld.ConfigError, match=r"rouge-score: pip install 'lora-diffusion\[text\]'"):
            m.rouge(["a"], [["a"]])
