"""From a file to a loss: real RTE, CB and E2E for tiny models, and what a run hears of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_diffusion as ld
from tests.train.text_models import FAMILIES, model, tokenizer
from train.text_batches import Batches
from train.text_data import TextData, evaluate, load
from train.text_metrics import generation_metrics
from train.text_packing import pack
from train.text_task_names import TASK_TYPES
from train.text_tasks import TASKS
from train.text_tasks.causal_lm import CausalLM
from train.text_tasks.masked_lm import MaskedLM
from train.text_tasks.seq2seq_lm import Seq2SeqLM
from train.text_tasks.sequence_classification import SequenceClassification
from train.text_tasks.tokens import longest
from train.text_template import TextTemplate

REAL = Path(__file__).parents[3] / "shared" / "data" / "text"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not beside this checkout")

PAIR = TextTemplate("{premise}", "{label}", second="{hypothesis}")


@needs_real
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "labels"), [("RTE", 2), ("CB", 3)])
def test_pairs_of_sentences(name: str, labels: int, family: str) -> None:
    task = SequenceClassification(tokenizer(family), template=PAIR, max_length=128, too_long="truncate")
    train = load(REAL / "fewglue_32dev" / name / "train.jsonl", task)
    dev = load(REAL / "fewglue_32dev" / name / "dev32.jsonl", task, training=False)
    assert (len(train.examples), len(dev.examples)) == (32, 32) and train.longest <= 128
    settings = task.model_settings()
    assert settings["num_labels"] == labels
    made = model(family, "ForSequenceClassification", **settings)
    made.config.pad_token_id = settings["pad_token_id"]
    batches = Batches(task, train.examples, batch_size=8, seed=0, by_length=True)
    loss = task.loss(made, batches.batch(0))
    loss.backward()
    assert bool(loss.isfinite())
    assert 0 <= evaluate(made, task, dev.examples, batch_size=16)["accuracy"] <= 1
    assert any("cut to 128 tokens" in remark for remark in train.remarks)


@needs_real
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_rte_as_a_cloze(family: str) -> None:
    template = TextTemplate("{hypothesis} ? {mask} , {premise}", "{label}")
    words = {"entailment": "yes", "not_entailment": "no"}
    task = MaskedLM(tokenizer(family), template=template, words=words, max_length=128, too_long="truncate")
    data = load(REAL / "fewglue_32dev" / "RTE" / "train.jsonl", task)
    made = model(family, "ForMaskedLM")
    found = evaluate(made, task, data.examples, batch_size=16)
    assert len(data.examples) == 32 and 0.2 <= found["p@1"] <= 0.8
    assert "«[MASK]»" in data.previews()[0] or "«<mask>»" in data.previews()[0]


@needs_real
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_e2e(family: str, tmp_path: Path) -> None:
    """Tables to sentences: reading, training, generating, BLEU against all references of a table."""
    template = TextTemplate("{table}\nText: ", "{text}")
    made_by: Any = Seq2SeqLM if family == "t5" else CausalLM
    task = made_by(tokenizer(family), template=template, max_length=480)
    options: dict[str, Any] = {"separator": "||", "columns": ["table", "text"]}
    file = REAL / "e2e" / "valid.txt"
    if family != "gpt2":  # the whole of it once
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file = tmp_path / "valid.txt"
        file.write_text("".join(lines[:400]), encoding="utf-8")
    data = load(file, task, **options)
    assert len(data.examples) == data.rows == (4672 if family == "gpt2" else 400) and data.remarks == []
    made = model(family, "ForConditionalGeneration" if family == "t5" else "ForCausalLM",
                 **({} if family == "t5" else _longer(family)))  # fmt: skip
    batches = Batches(task, data.examples, batch_size=4, seed=0, by_length=True)
    assert bool(task.loss(made, batches.batch(0)).isfinite())
    assert "»" in data.previews(1)[0] and "Text:" in data.previews(1)[0]
    if family == "gpt2":
        texts = task.generate(made, data.examples[:3], max_new_tokens=4)
        pytest.importorskip("sacrebleu")
        pytest.importorskip("rouge_score")
        references = [[one.reference for one in data.examples[:3]]] * 3
        assert generation_metrics(texts, references)["bleu"] < 5
        packs = pack(data.examples, 480)
        assert sum(one.length for one in packs) > 0.9 * 480 * len(packs)


def _longer(family: str) -> dict[str, int]:
    return {"n_positions" if family == "gpt2" else "max_position_embeddings": 512}


def written(folder: Path, lines: list[str]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines))
    return path


class TestWhatARunHears:
    TASK = CausalLM(tokenizer("gpt2"), template=TextTemplate("{q}\nA: ", "{a}"), max_length=24, too_long="skip")

    def load(self, folder: Path, **options: Any) -> TextData:
        lines = ['{"q": "Who ?", "a": "Anna"}', '{"q": "Who', '{"q": "Who ?"}', '{"q": "%s", "a": "x"}' % ("Tom " * 40)]
        return load(written(folder, lines), self.TASK, **options)

    def test_an_error_with_file_and_line(self, tmp_path: Path) -> None:
        with pytest.raises(ld.DatasetError, match=r"train\.jsonl, line 2: the row is no JSON"):
            self.load(tmp_path)

    def test_counts_by_reason(self, tmp_path: Path) -> None:
        data = self.load(tmp_path, on_bad="skip")
        assert [remark.partition(": ")[2].partition(" (")[0] for remark in data.remarks] == [
            "1 row skipped: is no JSON",
            "1 row skipped: has no 'a'",
            "1 row skipped: is longer than 24 tokens",
        ]
        assert data.describe().endswith("train.jsonl: 1 examples, 12 tokens, the longest has 12") or data.tokens
        assert data.previews() == ["Who ?⏎A:« Anna<|endoftext|>»"]

    def test_the_fingerprint_follows_the_tokens(self, tmp_path: Path) -> None:
        prints = {
            load(written(tmp_path, [f'{{"q": "Who ?", "a": "{name}"}}']), self.TASK).fingerprint
            for name in ("Anna", "Tom", "Anna")
        }
        assert len(prints) == 2


def test_names_of_tasks() -> None:
    """PEFT's words, where it has one."""
    peft = pytest.importorskip("peft")
    assert {name: word for name, (word, _) in TASKS.items()} == TASK_TYPES
    for name, (word, task) in TASKS.items():
        assert task.name == name and (word is None or peft.TaskType(word))
    import transformers

    assert all(hasattr(transformers, task.model_class) for _, task in TASKS.values())


@pytest.mark.parametrize(
    ("family", "task", "limit"),
    [("bert", "ForMaskedLM", 128), ("roberta", "ForMaskedLM", 128), ("deberta", "ForMaskedLM", 128),
     ("gpt2", "ForCausalLM", 128), ("llama", "ForCausalLM", 128), ("t5", "ForConditionalGeneration", None)],
)  # fmt: skip
def test_how_long_a_row_may_be(family: str, task: str, limit: int | None) -> None:
    """A row of the limit goes through; for learned positions one more does not."""
    made = model(family, task)
    assert longest(made.config, tokenizer(family)) == limit
    if limit is None:
        return
    assert made(torch.full((1, limit), 5)).logits.shape[1] == limit
    if family in ("bert", "roberta", "gpt2"):
        with pytest.raises((IndexError, RuntimeError)):
            made(torch.full((1, limit + 1), 5))
