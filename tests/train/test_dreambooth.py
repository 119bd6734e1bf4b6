"""Whole runs on the tiny pipeline: what they leave on disk, and what each setting does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import lora_diffusion as ld
from lora_diffusion import ConfigError, DatasetError, TrainingError
from train.dreambooth import resolve, train
from train.dreambooth_config import DreamBoothConfig
from train.dreambooth_learn import BatchLoss, build_learner, text_states
from train.images import list_images
from train.models import load_pipeline
from train.pictures import read_settings
from train.record import read_events
from train.sampling import generate

Make = Callable[..., DreamBoothConfig]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return ld.read_adapter(path).flat()


def test_a_run_leaves_what_the_design_says(make_config: Make) -> None:
    events: list[dict[str, Any]] = []
    config = make_config(
        checkpointing_steps=2, checkpoints_total_limit=1, validation_prompt="sks", num_validation_images=2,
        validation_steps=3, validation_inference_steps=2,
    )  # fmt: skip
    result = train(config, on_event=events.append)
    folder = result.output_dir
    assert result.steps == 4 and not result.stopped and result.adapter == folder / "adapter.safetensors"
    assert result.seconds >= result.seconds_training > 0 and result.peak_memory_bytes > 10**6
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "adapter.safetensors", "checkpoints", "config.json", "events.jsonl", "samples",
    }  # fmt: skip
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-4"]
    saved = json.loads((folder / "config.json").read_text())
    assert saved["resolution"] == 32 and saved["lora_alpha"] == 8 and saved["mixed_precision"] in ("no", "fp16", "bf16")
    assert read_events(folder / "events.jsonl") == events
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start" and kinds[-1] == "end" and kinds.count("step") == 4 and kinds.count("checkpoint") == 2
    step = next(event for event in events if event["event"] == "step")
    assert {"step", "loss", "lr", "grad_norm", "speed", "memory"} <= set(step)
    assert [path.name for path in result.samples] == [f"step-{n:06d}-{i}.png" for n in (3, 4) for i in (0, 1)]
    assert read_settings(result.samples[0])["training_step"] == 3
    assert "load_lora_weights" in (folder / "README.md").read_text()
    adapter = ld.read_adapter(result.adapter)
    assert adapter.metadata["instance_prompt"] == "a photo of sks dog" and list(adapter.components) == ["unet"]
    assert all(float(layer.b.abs().max()) > 0 for layer in adapter.components["unet"].values())


def test_the_same_settings_give_the_same_bytes(make_config: Make) -> None:
    first = train(make_config("a"))
    second = train(make_config("b", validation_prompt="x", validation_steps=2, num_validation_images=1,
                               validation_inference_steps=2, checkpointing_steps=1))  # fmt: skip
    other = train(make_config("c", seed=4))
    assert first.adapter and second.adapter and other.adapter
    assert first.adapter.read_bytes() == second.adapter.read_bytes() != other.adapter.read_bytes()


def test_prior_preservation_draws_what_is_missing(make_config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    config = make_config(
        with_prior_preservation=True, class_prompt="a photo of a dog", class_data_dir=str(folder), num_class_images=3,
        sample_batch_size=2, prior_generation_steps=2, max_train_steps=2,
    )  # fmt: skip
    train(config)
    made = {path.name: path.read_bytes() for path in list_images(folder)}
    assert sorted(made) == ["class_0000.png", "class_0001.png", "class_0002.png"]
    (folder / "class_0001.png").unlink()
    first = train(replace(config, output_dir=str(tmp_path / "again")))
    assert {path.name: path.read_bytes() for path in list_images(folder)} == made
    events = read_events(first.output_dir / "events.jsonl")
    assert [e["total"] for e in events if e.get("what") == "class pictures"] == [1]
    with pytest.raises(ConfigError, match="was drawn for"):
        train(replace(config, output_dir=str(tmp_path / "third"), class_prompt="a photo of a cat"))
    without = train(make_config("without", max_train_steps=2))
    assert first.adapter and without.adapter and first.adapter.read_bytes() != without.adapter.read_bytes()


def test_the_text_encoder_learns_at_its_own_rate(make_config: Make, tiny_pipeline_dir: Path) -> None:
    config = make_config(train_text_encoder=True, text_encoder_lr=2e-4, gradient_checkpointing=True)
    result = train(config)
    assert result.adapter
    adapter = ld.read_adapter(result.adapter)
    assert sorted(adapter.components) == ["text_encoder", "unet"]
    sizes = {
        name: max(float(layer.b.abs().max()) for layer in layers.values())
        for name, layers in adapter.components.items()
    }
    # Adam's first steps are as long as the rate, whatever the gradient.
    assert sizes["unet"] == pytest.approx(4e-3, rel=0.3) and sizes["text_encoder"] == pytest.approx(8e-4, rel=0.3)
    step = next(event for event in read_events(result.output_dir / "events.jsonl") if event["event"] == "step")
    assert step["text_encoder_lr"] == 2e-4 and step["lr"] == 1e-3


def test_gradient_checkpointing_changes_nothing(make_config: Make) -> None:
    plain, saving = train(make_config("a")), train(make_config("b", gradient_checkpointing=True))
    assert plain.adapter and saving.adapter
    for left, right in zip(tensors(plain.adapter).values(), tensors(saving.adapter).values()):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_accumulation_equals_a_bigger_batch(make_config: Make) -> None:
    prior = {
        "with_prior_preservation": True, "class_prompt": "a photo of a dog", "num_class_images": 2,
        "prior_generation_steps": 2, "max_train_steps": 2, "train_text_encoder": True, "adam_epsilon": 1e-3,
    }  # fmt: skip
    big = train(make_config("a", train_batch_size=4, **prior))
    small = train(make_config("b", gradient_accumulation_steps=4, **prior))
    assert big.adapter and small.adapter
    for left, right in zip(tensors(big.adapter).values(), tensors(small.adapter).values()):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_half_precision_base_has_fp32_adapters(make_config: Make, precision: str) -> None:
    result = train(make_config(mixed_precision=precision, max_train_steps=2, snr_gamma=5.0, noise_offset=0.1))
    assert result.adapter and math.isfinite(result.loss)
    assert {tensor.dtype for tensor in tensors(result.adapter).values()} == {torch.float32}


def test_v_prediction_and_its_loss(make_config: Make, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "model")
    changed = train(make_config("v", pretrained_model_name_or_path=str(tmp_path / "model"), snr_gamma=5.0))
    plain = train(make_config("e", snr_gamma=5.0))
    assert changed.adapter and plain.adapter and changed.adapter.read_bytes() != plain.adapter.read_bytes()
    assert changed.loss != pytest.approx(plain.loss, rel=1e-3)


def test_the_loss_falls(make_config: Make) -> None:
    result = train(make_config(max_train_steps=60, learning_rate=3e-3, train_batch_size=2))
    losses = [event["loss"] for event in read_events(result.output_dir / "events.jsonl") if event["event"] == "step"]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_every_default_is_resolved(make_config: Make, tiny_pipeline: Any) -> None:
    config = make_config(max_train_steps=None, num_train_epochs=3, train_batch_size=2, validation_epochs=2)
    full = resolve(config, tiny_pipeline, 5)
    assert (full.max_train_steps, full.validation_steps, full.resolution) == (9, 6, 32)
    assert resolve(replace(config, num_train_epochs=None), tiny_pipeline, 5).max_train_steps == 500
    with pytest.raises(ConfigError, match="nearest is 32"):
        resolve(replace(config, resolution=33), tiny_pipeline, 5)


def test_scale_lr_and_named_targets(make_config: Make, tiny_pipeline: Any) -> None:
    config = make_config(scale_lr=True, train_batch_size=2, gradient_accumulation_steps=3, target_modules="to_q, to_v")
    learner = build_learner(resolve(config, tiny_pipeline, 3), tiny_pipeline, torch.device("cpu"))
    assert learner.learning_rates == {"unet": pytest.approx(6e-3)}
    assert len(learner.parameters) == 2 * 16


def test_a_diverging_rate_keeps_what_was_good(make_config: Make) -> None:
    config = make_config(learning_rate=1e30, max_train_steps=9)
    with pytest.raises(TrainingError, match=r"nan at step 2 .*1e\+30; nothing was learned .*lower --learning_rate"):
        train(config)
    assert not (Path(config.output_dir) / "adapter.safetensors").exists()
    config = make_config("later", lr_scheduler="linear", lr_warmup_steps=9, max_train_steps=9, checkpointing_steps=1,
                         learning_rate=1e-3)  # fmt: skip
    good = train(replace(config, max_train_steps=9))
    assert good.adapter and all(bool(tensor.isfinite().all()) for tensor in tensors(good.adapter).values())


def test_a_loss_that_turns_nan_keeps_the_last_checkpoint(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    original = BatchLoss.__call__

    def spoiled(self: BatchLoss, position: int) -> list[torch.Tensor]:
        return [loss * (math.nan if position == 6 else 1.0) for loss in original(self, position)]

    monkeypatch.setattr(BatchLoss, "__call__", spoiled)
    config = make_config(max_train_steps=20, checkpointing_steps=2)
    with pytest.raises(TrainingError, match=r"nan at step 7 .* kept: the adapter of step 4 "):
        train(config)
    folder = Path(config.output_dir)
    kept = tensors(folder / "adapter.safetensors")
    checkpoint = tensors(folder / "checkpoints" / "step-4" / "adapter.safetensors")
    assert all(torch.equal(kept[name], checkpoint[name]) for name in kept)
    assert read_events(folder / "events.jsonl")[-1]["event"] == "error"


def test_a_layer_without_gradient_is_said(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        BatchLoss, "__call__", lambda self, position: [next(self.unet.parameters()).new_ones((), requires_grad=True)]
    )
    with pytest.raises(TrainingError, match="no layer of the adapter got a gradient"):
        train(make_config())


def test_prompts_too_long_and_pictures_missing(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokens, 77 is the limit"):
        train(make_config(instance_prompt="sks " + "dog " * 40))
    with pytest.raises(DatasetError, match="no folder"):
        train(make_config(instance_data_dir=str(tmp_path / "nowhere")))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_sentence(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.learner import Learner

    def full(self: Learner, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Learner, "save", full)
    with pytest.raises(TrainingError, match="No space left"):
        train(make_config(checkpointing_steps=2))


def test_the_upload(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    class Hub:
        def create_repo(self, name: str, exist_ok: bool) -> Any:
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **values: Any) -> None:
            sent.update(values)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    result = train(make_config(max_train_steps=1, push_to_hub=True))
    assert sent["repo_id"] == "me/run" and "adapter.safetensors" in sent["allow_patterns"]
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: None)
    with pytest.raises(TrainingError, match=r"upload failed .* the adapter is in"):
        train(make_config("again", max_train_steps=1, push_to_hub=True))
    assert result.adapter and (result.output_dir.parent / "again" / "adapter.safetensors").is_file()


def test_out_of_memory_says_what_to_try(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(self: BatchLoss, position: int) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BatchLoss, "__call__", greedy)
    with pytest.raises(TrainingError, match="--gradient_checkpointing"):
        train(make_config())


def test_the_saved_file_draws_the_same_in_diffusers(make_config: Make, tiny_pipeline_dir: Path) -> None:
    config = make_config(train_text_encoder=True, learning_rate=2e-2, text_encoder_lr=2e-2, lora_alpha=16.0)
    result = train(config)
    assert result.adapter
    ours = load_pipeline(str(tiny_pipeline_dir))
    base = generate(ours, "sks dog", [1, 2, 3], steps=5)
    ld.load_adapter(ours, result.adapter)
    theirs = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(str(result.output_dir), weight_name="adapter.safetensors")
    left, right, plain = (
        np.stack([np.asarray(image, dtype=int) for image in images])
        for images in (
            generate(ours, "sks dog", [1, 2, 3], steps=5),
            generate(theirs, "sks dog", [1, 2, 3], steps=5),
            base,
        )
    )
    assert np.abs(left - right).max() <= 1
    assert np.abs(left - plain).max() > 8


def test_every_row_gets_the_states_of_its_own_prompt(make_config: Make, tiny_pipeline: Any) -> None:
    config = make_config(with_prior_preservation=True, class_prompt="a photo of a dog")
    texts = text_states(config, tiny_pipeline)
    rows = [config.instance_prompt, "a photo of a dog", config.instance_prompt]
    fresh = texts.states(rows)["encoder_hidden_states"]
    assert torch.equal(fresh[0], fresh[2]) and not torch.equal(fresh[0], fresh[1])
    texts.cache()
    torch.testing.assert_close(texts.states(rows)["encoder_hidden_states"], fresh, rtol=1e-5, atol=1e-6)
