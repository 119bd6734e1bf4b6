"""`ld.plan`: the plan of a step is what the step takes, and planning leaves nothing behind."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import lora_diffusion as ld
from lora_diffusion.errors import ConfigError
from lora_diffusion.planning.live_bytes import LiveBytes
from lora_diffusion.planning.plan import _adopt_gradient, checkpoint_activations, state_sizes
from tests.conftest import build_tiny_unet

SHAPES = {"sample": (2, 4, 16, 16), "encoder_hidden_states": (2, 77, 32)}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "attention": ({}, False),
    "checkpointed": ({}, True),
    "dropout": ({"lora_dropout": 0.1}, True),
    "DoRA": ({"use_dora": True}, False),
    "convolutions": ({"target_modules": ["conv1", "conv2", "to_q"]}, False),
    "all linear layers": ({"target_modules": "all-linear", "r": 16}, True),
}


def inputs() -> dict[str, Any]:
    return {**SHAPES, "timestep": torch.zeros(2, dtype=torch.int64, device="meta")}


def counted(config: ld.LoraConfig, checkpointed: bool) -> LiveBytes:
    """One real step, counted."""
    unet = build_tiny_unet()
    ld.add_adapter(unet, config)
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    unet.train()
    if checkpointed:
        checkpoint_activations(unet)
    arguments = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    with LiveBytes() as live:
        live.reserve(state_sizes(learned, "adamw"), "optimizer")
        for parameter in unet.parameters():
            live.adopt(parameter, "adapters" if parameter.requires_grad else "weights")
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(_adopt_gradient, live))
        for tensor in arguments.values():
            live.adopt(tensor, "activations")
        said = unet(**arguments, timestep=torch.zeros(2, dtype=torch.int64))[0]
        said.float().square().mean().backward()
    return live


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_what_a_step_takes(case: str) -> None:
    settings, checkpointed = CASES[case]
    config = ld.LoraConfig(**{"r": 4, **settings})
    plan = ld.plan(build_tiny_unet(), config, inputs(), gradient_checkpointing=checkpointed, device="cpu")
    live = counted(config, checkpointed)
    assert 0.99 <= plan.peak / live.peak <= 1.02
    assert plan.parts["weights"] == live.at_peak["weights"]
    assert plan.parts["adapters"] == live.at_peak["adapters"]
    assert plan.parts["optimizer"] == live.at_peak["optimizer"]
    assert abs(plan.parts["gradients"] - live.at_peak.get("gradients", 0)) <= 0.01 * live.peak


def test_checkpointing_and_half_precision_take_less() -> None:
    make = partial(ld.plan, build_tiny_unet(), ld.LoraConfig(r=4), inputs(), device="cpu")
    plain, half = make(), make(dtype=torch.float16)
    assert make(gradient_checkpointing=True).parts["activations"] < 0.7 * plain.parts["activations"]
    assert half.parts["weights"] * 2 == plain.parts["weights"]
    assert half.parts["adapters"] == plain.parts["adapters"]  # fp32 whatever the base is


def test_planning_changes_nothing() -> None:
    unet = build_tiny_unet().train()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    classes = [type(module) for module in unet.modules()]
    state = torch.get_rng_state()
    ld.plan(unet, ld.LoraConfig(r=4, lora_dropout=0.1), inputs(), gradient_checkpointing=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(module) for module in unet.modules()] == classes and unet.training
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in unet.parameters())


def test_a_model_on_the_meta_device_needs_no_memory() -> None:
    with torch.device("meta"):
        unet = build_tiny_unet()
    on_meta = ld.plan(unet, ld.LoraConfig(r=4), inputs(), device="cpu")
    assert on_meta == ld.plan(build_tiny_unet(), ld.LoraConfig(r=4), inputs(), device="cpu")
    assert all(parameter.is_meta for parameter in unet.parameters())


def test_an_adapter_that_is_there_needs_no_config() -> None:
    unet = build_tiny_unet()
    given = ld.plan(unet, ld.LoraConfig(r=4), inputs(), device="cpu")
    ld.add_adapter(unet, ld.LoraConfig(r=4))
    assert ld.plan(unet, inputs=inputs(), device="cpu") == given


def test_on_cuda_blocks_are_rounded_and_segments_reserved() -> None:
    on_cpu = ld.plan(build_tiny_unet(), ld.LoraConfig(r=4), inputs(), device="cpu")
    on_gpu = ld.plan(build_tiny_unet(), ld.LoraConfig(r=4), inputs())
    assert on_gpu.peak == sum(on_gpu.parts.values())
    assert on_gpu.peak > on_cpu.peak and on_gpu.reserved >= on_gpu.peak and on_gpu.reserved % 2**21 == 0


@pytest.mark.parametrize("scheme", ["nf4", "int8", "fp8"])
def test_a_base_in_fewer_bits(scheme: str) -> None:
    make = partial(ld.plan, build_tiny_unet(), ld.LoraConfig(r=4), inputs(), dtype=torch.float16, device="cpu")
    plain, stored = make(), make(quantize=scheme)
    assert 0.4 * plain.parts["weights"] < stored.parts["weights"] < 0.65 * plain.parts["weights"]
    assert stored.parts["adapters"] == plain.parts["adapters"]


def test_without_training_there_is_neither_gradient_nor_state() -> None:
    plan = ld.plan(build_tiny_unet(), ld.LoraConfig(r=4), inputs(), train=False, device="cpu")
    assert plan.parts["gradients"] == plan.parts["optimizer"] == 0
    assert plan.parts["weights"] > 0


def test_a_language_model_is_planned_by_its_own_loss() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=1000, n_positions=64))
    ids = torch.zeros(2, 32, dtype=torch.int64)
    plan = ld.plan(model, ld.LoraConfig(r=4), {"input_ids": ids, "labels": ids}, device="cpu")
    logits = 2 * 32 * 1000 * 4
    assert plan.parts["activations"] > 2 * logits


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "tpu"}, "device='tpu'"),
        ({"optimizer": "sgdd"}, "optimizer='sgdd'"),
        ({"quantize": "int4"}, "quantize='int4'"),
        ({"config": None}, "nothing would be trained"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: str) -> None:
    unet = build_tiny_unet().requires_grad_(False)
    arguments = {"config": ld.LoraConfig(r=4), "inputs": inputs(), **changes}
    with pytest.raises(ConfigError, match=words):
        ld.plan(unet, **arguments)


def test_checkpointing_has_to_be_there() -> None:
    with pytest.raises(ConfigError, match="has no way to switch it on"):
        ld.plan(nn.Sequential(nn.Linear(4, 4)), ld.LoraConfig(target_modules="0"), {"input": (1, 4)},
                gradient_checkpointing=True)  # fmt: skip
