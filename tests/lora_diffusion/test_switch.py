"""Which adapters act, and how strongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_diffusion as ld

Run = Callable[..., Any]


@pytest.fixture
def two(toy: nn.Module, randomise: Run) -> nn.Module:
    for seed, name in enumerate(("dog", "cat")):
        ld.add_adapter(toy, ld.LoraConfig(r=2 + seed), name)
        randomise(toy, name, seed=seed, std=0.3)
    return toy


def projection(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The output of one adapted layer, which is linear in the adapters."""
    return model.attn["to_q"](x)


def test_several_adapters_add_up_with_their_weights(two: nn.Module) -> None:
    x = torch.randn(3, 8)
    with ld.disable_adapters(two):
        base = projection(two, x)
    effect = {}
    for name in ("dog", "cat"):
        ld.set_adapters(two, name)
        effect[name] = projection(two, x) - base
    ld.set_adapters(two, ["dog", "cat"], [0.7, -0.4])
    wanted = base + 0.7 * effect["dog"] - 0.4 * effect["cat"]
    torch.testing.assert_close(projection(two, x), wanted, rtol=1e-5, atol=1e-6)
    ld.set_adapters(two, ["dog", "cat"], 0.5)
    wanted = base + 0.5 * effect["dog"] + 0.5 * effect["cat"]
    torch.testing.assert_close(projection(two, x), wanted, rtol=1e-5, atol=1e-6)


def test_new_adapters_join_the_active_ones(two: nn.Module) -> None:
    assert ld.active_adapters(two) == {"dog": {"model": 1.0}, "cat": {"model": 1.0}}


def test_no_names_and_weight_zero_are_the_base(two: nn.Module) -> None:
    x = torch.randn(3, 8)
    ld.set_adapters(two, [])
    assert ld.active_adapters(two) == {}
    bare = two(x)
    ld.set_adapters(two, ["dog", "cat"], 0.0)
    assert torch.equal(two(x), bare)
    ld.unload(two)
    assert torch.equal(two(x), bare)


def test_switching_moves_nothing(two: nn.Module) -> None:
    """The same modules and parameters before and after: only numbers change."""
    before = [id(p) for p in two.parameters()] + [id(m) for m in two.modules()]
    ld.set_adapters(two, "cat", 0.3)
    ld.set_adapters(two, ["dog", "cat"], [1.0, 2.0])
    assert [id(p) for p in two.parameters()] + [id(m) for m in two.modules()] == before


def test_weights_per_component(tiny_pipeline: Any, unet_output: Run, text_output: Run, randomise: Run) -> None:
    unet, text = unet_output(tiny_pipeline.unet), text_output(tiny_pipeline.text_encoder)
    ld.add_adapter(tiny_pipeline, {"unet": ld.LoraConfig(), "text_encoder": ld.LoraConfig()}, "dog")
    ld.add_adapter(tiny_pipeline, ld.LoraConfig(), "style")
    randomise(tiny_pipeline, "dog")
    ld.set_adapters(tiny_pipeline, ["dog"], {"unet": 0.0})
    assert torch.equal(unet_output(tiny_pipeline.unet), unet)
    assert not torch.equal(text_output(tiny_pipeline.text_encoder), text)
    ld.set_adapters(tiny_pipeline, ["dog", "style"], {"unet": [0.5, 0.25], "text_encoder": 0.0})
    assert ld.active_adapters(tiny_pipeline) == {
        "dog": {"unet": 0.5, "text_encoder": 0.0},
        "style": {"unet": 0.25},
    }
    assert torch.equal(text_output(tiny_pipeline.text_encoder), text)
    ld.set_adapters(tiny_pipeline, ["dog", "style"], [{"text_encoder": 0.1}, 2.0])
    assert ld.active_adapters(tiny_pipeline) == {
        "dog": {"unet": 1.0, "text_encoder": 0.1},
        "style": {"unet": 2.0},
    }


def test_disable_nests_and_survives_errors(two: nn.Module) -> None:
    x = torch.randn(3, 8)
    with_adapters = two(x)
    with pytest.raises(RuntimeError, match="stop"), ld.disable_adapters(two):
        base = two(x)
        with ld.disable_adapters(two):
            assert ld.active_adapters(two) == {}
        assert torch.equal(two(x), base)
        raise RuntimeError("stop")
    assert torch.equal(two(x), with_adapters)
    assert not torch.equal(base, with_adapters)


def test_changes_inside_disable_act_after_it(two: nn.Module) -> None:
    with ld.disable_adapters(two):
        ld.set_adapters(two, "cat", 0.5)
        ld.delete_adapter(two, "dog")
        assert ld.active_adapters(two) == {}
    assert ld.active_adapters(two) == {"cat": {"model": 0.5}}
    with ld.disable_adapters(two):
        ld.unload(two)
    assert ld.list_adapters(two) == {}


@pytest.mark.parametrize(
    ("names", "weights", "words"),
    [
        (["dog", "bird"], None, "no adapter 'bird'; there are 'dog', 'cat'"),
        (["dog", "cat"], [1.0], "1 weights for 2 adapters"),
        (["dog", "dog"], None, "each adapter once"),
        ("dog", float("nan"), "finite"),
        ("dog", "1", "finite"),
        ("dog", {"unet": 1.0}, "components are model"),
        (["dog"], [{"unet": 1.0}], "components are model"),
    ],
)
def test_misuse_changes_nothing(two: nn.Module, names: Any, weights: Any, words: str) -> None:
    before = ld.active_adapters(two)
    with pytest.raises(ld.ConfigError, match=words):
        ld.set_adapters(two, names, weights)
    assert ld.active_adapters(two) == before


def test_the_order_of_names_is_the_order_of_terms() -> None:
    """What was loaded or active before changes no bit of a sum."""
    outputs = []
    for order in (["a", "b", "c"], ["c", "b", "a"]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        for name in order:
            config = ld.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            ld.add_adapter(model, config, name, generator=torch.Generator().manual_seed(ord(name)))
        ld.set_adapters(model, order[:1])
        ld.set_adapters(model, ["b", "a", "c"], [0.7, 0.9, 1.1])
        with torch.no_grad():
            outputs.append(model(torch.linspace(-1, 1, 64 * 8).view(8, 64)))
    assert torch.equal(*outputs)
