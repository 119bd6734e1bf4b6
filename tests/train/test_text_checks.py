"""Mistakes in a text run's settings, rows and model: one clear line each, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_diffusion import ConfigError, DatasetError, ModelNotFoundError
from train.record import read_events
from train.text import train
from train.text_checks import validate
from train.text_config import TextConfig

Make = Callable[..., TextConfig]


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("sequence-classification", {"method": "lorra"}, "did you mean lora"),
        ("sequence-classification", {"method": "houlsby+lin"}, "two of one kind"),
        ("sequence-classification", {"method": "full+lora"}, "full learns all weights"),
        ("sequence-classification", {"method": "bitfit+lora"}, "learn the same weights"),
        ("sequence-classification", {"method": "head+lora"}, "the head is learned anyway"),
        ("causal-lm", {"method": "head"}, "no head of its own"),
        ("sequence-classification", {"method": "head", "train_head": False}, "learns nothing"),
        ("sequence-classification", {"method": "full", "quantize": "nf4"}, "--quantize would fix"),
        ("sequence-classification", {"method": "bitfit", "fsdp": True}, "--fsdp takes a frozen base apart"),
        ("sequence-classification", {"fsdp": True, "quantize": "int8"}, "quantised base apart"),
        ("sequence-classification", {"fsdp_cpu_offload": True}, "needs --fsdp"),
        ("sequence-classification", {"packing": True}, "--packing is for causal-lm"),
        ("causal-lm", {"label_column": "x"}, "--label_column is for sequence-classification and masked-lm"),
        ("causal-lm", {"num_virtual_tokens": 3}, "--num_virtual_tokens is for prompt-tuning"),
        ("causal-lm", {"method": "bitfit", "use_dora": True}, "--use_dora is for lora"),
        ("causal-lm", {"method": "prompt-tuning", "prompt_init": "TEXT"}, "needs --prompt_init_text"),
        ("causal-lm", {"method": "prompt-tuning", "prompt_init_text": "hello"}, "needs --prompt_init TEXT"),
        ("causal-lm", {"prompt_learning_rate": 1.0}, "beside another method"),
        ("causal-lm", {"train_file": None}, "neither is given"),
        ("causal-lm", {"dataset": "x/y"}, "both are given"),
        ("causal-lm", {"test_split": "test"}, "needs --dataset"),
        ("causal-lm", {"separator": "||"}, "belong together"),
        ("causal-lm", {"packing": True, "group_by_length": True}, "both save padding"),
        ("causal-lm", {"template": "{x} {mask}"}, "is for --task masked-lm"),
        ("masked-lm", {"template": None}, "needs a --template"),
        ("masked-lm", {"template": "{x} lives"}, "needs one {mask}"),
        ("masked-lm", {"template": "{x} {mask"}, "write {{ and }} for braces"),
        ("masked-lm", {"method": "p-tuning", "prompt_template": "{P:2} {mask} {x}"}, "two texts for one row"),
        ("masked-lm", {"method": "p-tuning", "prompt_template": "{P:2} {x}", "template": None}, "needs {mask}"),
        ("masked-lm", {"method": "p-tuning", "prompt_template": "{x} {mask}", "template": None}, "virtual tokens"),
        ("causal-lm", {"method": "p-tuning", "prompt_template": "{P:2} {mask} {x}"}, "is for masked-lm"),
        ("masked-lm", {"label_words": "yes"}, "label=word"),
        ("sequence-classification", {"regression": True, "labels": "a,b"}, "leave --labels"),
        ("sequence-classification", {"keep_best": True}, "--validation_file"),
        ("sequence-classification", {"early_stopping_patience": 1}, "--validation_file"),
        ("sequence-classification", {"lr_warmup_steps": 9}, "never be reached"),
        ("sequence-classification", {"overwrite": True, "resume_from_checkpoint": "latest"}, "give one of them"),
        ("sequence-classification", {"optimizer": "schedule-free-adamw"}, "needs no --lr_scheduler linear"),
        ("sequence-classification", {"optimizer": "prodigy", "head_learning_rate": 0.1}, "one learning rate"),
        ("sequence-classification", {"rank": 99999}, "r=99999"),
        ("sequence-classification", {"target_modules": "[("}, "not a valid regular expression"),
        ("question-answering", {"doc_stride": 64, "max_length": 64}, "must be below"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(
    make_text_config: Make, task: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(make_text_config(task, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "row", "changes", "error", "message"),
    [
        ("sequence-classification", {"premise": "a", "label": "yes"}, {}, ConfigError, "--text_column"),
        ("sequence-classification", {"text": "a", "label": "yes"}, {"label_column": "lable"}, ConfigError, "lable"),
        ("sequence-classification", {"text": "", "label": "yes"}, {}, DatasetError, "line 1"),
        ("sequence-classification", {"text": "a"}, {}, ConfigError, "--label_column"),
        ("causal-lm", {"x": "a"}, {}, ConfigError, "--prompt_column"),
        ("causal-lm", {"x": "a"}, {"template": "only words"}, ConfigError, "without the answer"),
        ("causal-lm", {"text": "sky " * 300}, {}, DatasetError, "longer than 128 tokens"),
        ("causal-lm", {"text": "sky sky"}, {"max_length": 999}, ConfigError, "more than the model takes, 128"),
        ("causal-lm", {"text": "sky sky"}, {"method": "prompt-tuning", "max_length": 20}, ConfigError, "leave 0"),
        ("masked-lm", {"x": "Anna", "place": "Paris Rome"}, {}, DatasetError, "not one token"),
        ("masked-lm", {"x": "Anna", "place": "Paris"}, {"template": "{y} {mask}"}, ConfigError, "'y'"),
        ("token-classification", {"tokens": ["a"], "tags": ["O", "O"]}, {}, DatasetError, "another number of tags"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(
    make_text_config: Make, tmp_path: Path, task: str, row: dict[str, Any], changes: dict[str, Any], error: Any,
    message: str,
) -> None:  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(error) as caught:
        train(make_text_config(task, train_file=str(file), **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_bad_rows_may_be_skipped_and_are_counted(make_text_config: Make, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = [{"text": "blue", "label": "yes"}, {"text": "green", "label": "no"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in good) + '{"text": "cut\n')
    config = make_text_config(train_file=str(file), on_bad="skip")
    train(config)
    assert any(
        "1 row skipped: is no JSON" in event["message"]
        for event in read_events(Path(config.output_dir) / "events.jsonl")
        if event["event"] == "warning"
    )


def test_models_that_are_not_there_or_of_another_kind(
    make_text_config: Make, text_folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in ((str(tmp_path / "nowhere"), "no model folder"), (str(tmp_path / "empty"), "no config.json")):
        with pytest.raises(ModelNotFoundError, match=message):
            train(make_text_config(pretrained_model_name_or_path=name))
    with pytest.raises(ConfigError, match="no t5 model for --task causal-lm"):
        train(make_text_config("causal-lm", pretrained_model_name_or_path=str(text_folders["t5"])))
    with pytest.raises(ConfigError, match="no gpt2 model for --task masked-lm"):
        train(make_text_config("masked-lm", pretrained_model_name_or_path=str(text_folders["gpt2"])))
    assert not (tmp_path / "run").exists()
