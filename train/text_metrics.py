"""Figures of text tasks: each a function of predictions and references, on plain lists."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence

from lora_diffusion.errors import ConfigError


def accuracy(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """The share that is right; NaN of nothing."""
    _check(predictions, references)
    if not references:
        return math.nan
    return sum(one == other for one, other in zip(predictions, references)) / len(references)


def f1_binary(predictions: Sequence[Hashable], references: Sequence[Hashable], positive: Hashable) -> float:
    """Harmonic mean of precision and recall of one class; 0 where none of it is found."""
    _check(predictions, references)
    found = sum(one == positive for one in predictions)
    there = sum(one == positive for one in references)
    both = sum(one == other == positive for one, other in zip(predictions, references))
    return 2 * both / (found + there) if found + there else 0.0


def f1_macro(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """The mean of F1 over all classes that occur in either."""
    classes = dict.fromkeys([*references, *predictions])
    if not classes:
        return math.nan
    return math.fsum(f1_binary(predictions, references, one) for one in classes) / len(classes)


def matthews(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """Matthews' correlation of two classes or more (Gorodkin 2004, R_K); 0 where either side has only one class."""
    _check(predictions, references)
    count = len(references)
    right = sum(one == other for one, other in zip(predictions, references))
    found, there = Counter(predictions), Counter(references)
    together = right * count - sum(found[one] * there[one] for one in there)
    spread = (count**2 - sum(n * n for n in found.values())) * (count**2 - sum(n * n for n in there.values()))
    return together / math.sqrt(spread) if spread else 0.0


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Linear correlation; NaN where either side does not vary."""
    _check(predictions, references)
    if not references:
        return math.nan
    means = math.fsum(predictions) / len(predictions), math.fsum(references) / len(references)
    left, right = ([value - mean for value in side] for side, mean in zip((predictions, references), means))
    spread = math.sqrt(math.fsum(a * a for a in left)) * math.sqrt(math.fsum(b * b for b in right))
    return math.fsum(a * b for a, b in zip(left, right)) / spread if spread else math.nan


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of their ranks."""
    return pearson(_ranks(predictions), _ranks(references))


def perplexity(loss: float) -> float:
    """e to the mean -log p per token; infinite where that is more than a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


def plain_answer(text: str) -> str:
    """Lower case, without punctuation, articles and spaces to spare: what SQuAD compares (Rajpurkar et al. 2016)."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where one of the references says the same, by SQuAD's comparison. Without references: where nothing is said."""
    return float(plain_answer(prediction) in {plain_answer(one) for one in references or [""]})


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 over the words that answer and reference have in common, the best of the references (SQuAD)."""
    return max(_words_f1(plain_answer(prediction).split(), plain_answer(one).split()) for one in references or [""])


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU from 0 to 100 (sacrebleu's, Post 2018). references: one or more for each prediction.

    Raises ConfigError where sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as problem:
        raise ConfigError("BLEU needs the library sacrebleu: pip install 'lora-diffusion[text]'") from problem
    _check(predictions, references)
    if not predictions:
        return math.nan
    most = max(map(len, references))
    # sacrebleu takes one list for each place, with None where a prediction has fewer references
    places = [[own[n] if n < len(own) else None for own in references] for n in range(most)]
    return float(BLEU(force=True).corpus_score(list(predictions), places).score)


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The mean F1 of rouge1, rouge2 and rougeL from 0 to 100, of each prediction's best reference.

    Raises ConfigError where rouge_score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as problem:
        raise ConfigError("ROUGE needs the library rouge-score: pip install 'lora-diffusion[text]'") from problem
    _check(predictions, references)
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=False)
    scores = [[scorer.score(one, text) for one in own] for text, own in zip(predictions, references)]
    return {
        kind: 100 * math.fsum(max(score[kind].fmeasure for score in own) for own in scores) / max(len(scores), 1)
        for kind in kinds
    }


def generation_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU, ROUGE and exact match of generated texts, each with one reference or more."""
    exact = [exact_match(text, own) for text, own in zip(predictions, references)]
    return {
        "bleu": bleu(predictions, references),
        **rouge(predictions, references),
        "exact_match": math.fsum(exact) / max(len(exact), 1),
    }


def _words_f1(found: list[str], there: list[str]) -> float:
    if not found or not there:
        return float(found == there)
    both = sum((Counter(found) & Counter(there)).values())
    return 2 * both / (len(found) + len(there))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda place: values[place])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for place in order[start:stop]:
            ranks[place] = (start + stop - 1) / 2
        start = stop
    return ranks


def _check(predictions: Sequence[object], references: Sequence[object]) -> None:
    if len(predictions) != len(references):
        raise ConfigError(f"{len(predictions):,} predictions beside {len(references):,} references: one for each")
