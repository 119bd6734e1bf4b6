"""Asking models with adapters: texts, labels, tags, spans and words, with the base beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_diffusion as ld
from lora_diffusion import AdapterMismatchError, ConfigError, DatasetError, ModelNotFoundError
from train.generate import answers, generate
from train.generate_config import GenerateConfig, validate
from train.generate_predict import spans_of
from train.text import train
from train.text_config import TextConfig
from train.text_facts import columns_in, labels_in
from train.text_models import load_config, load_tokenizer
from train.text_parts import read_parts

Make = Callable[..., TextConfig]
QUICK: dict[str, Any] = {"learning_rate": 1e-2, "lr_scheduler": "constant", "max_train_steps": 40}


def trained(config: TextConfig) -> str:
    result = train(config)
    assert result.adapter is not None
    return str(result.adapter)


def with_metadata(file: str, **changes: Any) -> str:
    """A copy of an adapter whose file says something else; None takes a word out."""
    adapter = ld.read_adapter(file)
    metadata = {name: value for name, value in {**adapter.metadata, **changes}.items() if value is not None}
    changed = str(Path(file).with_name("changed.safetensors"))
    ld.write_adapter(replace(adapter, metadata={}), changed, metadata=metadata)
    return changed


def own_texts(config: TextConfig, file: str, rows: list[int]) -> list[str]:
    """What the run's own judgement makes of its rows."""
    model = config.pretrained_model_name_or_path
    parts = read_parts(config, load_tokenizer(model), load_config(model))
    loaded = AutoModelForCausalLM.from_pretrained(model)
    ld.load_adapter(loaded, file, "default")
    task: Any = parts.task
    return list(task.generate(loaded, [parts.train.examples[place] for place in rows], max_new_tokens=6))


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_greedy_text_is_what_transformers_writes(text_folders: dict[str, Path]) -> None:
    folder = str(text_folders["gpt2"])
    pieces: list[str] = []
    config = GenerateConfig(folder, prompt=("Anna lives in ",), max_new_tokens=12)
    [text] = generate(config, on_event=lambda e: pieces.append(e["text"]) if e["event"] == "piece" else None)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("Anna lives in", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip() and text
    assert "".join(pieces) == text
    beams = model.generate(ids, max_new_tokens=12, do_sample=False, num_beams=3, pad_token_id=0)
    expected = tokenizer.decode(beams[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert generate(replace(config, num_beams=3)) == [expected]


def test_seeds_give_the_same_text_again_and_do_not_disturb_anybody(text_folders: dict[str, Path]) -> None:
    base = GenerateConfig(str(text_folders["gpt2"]), prompt=("Anna", "Tom lives"), temperature=1.0, max_new_tokens=12)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generate(base)
    assert torch.equal(torch.rand(3), expected)
    assert generate(base) == first and generate(replace(base, seed=1)) != first
    assert generate(replace(base, prompt=("Tom lives",))) == first[1:]
    greedy = replace(base, temperature=0.0)
    assert generate(replace(base, top_k=1)) == generate(greedy) == generate(replace(base, top_p=1e-6))
    [often, seldom] = [generate(replace(greedy, repetition_penalty=penalty))[0].split() for penalty in (1.0, 5.0)]
    assert len(set(often)) < len(set(seldom))


@pytest.mark.parametrize("method", ["lora", "p-tuning", "prompt-tuning", "prefix-tuning", "houlsby", "pre-layer"])
def test_an_adapter_writes_what_it_learned_and_the_base_beside_it(make_text_config: Make, method: str) -> None:
    """Template and virtual tokens come from the file; the texts are those of the run's own judgement."""
    tokens = {} if method in ("lora", "houlsby") else {"num_virtual_tokens": 3}
    config = make_text_config(
        "causal-lm", method=method, template="{question}\n{answer}", **{**QUICK, "learning_rate": 0.1}, **tokens
    )
    file = trained(config)
    model = config.pretrained_model_name_or_path
    prompts = ("Where does Anna live ?", "Where does Tom live ? .")
    found = answers(GenerateConfig(model, (file,), prompt=prompts, compare=True, max_new_tokens=6))
    raw = tuple(f"{prompt}\n" for prompt in prompts)
    bare = generate(GenerateConfig(model, prompt=raw, max_new_tokens=6))
    assert [one.base for one in found] == bare
    assert [one.text for one in found] != bare
    rows = [json.loads(line)["question"] for line in Path(str(config.train_file)).read_text().splitlines()]
    assert [one.text for one in found] == own_texts(config, file, [rows.index(prompt) for prompt in prompts])
    off = generate(GenerateConfig(model, (f"{file}:0",), prompt=prompts, max_new_tokens=6))
    assert off == bare
    assert generate(GenerateConfig(model, (file,), prompt=raw, template=False, max_new_tokens=6)) == [
        one.text for one in found
    ]


@pytest.mark.parametrize("template", ["(2,2)", "{P:2} {x} says {P:3}"])
def test_virtual_tokens_stand_where_the_adapter_says(make_text_config: Make, tmp_path: Path, template: str) -> None:
    rows = lines(tmp_path / "rows.jsonl", [{"x": "Anna", "answer": "blue"}, {"x": "Tom", "answer": "green"}] * 4)
    config = make_text_config(
        "causal-lm", method="p-tuning", prompt_template=template, train_file=rows, **{**QUICK, "learning_rate": 0.1}
    )
    file = trained(config)
    asked = GenerateConfig(
        config.pretrained_model_name_or_path, (file,), prompt=("Anna", "Tom"), repetition_penalty=1.01, compare=True
    )
    found = answers(replace(asked, max_new_tokens=6))
    assert all(one.base != one.text for one in found)
    same = answers(replace(asked, max_new_tokens=6, repetition_penalty=1.0))
    assert [one.text for one in same] == own_texts(config, file, [0, 1])


def test_a_sequence_to_sequence_model(make_text_config: Make) -> None:
    config = make_text_config("seq2seq-lm", **QUICK)
    file = trained(config)
    rows = GenerateConfig(config.pretrained_model_name_or_path, (file,), input_file=config.train_file, max_new_tokens=4)
    found = answers(rows)
    assert (
        len(found) == 13 and found[0].row["answer"] and set(found[0].record()) == {"question", "answer", "prediction"}
    )
    again = generate(replace(rows, input_file=None, template=False, prompt=(found[0].row["question"] + "\n",)))
    assert again == [found[0].text]
    assert generate(replace(rows, num_beams=2))


def test_labels(make_text_config: Make, text_files: dict[str, Path], tmp_path: Path) -> None:
    config = make_text_config(train_file=str(text_files["labels"]), test_file=str(text_files["labels"]), **QUICK)
    result = train(config)
    file = str(result.adapter)
    said: list[str] = []
    silent = with_metadata(file, labels=None)
    rows = GenerateConfig(config.pretrained_model_name_or_path, (silent,), input_file=config.train_file)
    found = answers(rows, on_event=lambda e: said.append(e["message"]) if e["event"] == "warning" else None)
    assert any("--labels names them" in one for one in said) and found[0].found["label"].startswith("LABEL_")
    said.clear()
    config_told = replace(rows, adapter=(file,), output_file=str(tmp_path / "out.jsonl"))
    found = answers(config_told, on_event=lambda e: said.append(e["message"]) if e["event"] == "warning" else None)
    assert not said
    right = sum(one.found["label"] == one.row["label"] for one in found) / len(found)
    assert right == pytest.approx(result.figures["test"]["accuracy"])
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(written) == 13 and written[0]["label"] == found[0].row["label"] and "prediction" in written[0]
    assert sum(written[0]["scores"].values()) == pytest.approx(1)
    [text] = generate(replace(rows, input_file=None, labels="no,yes", prompt=("The sky is blue .",)))
    assert text.startswith("yes (")
    with pytest.raises(ConfigError, match=r"3 labels .* head has 2"):
        answers(replace(rows, labels="a,b,c"))
    with pytest.raises(ConfigError, match="no head for sequence-classification to compare"):
        answers(replace(rows, compare=True))
    with pytest.raises(ConfigError, match="--temperature is for models that write"):
        answers(replace(rows, temperature=0.5))


def test_pairs_need_rows(make_text_config: Make, tmp_path: Path) -> None:
    config = make_text_config(**QUICK)
    told = trained(config)
    asked = GenerateConfig(config.pretrained_model_name_or_path, (told,), prompt=("Anna",))
    with pytest.raises(ConfigError, match="trained on 'premise' and 'hypothesis'; give these apart"):
        answers(asked)
    rows = lines(tmp_path / "pairs.jsonl", [{"premise": "Anna lives in Paris .", "hypothesis": "in Paris"}])
    [found] = answers(replace(asked, prompt=(), input_file=rows))
    assert found.found["label"] in ("entailment", "contradiction") and "label" not in found.row


@pytest.mark.parametrize("method", ["lora", "p-tuning"])
def test_tags_and_spans(make_text_config: Make, tmp_path: Path, method: str) -> None:
    config = make_text_config("token-classification", method=method, **{**QUICK, "learning_rate": None})
    told = trained(config)
    asked = GenerateConfig(config.pretrained_model_name_or_path, (told,), prompt=("Anna lives in Paris",))
    [found] = answers(asked)
    assert found.found["words"] == ["Anna", "lives", "in", "Paris"] and len(found.found["tags"]) == 4
    rows = lines(tmp_path / "rows.jsonl", [{"tokens": ["Anna", "lives", "in", "Paris"]}])
    assert answers(replace(asked, prompt=(), input_file=rows))[0].text == found.text
    tags = ["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-PER"]
    assert [(one["label"], one["text"]) for one in spans_of(list("abcdef"), tags)] == [
        ("PER", "a b"), ("LOC", "d"), ("LOC", "e"), ("PER", "f")
    ]  # fmt: skip


def test_answers_in_a_context(make_text_config: Make, tmp_path: Path) -> None:
    config = make_text_config("question-answering", max_length=24, doc_stride=4, **QUICK)
    file = trained(config)
    context = "Tom lives in Rome . " * 4 + "Anna lives in Paris ."
    rows = lines(tmp_path / "rows.jsonl", [{"question": "Where does Anna live ?", "context": context}] * 2)
    asked = GenerateConfig(config.pretrained_model_name_or_path, (file,), input_file=rows)
    found = answers(asked)
    assert len(found) == 2
    place = found[0].found["start"]
    assert found[0].text and context[place : place + len(found[0].text)] == found[0].text
    with pytest.raises(ConfigError, match="'question' and 'context'"):
        answers(replace(asked, input_file=None, prompt=("Where does Anna live ?",)))


def test_words_at_a_mask(make_text_config: Make) -> None:
    """With a template of words, and with one of virtual tokens: as often right as the run's own judgement says."""
    plain = make_text_config("masked-lm", **{**QUICK, "max_train_steps": 80})
    template = {"template": None, "method": "p-tuning", "prompt_template": "(2,1,2)"}
    virtual = make_text_config("masked-lm", "virtual", **{**QUICK, "learning_rate": 0.1}, **template)
    for config in (plain, virtual):
        result = train(replace(config, test_file=config.train_file))
        asked = GenerateConfig(config.pretrained_model_name_or_path, (str(result.adapter),), prompt=("Anna", "Tom"))
        found = answers(replace(asked, compare=True))
        assert len(found[0].found["words"]) == 5 and found[0].found["word"] == found[0].text
        assert found[0].base is not None and [one.base for one in found] != [one.text for one in found]
        rows = answers(replace(asked, prompt=(), input_file=config.train_file))
        right = sum(one.text == one.row["place"].lower() for one in rows) / len(rows)
        assert right == pytest.approx(result.figures["test"]["p@1"]) and right > 0
        assert {one.row["x"]: one.text for one in rows} == {"Anna": found[0].text, "Tom": found[1].text}
    whole = GenerateConfig(plain.pretrained_model_name_or_path, prompt=("Anna lives in {mask} .", "Tom [MASK]"))
    assert len(generate(whole)) == 2
    with pytest.raises(ConfigError, match="2 masks"):
        generate(replace(whole, prompt=("{mask} {mask}",)))


def test_several_adapters_add_up(make_text_config: Make, tmp_path: Path) -> None:
    config = make_text_config("causal-lm", **QUICK)
    file = trained(config)
    model = config.pretrained_model_name_or_path
    prompt = ("Where does Anna live ?\n",)
    once = generate(GenerateConfig(model, (file,), prompt=prompt, max_new_tokens=6))
    halves = GenerateConfig(model, (f"{file}:0.5", f"{file}:0.5"), prompt=prompt, max_new_tokens=6)
    assert generate(halves) == once
    virtual = trained(make_text_config("causal-lm", "virtual", method="p-tuning", num_virtual_tokens=2))
    assert generate(replace(halves, adapter=(virtual, file)))
    with pytest.raises(ConfigError, match="first --adapter only"):
        generate(replace(halves, adapter=(file, virtual)))


def test_stopping_keeps_what_there_is(text_folders: dict[str, Path]) -> None:
    told: list[int] = []
    config = GenerateConfig(str(text_folders["gpt2"]), prompt=("Anna", "Tom"), max_new_tokens=50)
    events: list[dict[str, Any]] = []

    def wish() -> bool:
        told.append(1)
        return len(told) > 5

    found = answers(config, on_event=events.append, should_stop=wish)
    assert len(found) == 1 and len(told) < 10
    assert events[-1] == {"event": "end", "recipe": "generate", "answers": 1, "stopped": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "neither is given"),
        ({"input_file": "rows.jsonl"}, "both are given"),
        ({"top_k": 5}, "give a --temperature above 0"),
        ({"top_p": 0.5}, "give a --temperature above 0"),
        ({"temperature": 1.0, "num_beams": 2}, "searches and .* draws"),
        ({"compare": True}, "needs an --adapter"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 10**9}, "at most"),
        ({"temperature": float("nan")}, "not a number"),
        ({"task": "poetry"}, "not one of"),
        ({"task": "masked-lm", "chat": True}, "judges"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        validate(replace(GenerateConfig("pocket-gpt", prompt=("x",)), **changes))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_asked(text_folders: dict[str, Path], tmp_path: Path) -> None:
    gpt = GenerateConfig(str(text_folders["gpt2"]), prompt=("x",))
    with pytest.raises(ConfigError, match="no head for it"):
        generate(replace(gpt, task="sequence-classification"))
    with pytest.raises(ConfigError, match="no gpt2 model for --task masked-lm"):
        generate(replace(gpt, task="masked-lm"))
    with pytest.raises(ConfigError, match="prompt 2 is empty"):
        generate(replace(gpt, prompt=("x", " ")))
    with pytest.raises(ConfigError, match="the model takes 128"):
        generate(replace(gpt, prompt=("x " * 500,)))
    with pytest.raises(ConfigError, match="no chat format"):
        generate(replace(gpt, chat=True))
    with pytest.raises(DatasetError, match="cannot be read"):
        generate(replace(gpt, prompts_file=str(tmp_path / "none.txt")))
    with pytest.raises(ModelNotFoundError):
        generate(replace(gpt, model=str(tmp_path)))


def test_an_adapter_for_another_model(make_text_config: Make, text_folders: dict[str, Path]) -> None:
    file = trained(make_text_config("causal-lm"))
    with pytest.raises(AdapterMismatchError):
        generate(GenerateConfig(str(text_folders["llama"]), (file,), prompt=("x",)))


def test_what_a_file_says_is_not_believed(make_text_config: Make) -> None:
    """Settings out of range, a path to read, labels that are none."""
    file = trained(make_text_config("causal-lm"))
    settings = {**ld.read_adapter(file).metadata["settings"], "allowed_words_file": "/etc/passwd", "unknown": 1}
    model = make_text_config("causal-lm").pretrained_model_name_or_path

    def ask(**changes: Any) -> GenerateConfig:
        hostile = with_metadata(file, settings={**settings, **changes})
        return GenerateConfig(model, (hostile,), prompt=("x\n",), max_new_tokens=2)

    generate(ask())
    for changes, message in (({"max_length": 10**12}, "more than the model takes"), ({"method": "x"}, "lacks"),
                             ({"template": "{a"}, "write {{"), ({"rank": -1}, "too small")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            generate(ask(**changes))
    assert labels_in({"labels": [1, 2]}) is None and labels_in({"labels": ["a", "a"]}) is None
    assert columns_in({"columns": "x"}) is None and columns_in({"columns": ["x" * 501]}) is None
