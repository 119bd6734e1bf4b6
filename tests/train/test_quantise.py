"""A base in fewer bits: what is stored how, what it costs in exactness, and whole runs on it."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import lora_diffusion as ld
from lora_diffusion import ConfigError
from lora_diffusion.layers.quantised import full_precision, is_quantised
from tests.conftest import build_tiny_text_encoder, build_tiny_unet
from train import quantise as module
from train.dreambooth import train
from train.dreambooth_config import DreamBoothConfig
from train.models import load_pipeline
from train.quantise import MODES, check_quantize, held_bytes, planned_bytes, quantise
from train.record import read_events
from train.sampling import generate

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

Make = Callable[..., DreamBoothConfig]
ALL = pytest.mark.parametrize("mode", MODES)
KEPT = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")


def unet(mode: str | None = None, precision: torch.dtype = torch.float32) -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = build_tiny_unet().to(precision).eval().requires_grad_(False)
    if mode is not None:
        quantise(model, mode, precision=precision)
    return model


def asked(precision: torch.dtype = torch.float32) -> tuple[Any, ...]:
    torch.manual_seed(1)
    return torch.randn(2, 4, 8, 8).to(precision), torch.tensor([10, 700]), torch.randn(2, 5, 32).to(precision)


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return {name: value.detach().clone().view(torch.uint8) for name, value in state.items() if value.ndim}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in read_events(folder / "events.jsonl") if event["event"] == "step"]


@ALL
def test_what_is_stored_how(mode: str) -> None:
    kinds = {"nf4": ("uint8", "int8"), "int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e4m3fn")}[mode]
    plain, model = unet(), unet(mode)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            wanted = "float32" if path in KEPT else kinds[isinstance(layer, nn.Conv2d)]
            assert str(layer.weight.dtype) == f"torch.{wanted}", path
            assert is_quantised(layer.weight) == (path not in KEPT)
            if path not in KEPT:
                allowed = {"uint8": 0.12, "int8": 0.01, "float8_e4m3fn": 0.03}[wanted]
                assert distance(full_precision(layer), plain.get_submodule(path).weight) < allowed, path
        elif getattr(layer, "weight", None) is not None:
            assert layer.weight.dtype == torch.float32, path
    assert model.dtype == torch.float32


@ALL
def test_text_encoders_keep_their_words(mode: str) -> None:
    encoder = build_tiny_text_encoder().requires_grad_(False)
    assert quantise(encoder, mode, precision=torch.float32) == 12
    assert encoder.get_input_embeddings().weight.dtype == torch.float32 and encoder.dtype == torch.float32


@ALL
@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bytes_are_those_planned(mode: str, precision: torch.dtype) -> None:
    plain, model = unet(precision=precision), unet(mode, precision)
    assert held_bytes(plain) == planned_bytes(plain, None, precision)
    assert held_bytes(model) == planned_bytes(plain, mode, precision) == planned_bytes(unet(), mode, precision)
    with torch.device("meta"):
        assert planned_bytes(build_tiny_unet(), mode, precision) == held_bytes(model)


def test_the_bytes_of_stable_diffusion() -> None:
    """The architecture of Stable Diffusion 1.5, without its weights, in GiB."""
    with torch.device("meta"):
        model = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
    found = {mode: planned_bytes(model, mode, torch.float16) / 2**30 for mode in (None, *MODES)}
    assert found == pytest.approx({None: 1.601, "nf4": 0.682, "int8": 0.804, "fp8": 0.804}, abs=1e-3)


@ALL
def test_the_error_of_the_output(mode: str) -> None:
    with torch.no_grad():
        exact = unet()(*asked()).sample
        error = distance(unet(mode)(*asked()).sample, exact)
        half = distance(unet(mode, torch.bfloat16)(*asked(torch.bfloat16)).sample, exact)
    assert {"nf4": 0.01, "int8": 1e-3, "fp8": 0.005}[mode] < error < {"nf4": 0.2, "int8": 0.04, "fp8": 0.1}[mode]
    assert half < error + 0.03


def kept(model: nn.Module) -> int:
    """Bytes that a training forward keeps for backward, parameters and buffers aside."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(*asked())
    return sum(storage.nbytes() for storage in found.values())


@ALL
def test_backward_keeps_no_more_than_without(mode: str) -> None:
    amounts = []
    for model in (unet(), unet(mode)):
        ld.add_adapter(model, ld.LoraConfig(r=2, target_modules="all-linear"))
        amounts.append(kept(model))
    assert amounts[1] <= amounts[0] * 1.01


@ALL
def test_no_weight_stays_behind(mode: str) -> None:
    model = unet()
    old = [weakref.ref(layer.weight) for _, layer in module._layers(model)]
    assert quantise(model, mode, precision=torch.float32) == len(old) > 50
    assert not any(ref() is not None for ref in old)


@ALL
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_reach_every_layer(mode: str, checkpointing: bool, precision: torch.dtype) -> None:
    """Also after a forward without gradients, before which bitsandbytes would repack NF4 for this processor."""
    model = unet(mode, precision)
    before = stored(model)
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=r".*(to_q|to_v|conv1|ff\.net\.2)", init_lora_weights=False))
    with torch.no_grad():
        model(*asked(precision))
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    model(*asked(precision)).sample.float().square().mean().backward()
    grads = [parameter.grad for parameter in ld.adapter_parameters(model)["unet"]]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads)
    ld.unload(model)
    assert same(stored(model), before)


@ALL
def test_whichever_comes_first(mode: str, tmp_path: Path) -> None:
    """Adapter, then quantised, or the other way: one model, and a file between them and the full one."""
    config = ld.LoraConfig(r=2, target_modules="attention", init_lora_weights=False)
    late, early = unet(), unet(mode)
    names = ld.add_adapter(late, config)["unet"]
    quantise(late, mode, precision=torch.float32)
    ld.save_adapter(late, tmp_path / "a.safetensors")
    ld.load_adapter(early, tmp_path / "a.safetensors", name="default")
    with torch.no_grad():
        torch.testing.assert_close(late(*asked()).sample, early(*asked()).sample)
        twin = copy.deepcopy(early)
        assert torch.equal(twin(*asked()).sample, early(*asked()).sample)
    full = unet()
    report = ld.load_adapter(full, tmp_path / "a.safetensors", name="default")
    assert "other" not in str(report) and len(ld.get_adapter(full).components["unet"]) == len(names)
    ld.unload(late)
    assert same(stored(late), stored(unet(mode)))


def test_a_merged_model_is_not_quantised() -> None:
    model = unet()
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules="attention", init_lora_weights=False))
    ld.merge_adapters(model)
    with pytest.raises(ConfigError, match="merged into these weights"):
        quantise(model, "int8", precision=torch.float32)


@ALL
def test_merging_into_it_is_refused(mode: str) -> None:
    model = unet(mode)
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules="attention", init_lora_weights=False))
    with pytest.raises(ld.AdapterMismatchError, match="quantised"):
        ld.merge_adapters(model)


def test_what_the_machine_cannot_do(monkeypatch: pytest.MonkeyPatch, tiny_pipeline_dir: Path) -> None:
    with pytest.raises(ConfigError, match="--quantize q2: choose from nf4, int8, fp8"):
        check_quantize("q2", "cpu")
    with pytest.raises(ConfigError, match="no fp8 on Apple GPUs"):
        check_quantize("fp8", "mps")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package bitsandbytes"):
        load_pipeline(str(tiny_pipeline_dir), quantize="nf4")
    check_quantize("int8", "cpu")


@ALL
def test_a_run_on_it_learns(make_config: Make, tiny_pipeline_dir: Path, mode: str) -> None:
    config = make_config(quantize=mode, max_train_steps=40, learning_rate=1e-2, target_modules="all-linear", seed=1)
    result = train(config)
    assert result.adapter is not None
    found = losses(result.output_dir)
    assert sum(found[-10:]) < sum(found[:10])
    adapter = ld.read_adapter(result.adapter)
    assert adapter.metadata["settings"]["quantize"] == mode
    assert json.loads((result.output_dir / "config.json").read_text())["quantize"] == mode
    full = load_pipeline(str(tiny_pipeline_dir))
    assert "other" not in str(ld.load_adapter(full, result.adapter))
    assert len(generate(full, "a photo of sks dog", [0], steps=2)) == 1


@pytest.mark.parametrize(("mode", "precision"), [("nf4", "fp16"), ("int8", "bf16"), ("fp8", "no"), ("nf4", "no")])
def test_resumed_byte_by_byte(make_config: Make, mode: str, precision: str) -> None:
    """With pictures drawn in between, which leave the base as it is."""
    settings = {"quantize": mode, "mixed_precision": precision, "checkpointing_steps": 2, "train_text_encoder": True}
    whole = train(make_config("whole", **settings, gradient_checkpointing=True))
    config = make_config(
        "parts", **settings, gradient_checkpointing=True, validation_prompt="sks", validation_steps=1,
        num_validation_images=1, validation_inference_steps=2,
    )  # fmt: skip
    reached: list[int] = []
    stopped = train(
        config,
        on_event=lambda event: reached.append(event["step"]) if event["event"] == "step" else None,
        should_stop=lambda: bool(reached) and reached[-1] >= 2,
    )
    assert stopped.steps == 2
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert whole.adapter is not None and resumed.adapter is not None
    assert resumed.adapter.read_bytes() == whole.adapter.read_bytes()
    with pytest.raises(ConfigError, match="--quantize was"):
        train(replace(config, resume_from_checkpoint="latest", quantize=None))


def test_text_encoders_are_stored_so_where_they_are_trained(tiny_pipeline_dir: Path) -> None:
    for trained in (False, True):
        pipe = load_pipeline(str(tiny_pipeline_dir), quantize="int8", quantize_text_encoders=trained)
        assert any(is_quantised(p) for p in pipe.text_encoder.parameters()) is trained
        assert any(is_quantised(p) for p in pipe.unet.parameters())
        assert not any(is_quantised(p) for p in pipe.vae.parameters())


@pytest.mark.parametrize("mode", ["nf4", "int8", "fp8"])
def test_t5_computes_with_its_stored_weights(mode: str) -> None:
    """T5 casts what goes into `wo` to the dtype of that weight: stored bytes must not become its numbers."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    batch = {"input_ids": torch.arange(1, 13)[None], "decoder_input_ids": torch.arange(1, 7)[None]}
    with torch.no_grad():
        base = model(**batch).logits
        quantise(model, mode, precision=torch.float32)
        stored = model(**batch).logits
    assert (stored - base).norm() < 0.3 * base.norm()
    assert {m.wo.weight.dtype for m in model.modules() if hasattr(m, "wo")} == {torch.int8}
