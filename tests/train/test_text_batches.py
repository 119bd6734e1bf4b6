"""Which examples are in which micro-batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import lora_diffusion as ld
from tests.train.text_models import model, tokenizer
from train.randomness import Draws
from train.text_batches import Batches, in_order
from train.text_tasks.causal_lm import CausalLM
from train.text_tasks.task import IGNORED, Example
from train.text_template import PLAIN

TASK = CausalLM(tokenizer("gpt2"), template=PLAIN)


def example(length: int, counted: int | None = None) -> Example:
    counted = length - 1 if counted is None else counted
    labels = [IGNORED] * (length - counted) + list(range(3, 3 + counted))
    return Example({"input_ids": list(range(3, 3 + length))}, labels, "", counted, f"line {length}")


EXAMPLES = [example(2 + (7 * n) % 60) for n in range(101)]


def batches(by_length: bool = False, **options: int) -> Batches:
    return Batches(TASK, EXAMPLES, **{"batch_size": 4, "seed": 3, **options}, by_length=by_length)


def test_sample_k_is_the_same_however_samples_are_grouped() -> None:
    ones = [batches(batch_size=1).indices(k)[0] for k in range(240)]
    for size in (2, 3, 8):
        made = batches(batch_size=size)
        assert [index for position in range(240 // size) for index in made.indices(position)] == ones
    draws = Draws(3)
    assert ones == [draws.shuffled("text", k, 101) for k in range(240)]
    assert sorted(ones[:101]) == list(range(101)) == sorted(ones[101:202]) and ones[:101] != ones[101:202]


@pytest.mark.parametrize("by_length", [False, True])
def test_a_batch_follows_from_its_number_alone(by_length: bool) -> None:
    straight = [batches(by_length).indices(position) for position in range(120)]
    made = batches(by_length)
    for position in (77, 3, 119, 3, 50, 0):
        assert made.indices(position) == straight[position]
    assert batches(by_length, seed=4).indices(0) != straight[0]
    tensors, again = batches(by_length).batch(60), made.batch(60)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


@pytest.mark.parametrize("group", [1, 4])
def test_by_length_every_example_comes_up_as_often_as_without(group: int) -> None:
    grouped, plain = batches(True, group=group), batches(group=group)
    size = grouped._chunk_size
    assert size % (4 * group) == 0 and size <= len(EXAMPLES)
    for chunk in range(3):
        own = range(chunk * size // 4, (chunk + 1) * size // 4)
        assert Counter(i for p in own for i in grouped.indices(p)) == Counter(i for p in own for i in plain.indices(p))


def test_by_length_there_is_little_padding_also_across_processes() -> None:
    plain, grouped = batches(group=2).padding(24), batches(True, group=2).padding(24)
    assert plain > 0.25 and grouped < 0.12
    made = batches(True, group=2)
    for step in range(12):
        lengths = [EXAMPLES[i].length for rank in range(2) for i in made.indices(2 * step + rank)]
        assert max(lengths) - min(lengths) <= 12
    longest = [max(EXAMPLES[i].length for i in made.indices(2 * step)) for step in range(12)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_shares_make_the_mean_over_the_whole_step() -> None:
    """Micro-batches that count 1 and 30 tokens: the step's loss is the mean over 31 tokens."""
    uneven = [example(40, counted) for counted in (1, 30, 5, 12)]
    made = Batches(TASK, uneven, batch_size=1, seed=0, group=4)
    network = model("gpt2", "ForCausalLM")
    parts = [made.share(position) * TASK.loss(network, made.batch(position)) / 4 for position in range(4)]
    whole = TASK.loss(network, TASK.collate(uneven))
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    assert sum(made.share(position) for position in range(4)) == pytest.approx(4)


def test_evaluation_takes_every_example_once() -> None:
    found = list(in_order(EXAMPLES, 8))
    assert sorted(index for indices in found for index in indices) == list(range(101))
    assert EXAMPLES[found[0][0]].length == max(one.length for one in EXAMPLES)


def test_few_examples_and_bad_sizes() -> None:
    made = Batches(TASK, EXAMPLES[:2], batch_size=8, seed=0, by_length=True)
    assert Counter(made.indices(0) + made.indices(1)) == {0: 8, 1: 8} and made.steps_per_pass == 1
    with pytest.raises(ld.ConfigError, match="batch_size=0"):
        batches(batch_size=0)
    with pytest.raises(ld.DatasetError, match="no example"):
        Batches(TASK, [], batch_size=1, seed=0)
