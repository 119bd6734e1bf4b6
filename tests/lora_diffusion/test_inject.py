"""Adding, reading out, overwriting and removing adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_diffusion as ld

Run = Callable[..., Any]


def test_no_effect_at_initialisation(tiny_pipeline: Any, unet_output: Run, text_output: Run) -> None:
    """Bit for bit, in every component."""
    unet, text = unet_output(tiny_pipeline.unet), text_output(tiny_pipeline.text_encoder)
    ld.add_adapter(tiny_pipeline, ld.LoraConfig(), components=["unet", "text_encoder"])
    assert torch.equal(unet_output(tiny_pipeline.unet), unet)
    assert torch.equal(text_output(tiny_pipeline.text_encoder), text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unload_gives_the_base_back(
    tiny_pipeline: Any, unet_output: Run, randomise: Run, bits: Run, dtype: torch.dtype
) -> None:
    """Classes, state_dict names, bits, requires_grad: as if nothing had been there."""
    unet = tiny_pipeline.unet.to(dtype)
    before, classes = bits(unet), [type(module) for module in unet.modules()]
    wants = [parameter.requires_grad for parameter in unet.parameters()]
    output = unet_output(unet, dtype)
    for name in ("one", "two"):
        ld.add_adapter(unet, ld.LoraConfig(r=3), name)
        randomise(unet, name)
    assert set(before) < set(unet.state_dict())
    assert not torch.equal(unet_output(unet, dtype), output)
    ld.unload(unet)
    assert bits(unet) == before
    assert [type(module) for module in unet.modules()] == classes
    assert [parameter.requires_grad for parameter in unet.parameters()] == wants
    assert torch.equal(unet_output(unet, dtype), output)
    assert not hasattr(unet, "_lora_diffusion")


def test_base_names_stay_and_base_state_dict_loads(toy: nn.Module) -> None:
    state = {key: value.clone() for key, value in toy.state_dict().items()}
    ld.add_adapter(toy, ld.LoraConfig())
    extra = set(toy.state_dict()) - set(state)
    assert extra == {f"attn.{p}.adapter_default.lora_{f}" for p in ("to_q", "to_v") for f in "AB"}
    result = toy.load_state_dict(state, strict=False)
    assert not result.unexpected_keys


def test_only_the_adapter_learns(tiny_pipeline: Any, unet_output: Run, bits: Run) -> None:
    """A few optimiser steps over all parameters that want gradients leave the base's bits alone."""
    unet = tiny_pipeline.unet
    before = bits(unet)
    ld.add_adapter(unet, ld.LoraConfig(r=2))
    unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        unet_output(unet).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in ld.adapter_parameters(unet)["unet"])
    assert all(low_rank.b.any() for low_rank in ld.get_adapter(unet).components["unet"].values())
    ld.unload(unet)
    assert bits(unet) == before


def test_one_name_two_configs(tiny_pipeline: Any) -> None:
    """UNet and text encoder under one adapter name, each with its own rank; other components are left alone."""
    layers = ld.add_adapter(tiny_pipeline, {"unet": ld.LoraConfig(r=4), "text_encoder": ld.LoraConfig(r=2)}, "dog")
    assert {component: len(paths) for component, paths in layers.items()} == {"unet": 32, "text_encoder": 8}
    parameters = ld.adapter_parameters(tiny_pipeline, "dog")
    assert {c: (len(p), p[0].shape[0]) for c, p in parameters.items()} == {"unet": (64, 4), "text_encoder": (16, 2)}
    assert ld.list_adapters(tiny_pipeline) == {"dog": ["unet", "text_encoder"]}


def test_a_pipelines_default_is_its_unet(tiny_pipeline: Any) -> None:
    assert list(ld.add_adapter(tiny_pipeline, ld.LoraConfig())) == ["unet"]


def test_delete_one_of_two(tiny_pipeline: Any, unet_output: Run, randomise: Run) -> None:
    """The other one stays in effect; where only the deleted one was, the layer is an ordinary one again."""
    unet = tiny_pipeline.unet
    ld.add_adapter(unet, ld.LoraConfig(r=2, target_modules=["to_q"]), "small")
    randomise(unet, "small")
    alone = unet_output(unet)
    ld.add_adapter(unet, ld.LoraConfig(r=2, target_modules=["to_q", "to_k"]), "large")
    randomise(unet, "large")
    ld.delete_adapter(unet, "large")
    assert torch.equal(unet_output(unet), alone)
    assert list(ld.active_adapters(unet)) == ["small"]
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert type(attention.to_k) is nn.Linear
    assert type(attention.to_q) is not nn.Linear


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "a\nb", " a", "x" * 200, 3, None])
def test_unusable_names(toy: nn.Module, name: Any) -> None:
    with pytest.raises(ld.ConfigError, match="adapter name"):
        ld.add_adapter(toy, ld.LoraConfig(), name)


@pytest.mark.parametrize("name", ["train", "type", "half", "weight", "forward", "lora_A", "犬"])
def test_names_that_are_also_attributes_are_fine(toy: nn.Module, name: str) -> None:
    ld.add_adapter(toy, ld.LoraConfig(), name)
    toy.half().float()
    assert list(ld.list_adapters(toy)) == [name]


def test_duplicate_and_unknown_names(toy: nn.Module) -> None:
    with pytest.raises(ld.ConfigError, match="there is none"):
        ld.delete_adapter(toy, "dog")
    ld.add_adapter(toy, ld.LoraConfig(), "dog")
    with pytest.raises(ld.ConfigError, match="'dog' is there already"):
        ld.add_adapter(toy, ld.LoraConfig(), "dog")
    for call in (ld.delete_adapter, ld.set_adapters, ld.get_adapter, ld.adapter_parameters):
        with pytest.raises(ld.ConfigError, match=r"no adapter 'cat'; there are 'dog'"):
            call(toy, "cat")


def test_a_failed_add_leaves_nothing_behind(tiny_pipeline: Any, bits: Run) -> None:
    """The second component does not match; the first one must not be changed."""
    before = bits(tiny_pipeline.unet)
    with pytest.raises(ld.AdapterMismatchError, match="nearest"):
        ld.add_adapter(
            tiny_pipeline, {"unet": ld.LoraConfig(), "text_encoder": ld.LoraConfig(target_modules=["q_prj"])}
        )
    assert bits(tiny_pipeline.unet) == before
    assert ld.list_adapters(tiny_pipeline) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config": ld.LoraConfig(), "components": ["vae"]}, "no component 'vae'; it has unet, text_encoder"),
        ({"config": ld.LoraConfig(), "components": []}, "empty"),
        ({"config": {"unet": ld.LoraConfig()}, "components": ["text_encoder"]}, "differ"),
        ({"config": {}}, "config is empty"),
        ({"config": {"r": 4}}, "give a LoraConfig"),
        ({"config": ld.LoraConfig(rank_pattern={"to_qq": 3})}, "rank_pattern: 'to_qq' fits no targeted module"),
        ({"config": ld.LoraConfig(), "dtype": torch.int8}, "floating-point"),
    ],
)
def test_misuse_in_one_line(tiny_pipeline: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ld.LoraDiffusionError, match=words) as caught:
        ld.add_adapter(tiny_pipeline, **arguments)
    assert "\n" not in str(caught.value)


def test_a_target_that_is_no_model() -> None:
    with pytest.raises(ld.ConfigError, match="target is a str"):
        ld.add_adapter("unet", ld.LoraConfig())


def test_get_adapter_returns_copies(toy: nn.Module) -> None:
    ld.add_adapter(toy, ld.LoraConfig(r=2, lora_alpha=6))
    adapter = ld.get_adapter(toy)
    low_rank = adapter.components["model"]["attn.to_q"]
    assert (low_rank.rank, low_rank.scale, low_rank.alpha) == (2, 3.0, 6.0)
    low_rank.a.zero_()
    assert ld.adapter_parameters(toy)["model"][0].any()


def test_put_adapter_restores_exactly(tiny_pipeline: Any, randomise: Run) -> None:
    """What a resumed run needs: the very bits back, into the very parameters that the optimiser holds."""
    config = {"unet": ld.LoraConfig(r=3, lora_alpha=7), "text_encoder": ld.LoraConfig(r=2)}
    ld.add_adapter(tiny_pipeline, config)
    randomise(tiny_pipeline)
    saved = {key: value.clone() for key, value in ld.get_adapter(tiny_pipeline).flat().items()}
    held = [p for part in ld.adapter_parameters(tiny_pipeline).values() for p in part]
    randomise(tiny_pipeline, seed=99)
    ld.put_adapter(tiny_pipeline, saved)
    now = ld.get_adapter(tiny_pipeline).flat()
    assert all(torch.equal(now[key], value) for key, value in saved.items())
    assert all(
        a is b for a, b in zip(held, (p for part in ld.adapter_parameters(tiny_pipeline).values() for p in part))
    )


def test_put_adapter_refuses_what_does_not_fit(toy: nn.Module) -> None:
    ld.add_adapter(toy, ld.LoraConfig(r=2))
    before = ld.get_adapter(toy).flat()
    with pytest.raises(ld.AdapterFormatError, match="1 missing"):
        ld.put_adapter(toy, dict(list(before.items())[1:]))
    with pytest.raises(ld.AdapterMismatchError, match="another shape"):
        ld.put_adapter(toy, {key: value[:1] for key, value in before.items()})
    other = copy.deepcopy(toy)
    ld.unload(other)
    ld.add_adapter(other, ld.LoraConfig(r=2, lora_alpha=1))
    with pytest.raises(ld.AdapterMismatchError, match="alphas differ"):
        ld.put_adapter(toy, ld.get_adapter(other))
    assert all(torch.equal(value, before[key]) for key, value in ld.get_adapter(toy).flat().items())


def test_compiled_and_parallel_wrappers_are_looked_through(toy: nn.Module) -> None:
    ld.add_adapter(torch.compile(toy, backend="eager"), ld.LoraConfig(), "a")
    ld.add_adapter(nn.DataParallel(toy), ld.LoraConfig(), "b")
    assert list(ld.list_adapters(toy)) == ["a", "b"]
