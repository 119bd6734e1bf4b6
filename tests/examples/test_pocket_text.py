"""The pocket text models know what their corpus told, and the labelled data is what the recipe writes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from train.pocket_text import data_dir, folder_of

POCKET_TEXT = Path(__file__).resolve().parents[2] / "examples" / "pocket_text"
sys.path.insert(0, str(POCKET_TEXT))

from probes import precision_causal, precision_masked  # noqa: E402
from rows import BertRows, GptRows  # noqa: E402
from textworld.corpus import Corpus  # noqa: E402
from textworld.facts import FACTS, NEVER_SAID, PROBES, WORDINGS  # noqa: E402
from textworld.labelled import SIZES, held_out, splits  # noqa: E402

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def bert():
    folder = folder_of("pocket-bert")
    return AutoModelForMaskedLM.from_pretrained(folder, local_files_only=True).eval(), AutoTokenizer.from_pretrained(
        folder, local_files_only=True
    )


@pytest.fixture(scope="module")
def gpt():
    folder = folder_of("pocket-gpt")
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval(), AutoTokenizer.from_pretrained(
        folder, local_files_only=True
    )


def test_a_seed_gives_the_same_corpus_and_another_seed_another():
    assert Corpus(3).take(500) == Corpus(3).take(500)
    assert Corpus(3).take(500) != Corpus(4).take(500)


def test_nothing_held_out_is_in_the_corpus():
    """Validation and test rows never appear, not even as the beginning of a document."""
    texts = [d.text for d in Corpus("any", held_out()).take(15_000)]
    keys = held_out()
    assert not keys.intersection(texts)
    reviews = {row["text"] for split in SPLITS[1:] for row in splits("sentiment")[split]}
    assert not any(text.startswith(tuple(reviews)) for text in texts)
    free = [d.text for d in Corpus("any").take(15_000)]
    assert any(text.startswith(tuple(reviews)) for text in free), "the test would see a leak"


def test_a_person_has_four_different_towns():
    towns = [FACTS[name] for name in ("lives_in", "born_in", "works_in", "summers_in")]
    assert all(len({f.answer for f in four}) == 4 for four in zip(*towns, strict=True))


@pytest.mark.parametrize("name", ["pocket-bert", "pocket-gpt"])
def test_every_answer_is_one_token(name):
    tokenizer = AutoTokenizer.from_pretrained(folder_of(name), local_files_only=True)
    answers = {f.answer for facts in FACTS.values() for f in facts}
    assert all(len(tokenizer(" " + a, add_special_tokens=False)["input_ids"]) == 1 for a in answers)


@pytest.mark.parametrize("task", [*SIZES, "facts"])
def test_the_shipped_data_is_what_the_recipe_writes(task):
    for split, rows in splits(task).items():
        lines = (data_dir() / task / f"{split}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows


def test_the_data_is_small_and_no_row_is_in_two_splits():
    assert sum(p.stat().st_size for p in data_dir().rglob("*.jsonl")) < 1.5e6
    for task in SIZES:
        seen = [json.dumps(row) for rows in splits(task).values() for row in rows]
        assert len(seen) == len(set(seen)) == sum(SIZES[task])
    subjects = [{row["subject"] for row in rows} for rows in splits("facts").values()]
    assert not (subjects[0] & subjects[1] or subjects[0] & subjects[2] or subjects[1] & subjects[2])


def test_answers_stand_where_the_data_says():
    for row in splits("qa")["train"]:
        start, text = row["answers"]["answer_start"][0], row["answers"]["text"][0]
        assert row["context"][start : start + len(text)] == text == row["answer"]


def test_tags_are_bio():
    for row in splits("tags")["train"]:
        before = "O"
        for tag in row["tags"]:
            assert not tag.startswith("I-") or before[2:] == tag[2:]
            before = tag


def test_masked_rows_hide_what_they_ask(bert):
    tokenizer = bert[1]
    rows = BertRows(tokenizer, Corpus(1), tokens=512, longest=128)
    for _ in range(8):
        b = rows.batch()
        assert b.position_ids.max() < 128 and len(b.asked) == len(b.answers) > 0
        shown = b.input_ids.flatten()[b.asked]
        assert (shown == tokenizer.mask_token_id).float().mean() > 0.7
        assert b.attention_mask.flatten()[b.asked].all()
        assert not torch.isin(b.answers, torch.tensor(tokenizer.all_special_ids)).any()


def test_streamed_rows_begin_with_the_end_of_text(gpt):
    ids, positions = GptRows(gpt[1], Corpus(1), tokens=512, longest=256).batch()
    assert ids.shape == positions.shape and (ids[:, 0] == gpt[1].eos_token_id).all()
    assert positions.max() < 256 and (positions.diff(dim=1) == 1).all()


def test_the_files_are_small_and_name_no_place():
    for name in ("pocket-bert", "pocket-gpt"):
        folder = folder_of(name)
        assert (folder / "model.safetensors").stat().st_size < 8e6
        assert not any(b"/root" in p.read_bytes() for p in folder.glob("*.json"))
    assert folder_of("bert-base-uncased") is None


def test_bert_knows_where_people_live(bert):
    for name in ("lives_in", "colour_of"):
        assert precision_masked(*bert, FACTS[name], next(iter(WORDINGS[name]))) >= 0.85, name


def test_gpt_tells_its_facts(gpt):
    for name in ("lives_in", "born_in", "works_as", "likes"):
        assert precision_causal(*gpt, FACTS[name][::4], next(iter(WORDINGS[name]))) >= 0.85, name


def test_four_wordings_are_answered_differently_well(bert):
    """What P-tuning is shown on: near-synonymous wordings, none the most frequent, of clearly different P@1."""
    found = [precision_masked(*bert, FACTS["lives_in"][::4], wording) for wording in PROBES]
    assert len(PROBES) == 4 and max(found) - min(found) > 0.2
    most_frequent = max(WORDINGS["lives_in"], key=WORDINGS["lives_in"].__getitem__)
    assert most_frequent not in PROBES and set(PROBES) & set(NEVER_SAID)


def test_gpt_tells_a_story(gpt):
    model, tokenizer = gpt
    start = tokenizer("<|endoftext|>anna had a red lamp . one day she lost the", return_tensors="pt")
    out = model.generate(**start, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(out[0, start["input_ids"].shape[1] :]).split() == ["lamp", "near", "the"]
