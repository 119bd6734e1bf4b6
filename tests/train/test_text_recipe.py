"""Whole text runs on tiny models: what they leave on disk, what each task, method and setting does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lora_diffusion as ld
from lora_diffusion import ConfigError, ModelNotFoundError, TrainingError
from train.record import read_events
from train.text import train
from train.text_config import METHODS, TextConfig
from train.text_data import evaluate
from train.text_learn import BatchLoss
from train.text_models import load_config, load_text_model, load_tokenizer
from train.text_parts import read_parts
from train.text_task_names import TASK_TYPES

Make = Callable[..., TextConfig]


def events_of(config: TextConfig, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(Path(config.output_dir) / "events.jsonl") if event["event"] == kind]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return ld.read_adapter(path).flat()


def loaded(config: TextConfig, file: str = "adapter.safetensors") -> tuple[Any, Any]:
    """A fresh model with the adapter of a run, and the run's rows."""
    name = config.pretrained_model_name_or_path
    parts = read_parts(config, load_tokenizer(name), load_config(name))
    model, _ = load_text_model(name, parts.task.model_class, parts.task.model_settings(), seed=99)
    ld.load_adapter(model, Path(config.output_dir) / file, "default")
    return model, parts


def test_a_run_leaves_what_the_design_says(make_text_config: Make, text_files: dict[str, Path]) -> None:
    events: list[dict[str, Any]] = []
    rows = str(text_files["pairs"])
    config = make_text_config(
        checkpointing_steps=2, checkpoints_total_limit=1, validation_file=rows, validation_steps=2, test_file=rows,
        keep_best=True, plan=True,
    )  # fmt: skip
    result = train(config, on_event=events.append)
    folder = result.output_dir
    assert result.steps == 4 and not result.stopped and result.adapter == folder / "adapter.safetensors"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "adapter.safetensors", "best.safetensors", "checkpoints", "config.json", "events.jsonl",
        "metrics.json", "peft",
    }  # fmt: skip
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-4"]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start" and kinds[-1] == "end" and kinds.count("step") == 4 and kinds.count("plan") == 1
    assert [e["step"] for e in events if e["event"] == "metrics" and e["part"] == "validation"] == [2, 4]
    assert events_of(config, "preview")[0]["rows"][0].startswith("[CLS] anna lives in paris. [SEP]")
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["test"] == result.figures["test"] and 0 <= figures["test"]["accuracy"] <= 1
    card = (folder / "README.md").read_text()
    assert "sequence-classification" in card and str(folder) not in card and "accuracy" in card
    metadata = ld.read_adapter(folder / "adapter.safetensors").metadata
    assert metadata["base_model"] == "bert" and metadata["method"] == "lora" and metadata["steps"] == 4
    resolved = json.loads((folder / "config.json").read_text())
    assert resolved["lora_alpha"] == 8.0 and resolved["validation_steps"] == 2


@pytest.mark.parametrize("task", TASK_TYPES)
def test_every_task_learns(make_text_config: Make, text_files: dict[str, Path], task: str) -> None:
    """The loss falls; the file in a fresh model gives the run's own figures."""
    config = make_text_config(task, max_train_steps=30, learning_rate=1e-2, lr_scheduler="constant")
    if task == "sequence-classification":
        config = replace(config, train_file=str(text_files["labels"]))
    config = replace(config, test_file=config.train_file)
    result = train(config)
    losses = [event["loss"] for event in events_of(config, "step")]
    assert sum(losses[-10:]) < sum(losses[:10])
    model, parts = loaded(config)
    again = evaluate(model, parts.task, parts.test.examples, batch_size=2)
    assert again == pytest.approx(result.figures["test"], abs=2e-5)


TOKENS = {"num_virtual_tokens": 3}
OWN = {"prompt-tuning": TOKENS, "p-tuning": TOKENS, "prefix-tuning": TOKENS, "pre-layer": TOKENS,
       "top-layers": {"top_layers": 1}, "houlsby": {"bottleneck_size": 4}, "pfeiffer": {"bottleneck_size": 4},
       "lin": {"bottleneck_size": 4, "leave_out": 1}, "lora+p-tuning": TOKENS, "lora+houlsby": {"bottleneck_size": 4},
       "lora+prefix-tuning": TOKENS, "full+prompt-tuning": TOKENS}  # fmt: skip


@pytest.mark.parametrize("method", [*METHODS, *(name for name in OWN if "+" in name)])
def test_every_method_learns_what_it_should(make_text_config: Make, method: str) -> None:
    """The base is not in the file; the file in a fresh model gives the run's own figures."""
    config = make_text_config(method=method, learning_rate=None, **OWN.get(method, {}))
    config = replace(config, test_file=config.train_file)
    result = train(config)
    start = events_of(config, "start")[0]
    share = start["learned_parameters"] / start["model_parameters"]
    assert share == 1.0 if method == "full" else share > 0.01
    assert not events_of(config, "warning")
    adapter = ld.read_adapter(Path(config.output_dir) / "adapter.safetensors")
    whole = method.startswith("full")
    assert sorted(adapter.copies.get("model", {})) == ([] if whole else ["bert.pooler.dense", "classifier"])
    model, parts = loaded(config)
    again = evaluate(model, parts.task, parts.test.examples, batch_size=2)
    assert again == pytest.approx(result.figures["test"], abs=2e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["prompt-tuning", "p-tuning", "prefix-tuning", "pre-layer", "bitfit", "houlsby"])
def test_methods_on_decoders(make_text_config: Make, text_folders: dict[str, Path], family: str, method: str) -> None:
    if (family, method) == ("llama", "bitfit"):
        with pytest.raises(ld.AdapterMismatchError, match="no biases"):
            train(
                make_text_config("causal-lm", pretrained_model_name_or_path=str(text_folders["llama"]), method="bitfit")
            )
        return
    config = make_text_config(
        "causal-lm", pretrained_model_name_or_path=str(text_folders[family]), method=method, learning_rate=None,
        max_train_steps=2, **OWN.get(method, {}),
    )  # fmt: skip
    config = replace(config, test_file=config.train_file)
    result = train(config)
    model, parts = loaded(config)
    again = evaluate(model, parts.task, parts.test.examples, batch_size=2)
    assert again == pytest.approx(result.figures["test"], abs=2e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "roberta", "deberta"])
@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
def test_classification_by_other_families(
    make_text_config: Make, text_folders: dict[str, Path], family: str, task: str
) -> None:
    """A head of their own is learned along, and found again in the file."""
    config = make_text_config(task, pretrained_model_name_or_path=str(text_folders[family]), max_train_steps=2)
    config = replace(config, test_file=config.train_file)
    result = train(config)
    model, parts = loaded(config)
    again = evaluate(model, parts.task, parts.test.examples, batch_size=2)
    assert again == pytest.approx(result.figures["test"], abs=2e-5)


def test_p_tuning_with_virtual_tokens_anywhere(make_text_config: Make) -> None:
    for number, template in enumerate(("(2,1,2)", "{P:2} {x} lives in {P} {mask} .")):
        config = make_text_config(
            "masked-lm", f"run{number}", template=None, method="p-tuning", prompt_template=template,
            max_train_steps=60, learning_rate=1e-2,
        )  # fmt: skip
        config = replace(config, test_file=config.train_file)
        result = train(config)
        row = events_of(config, "preview")[0]["rows"][0]
        assert "[V0][V1]" in row and "«[MASK]»" in row
        losses = [event["loss"] for event in events_of(config, "step")]
        assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
        model, parts = loaded(config)
        again = evaluate(model, parts.task, parts.test.examples, batch_size=2)
        assert again == pytest.approx(result.figures["test"], abs=2e-5)
    assert any("PEFT can only put them in front" in event["message"] for event in events_of(config, "note"))


def test_accumulation_equals_a_bigger_batch(make_text_config: Make, text_folders: dict[str, Path]) -> None:
    """The loss of a step is the mean over all its tokens, however they are grouped."""
    llama = str(text_folders["llama"])
    big = make_text_config(
        "causal-lm", "big", pretrained_model_name_or_path=llama, train_batch_size=6, adam_epsilon=1e-4
    )
    small = replace(big, output_dir=big.output_dir + "2", train_batch_size=2, gradient_accumulation_steps=3)
    first, second = train(big), train(small)
    assert first.adapter and second.adapter
    losses = [[e["loss"] for e in events_of(config, "step")] for config in (big, small)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for left, right in zip(tensors(first.adapter).values(), tensors(second.adapter).values()):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(make_text_config: Make) -> None:
    plain = make_text_config("causal-lm", "a", method="lora+p-tuning", num_virtual_tokens=2)
    saving = replace(plain, output_dir=plain.output_dir + "2", gradient_checkpointing=True)
    first, second = train(plain), train(saving)
    assert first.adapter and second.adapter
    for left, right in zip(tensors(first.adapter).values(), tensors(second.adapter).values()):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "p-tuning", "prefix-tuning", "pfeiffer"])
def test_half_precision_learns_in_fp32(make_text_config: Make, method: str) -> None:
    config = make_text_config(method=method, mixed_precision="bf16", **OWN.get(method, {}))
    config = replace(config, test_file=config.train_file)
    result = train(config)
    assert result.adapter and math.isfinite(result.loss)
    assert {tensor.dtype for tensor in tensors(result.adapter).values()} == {torch.float32}


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_base_in_fewer_bits(make_text_config: Make, text_folders: dict[str, Path], mode: str) -> None:
    llama = str(text_folders["llama"])
    config = make_text_config("causal-lm", pretrained_model_name_or_path=llama, quantize=mode, max_train_steps=20,
                              learning_rate=1e-2)  # fmt: skip
    result = train(config)
    assert result.adapter and not events_of(config, "warning")
    losses = [event["loss"] for event in events_of(config, "step")]
    assert sum(losses[-5:]) < sum(losses[:5])
    plain = replace(config, quantize=None, output_dir=config.output_dir + "2")
    train(plain)
    first = [events_of(one, "step")[0]["loss"] for one in (config, plain)]
    assert first[0] == pytest.approx(first[1], rel=0.05) and first[0] != first[1]


def test_gpt2_has_nothing_to_quantise(make_text_config: Make) -> None:
    with pytest.raises(ConfigError, match="no layers that can be stored in fewer bits"):
        train(make_text_config("causal-lm", quantize="int8"))


def test_packing_and_length_groups(make_text_config: Make) -> None:
    packed = make_text_config("causal-lm", "packed", packing=True, max_length=40, max_train_steps=3)
    train(packed)
    assert any("13 rows to learn from share" in event["message"] for event in events_of(packed, "note"))
    grouped = make_text_config("causal-lm", "grouped", group_by_length=True, max_train_steps=3)
    assert train(grouped).steps == 3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_early_stopping_and_the_best_step(make_text_config: Make, method: str) -> None:
    """A rate that is far too high: no validation is better than an early one."""
    config = make_text_config(
        method=method, learning_rate=0.5, lr_scheduler="constant", max_train_steps=40, validation_steps=2,
        keep_best=True, early_stopping_patience=2, metric_for_best="loss",
    )  # fmt: skip
    config = replace(config, validation_file=config.train_file, test_file=config.train_file)
    result = train(config)
    found = {e["step"]: e["figures"]["loss"] for e in events_of(config, "metrics") if e["part"] == "validation"}
    assert not result.stopped and result.steps < 40 and result.steps == max(found)
    assert result.best_step == min(found, key=lambda step: found[step])
    assert result.steps - (result.best_step or 0) == 4
    assert result.figures["test"]["loss"] == pytest.approx(found[result.best_step], abs=1e-5)
    model, parts = loaded(config, "best.safetensors")
    assert evaluate(model, parts.task, parts.test.examples)["loss"] == pytest.approx(found[result.best_step], abs=2e-5)
    again = train(replace(config, resume_from_checkpoint="latest"))
    assert again.steps == result.steps and again.adapter
    with pytest.raises(ConfigError, match="--metric_for_best bleu is no figure"):
        train(replace(config, metric_for_best="bleu", overwrite=True))


def test_written_answers(make_text_config: Make) -> None:
    for task in ("causal-lm", "seq2seq-lm"):
        config = make_text_config(task, task, generate_answers=True, max_new_tokens=3, method="prompt-tuning",
                                  num_virtual_tokens=2)  # fmt: skip
        result = train(replace(config, test_file=config.train_file))
        assert {"bleu", "exact_match", "rougeL"} <= set(result.figures["written"])


def test_a_peft_folder_gives_peft_the_same_logits(make_text_config: Make) -> None:
    from peft import PeftModel

    for method in ("lora", "prompt-tuning", "p-tuning", "prefix-tuning"):
        config = make_text_config("causal-lm", method, method=method, learning_rate=1e-2,
                                  **({} if method == "lora" else TOKENS))  # fmt: skip
        train(config)
        model, parts = loaded(config)
        ids = torch.tensor([parts.train.examples[0].inputs["input_ids"]])
        bare = transformers.AutoModelForCausalLM.from_pretrained(config.pretrained_model_name_or_path).eval()
        theirs = PeftModel.from_pretrained(bare, Path(config.output_dir) / "peft").eval()
        front = 3 if method in ("prompt-tuning", "p-tuning") else 0
        virtual = ld.prompt_ids(model) if front else []
        ids = torch.tensor([[*virtual, *ids[0, front:].tolist()]])
        with torch.no_grad():
            ours = model(input_ids=ids).logits
            expected = theirs(input_ids=ids[:, front:]).logits
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_has_a_head_already(make_text_config: Make, text_folders: dict[str, Path], tmp_path: Path) -> None:
    """Its head is learned on; one of another size is an error."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(text_folders["bert"], num_labels=2)
    base.save_pretrained(tmp_path / "model")
    load_tokenizer(str(text_folders["bert"])).save_pretrained(tmp_path / "model")
    config = make_text_config(pretrained_model_name_or_path=str(tmp_path / "model"))
    train(config)
    assert list(ld.read_adapter(Path(config.output_dir) / "adapter.safetensors").copies["model"]) == ["classifier"]
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        train(replace(config, overwrite=True, labels="entailment,contradiction,neutral"))


def test_a_diverging_rate_and_a_full_disk(make_text_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"nan at step 2 .*; nothing was learned .*lower --learning_rate"):
        train(make_text_config(learning_rate=1e35, lr_scheduler="constant"))
    original = BatchLoss.__call__

    def spoiled(self: BatchLoss, position: int) -> list[torch.Tensor]:
        return [loss * (math.nan if position == 6 else 1.0) for loss in original(self, position)]

    monkeypatch.setattr(BatchLoss, "__call__", spoiled)
    config = make_text_config(name="nan", max_train_steps=20, checkpointing_steps=2)
    with pytest.raises(TrainingError, match=r"nan at step 7 .* kept: the adapter of step 4 "):
        train(config)
    assert events_of(config, "error")

    def greedy(self: BatchLoss, position: int) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BatchLoss, "__call__", greedy)
    with pytest.raises(TrainingError, match="--gradient_checkpointing"):
        train(make_text_config(name="memory"))
