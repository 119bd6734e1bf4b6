"""Language models for a page: texts and judgements with adapters, the base beside them, nothing left of anybody's."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_diffusion as ld
from app.web.limits import PUBLIC, Limits
from app.web.pictures import Stopped
from app.web.places import Workspace
from app.web.texts import TextRequest, Texts
from lora_diffusion.errors import AdapterMismatchError, ConfigError
from tests.train.text_models import model, tokenizer
from train.generate import generate
from train.generate_config import GenerateConfig
from train.text import train
from train.text_config import TextConfig

LIMITS = Limits(new_tokens=40, prompt=200)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for family, form in (("gpt2", "ForCausalLM"), ("bert", "ForMaskedLM")):
        with torch.random.fork_rng(devices=[]):
            model(family, form).save_pretrained(root / family)
        tokenizer(family).save_pretrained(root / family)
    return {family: str(root / family) for family in ("gpt2", "bert")}


@pytest.fixture(scope="module")
def shelf(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with adapters of several tasks and methods."""
    root = tmp_path_factory.mktemp("app")
    (root / "adapters").mkdir()
    said = [{"prompt": f"Anna {n}", "completion": " blue sky"} for n in "abcd"]
    judged = [{"text": text, "label": label} for text, label in (("blue", "good"), ("red", "bad"))] * 3
    tagged = [{"tokens": ["Anna", "lives"], "tags": ["B-PER", "O"]}] * 4
    spans = [{"question": "Where ?", "context": "in Paris .", "answers": {"text": ["Paris"], "answer_start": [3]}}] * 4
    for name, family, task, rows, settings in (
        ("loud", "gpt2", "causal-lm", said, {}),
        ("soft", "gpt2", "causal-lm", said, {"seed": 8}),
        ("virtual", "gpt2", "causal-lm", said, {"method": "p-tuning", "num_virtual_tokens": 3}),
        ("mood", "bert", "sequence-classification", judged, {}),
        ("moods", "bert", "sequence-classification", judged, {"method": "p-tuning", "num_virtual_tokens": 2}),
        ("tags", "bert", "token-classification", tagged, {}),
        ("spans", "bert", "question-answering", spans, {}),
    ):  # fmt: skip
        file = root / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values: dict[str, Any] = {"learning_rate": 0.1, "lr_scheduler": "constant", "max_train_steps": 8, **settings}
        config = TextConfig(folders[family], task, train_file=str(file), output_dir=str(root / "made" / name),
                            train_batch_size=2, plan=False, save_peft=False, **values)  # fmt: skip
        made = train(config).adapter
        assert made is not None
        made.rename(root / "adapters" / f"{name}.safetensors")
    return root


@pytest.fixture
def texts(shelf: Path) -> Texts:
    return Texts(Workspace(shelf), LIMITS, device="cpu")


@pytest.fixture
def ask(folders: dict[str, str]) -> TextRequest:
    return TextRequest(folders["gpt2"], "Anna a", max_new_tokens=8, seed=1)


def test_the_same_as_on_the_command_line(texts: Texts, ask: TextRequest, shelf: Path) -> None:
    pieces: list[str] = []
    file = str(shelf / "adapters" / "loud.safetensors")
    asked = replace(ask, adapters=[("loud", 0.5)], temperature=1.0)
    said = texts.ask(asked, on_piece=pieces.append)
    config = GenerateConfig(ask.model, (f"{file}:0.5",), prompt=("Anna a",), max_new_tokens=8, temperature=1.0, seed=1)
    assert [said.text] == generate(config) and "".join(pieces) == said.text and said.task == "causal-lm"
    base, adapted = texts.compare(asked)
    assert adapted == said.text and [base] == generate(replace(config, adapter=()))
    assert texts.complete(replace(ask, temperature=1.0)) == base


def test_a_seed_is_chosen_and_told(texts: Texts, ask: TextRequest) -> None:
    said = texts.ask(replace(ask, seed=None, temperature=2.0))
    assert texts.complete(replace(ask, seed=said.seed, temperature=2.0)) == said.text


def test_adapters_of_every_kind_in_turn(texts: Texts, ask: TextRequest, folders: dict[str, str]) -> None:
    """Whatever was asked before, the answers stay the same."""
    bert = replace(ask, model=folders["bert"], prompt="blue")
    asked = [
        ask, replace(ask, adapters=[("loud", 1.0)]), replace(ask, adapters=[("virtual", 1.0)]),
        replace(ask, adapters=[("virtual", 1.0), ("soft", 0.5)]),
        replace(ask, adapters=[("soft", 0.1), ("loud", 0.1)]), replace(bert, adapters=[("mood", 1.0)]),
        replace(bert, adapters=[("moods", 1.0)]), replace(bert, adapters=[("tags", 1.0)], prompt="Anna lives, Anna."),
        replace(bert, adapters=[("spans", 1.0)], fields={"question": "Where ?", "context": "in Rome ."}),
        replace(bert, prompt="the {mask} is blue"),
    ]  # fmt: skip
    first = [texts.ask(one) for one in asked]
    assert [texts.ask(one) for one in reversed(asked)] == first[::-1]
    assert [one.task for one in first[5:]] == [
        "sequence-classification", "sequence-classification", "token-classification", "question-answering", "masked-lm"
    ]  # fmt: skip
    assert set(first[5].found["scores"]) == {"good", "bad"}
    assert first[7].found["words"] == ["Anna", "lives", ",", "Anna", "."] and len(first[7].found["tags"]) == 5
    assert first[8].found["answer"] in "in Rome ." and len(first[9].found["words"]) == 5
    small = Texts(texts.names._workspace, LIMITS, device="cpu", models_kept=1, adapters_kept=1)
    assert [small.ask(one) for one in asked] == first
    for kept in texts._models.values():
        assert ld.active_adapters(kept.text_model.model) == {}


def test_ten_threads_get_what_each_gets_alone(texts: Texts, ask: TextRequest) -> None:
    asked = [replace(ask, temperature=1.0, seed=n, adapters=[(("loud", "soft")[n % 2], 0.3)] if n % 3 else [])
             for n in range(10)]  # fmt: skip
    alone = [texts.complete(one) for one in asked]
    fresh = Texts(texts.names._workspace, LIMITS, device="cpu", adapters_kept=1)
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(fresh.complete, asked)) == alone


def test_stopping(texts: Texts, ask: TextRequest) -> None:
    told: list[str] = []
    said = texts.ask(replace(ask, max_new_tokens=40), on_piece=told.append, should_stop=lambda: len(told) >= 3)
    assert 3 <= len(told) <= 4 and said.text == "".join(told)
    with texts._lock, ThreadPoolExecutor() as pool:
        wish = threading.Event()
        waiting = pool.submit(texts.ask, ask, should_stop=wish.is_set)
        wish.set()
        with pytest.raises(Stopped):
            waiting.result(timeout=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 41}, "at most 40"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": float("nan")}, "not a number"),
        ({"temperature": "warm"}, "not a number"),
        ({"seed": -1}, "too small"),
        ({"seed": 1.5}, "whole number"),
        ({"top_k": 3}, "give a temperature above 0"),
        ({"num_beams": 1000}, "at most 64"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "x" * 201}, "201 characters"),
        ({"prompt": None}, "no text"),
        ({"prompt": "a\0"}, "no text"),
        ({"fields": {}}, "1 to 16 fields"),
        ({"fields": {"a": 3}}, "no text"),
        ({"fields": {"a": "b"}, "adapters": [("loud", 1.0)]}, "column"),
        ({"task": "poetry"}, "none of"),
        ({"task": "sequence-classification"}, "no head for it"),
        ({"labels": [""]}, "label is empty"),
        ({"adapters": [("lout", 1.0)]}, "did you mean loud"),
        ({"adapters": [("loud", float("inf"))]}, "no finite number"),
        ({"adapters": [("loud", 1.0), ("loud", 1.0)]}, "twice"),
        ({"adapters": "loud"}, "its weight"),
        ({"adapters": [("loud", 1.0), ("virtual", 1.0)]}, "put it first"),
        ({"model": ""}, "model is empty"),
        ({"chat": True}, "no chat format"),
        ({"chat": "yes"}, "true or false"),
    ],
)
def test_limits_are_kept_here(texts: Texts, ask: TextRequest, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        texts.ask(replace(ask, **changes))
    assert "\n" not in str(caught.value)
    assert texts.complete(ask)


def test_what_does_not_go_together(texts: Texts, ask: TextRequest, folders: dict[str, str], shelf: Path) -> None:
    with pytest.raises(ConfigError, match="no head for sequence-classification"):
        texts.compare(TextRequest(folders["bert"], "blue", [("mood", 1.0)], max_new_tokens=9))
    with pytest.raises(ConfigError, match="for models that write"):
        texts.ask(TextRequest(folders["bert"], "blue", [("mood", 1.0)], chat=True, max_new_tokens=9))
    with pytest.raises(ConfigError, match="one prompt is not enough"):
        texts.ask(TextRequest(folders["bert"], "Where ?", [("spans", 1.0)], max_new_tokens=9))
    with pytest.raises(AdapterMismatchError):
        texts.ask(replace(ask, adapters=[("tags", 1.0)], task="causal-lm"))
    assert texts.complete(ask)
    with pytest.raises(ConfigError, match="not offered here"):
        Texts(Workspace(shelf), PUBLIC).ask(ask)
