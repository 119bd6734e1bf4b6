"""Into the weights and out again: the same numbers, every bit back, and a true account of the rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_diffusion as ld

Run = Callable[..., Any]


def two_layers(dtype: torch.dtype = torch.float32, std: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 16)).to(dtype)
    for name, scale in (("a", std), ("b", 2 * std)):
        ld.add_adapter(model, ld.LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=False), name=name)
        for parameter in ld.adapter_parameters(model, name)["model"]:
            parameter.data.mul_(scale)
    return model


def test_merged_is_unmerged() -> None:
    model = two_layers()
    ld.set_adapters(model, ["a", "b"], [0.5, -1.5])
    x = torch.randn(5, 32)
    wanted = model(x)
    report = ld.merge_adapters(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert report.adapters == {"model": {"a": 0.5, "b": -1.5}}
    assert report.layers == {"model": 2}
    assert ld.active_adapters(model) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_undo_is_bit_exact(dtype: torch.dtype, bits: Run) -> None:
    """Merged twice over, undone once: every tensor as before, the same adapters active."""
    model = two_layers(dtype)
    before, active = bits(model), ld.active_adapters(model)
    ld.merge_adapters(model, "a")
    assert bits(model) != before
    ld.merge_adapters(model, "b")
    ld.unmerge_adapters(model)
    assert bits(model) == before
    assert ld.active_adapters(model) == active


def test_disabling_shows_the_base(bits: Run) -> None:
    model = two_layers()
    x = torch.randn(5, 32)
    with ld.disable_adapters(model):
        base = model(x)
    ld.merge_adapters(model)
    merged = model(x)
    with ld.disable_adapters(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), merged)


def test_a_second_merge_starts_from_the_base() -> None:
    """One after the other gives the very bits of both at once: nothing is rounded twice."""
    one, other = two_layers(torch.bfloat16), two_layers(torch.bfloat16)
    ld.merge_adapters(one, "a")
    ld.merge_adapters(one, "b")
    ld.merge_adapters(other, ["a", "b"])
    assert torch.equal(one[0].weight, other[0].weight)


def test_the_account_is_true() -> None:
    """A small update in bf16: the reported loss is what a float64 comparison finds, and advice is given."""
    model = two_layers(torch.bfloat16, std=0.02)
    ld.set_adapters(model, "a")
    base = [layer.weight.detach().double() for layer in model]
    deltas = [ld.get_adapter(model, "a").components["model"][str(k)].delta().double() for k in range(2)]
    report = ld.merge_adapters(model, keep_high_precision=True)
    effective = [layer.weight.detach().double() - w for layer, w in zip(model, base)]
    error = sum(float((e - d).square().sum()) for e, d in zip(effective, deltas)) ** 0.5
    size = sum(float(d.square().sum()) for d in deltas) ** 0.5
    still = sum(float((e == 0).sum()) for e in effective) / sum(d.numel() for d in deltas)
    assert report.error["model"] == pytest.approx(error / size, rel=1e-3)
    assert report.unchanged["model"] == pytest.approx(still, rel=1e-3)
    assert report.error["model"] > 0.3
    assert "too coarse" in str(report)
    for k in range(2):
        torch.testing.assert_close(report.weights[f"model.{k}"].double(), base[k] + deltas[k], rtol=1e-6, atol=1e-7)


def test_a_float32_merge_needs_no_advice() -> None:
    assert "too coarse" not in str(ld.merge_adapters(two_layers()))


def test_tied_weights_stay_as_they_are_elsewhere() -> None:
    """An embedding tied to the output head: only the table's reading changes, and the tie is back afterwards."""
    torch.manual_seed(0)
    table, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = table.weight
    model = nn.ModuleDict({"table": table, "head": head})
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=["table"], init_lora_weights=False))
    ids, x = torch.arange(9), torch.randn(2, 4)
    read, said = table(ids), head(x)
    ld.merge_adapters(model)
    torch.testing.assert_close(table(ids), read)
    assert torch.equal(head(x), said)
    ld.unmerge_adapters(model)
    assert head.weight is table.weight


def test_merged_for_good(bits: Run) -> None:
    model = two_layers()
    x = torch.randn(5, 32)
    wanted = model(x)
    ld.merge_adapters(model)
    ld.unload(model, keep_merged=True)
    assert type(model[0]) is nn.Linear
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_unload_undoes_a_merge(bits: Run) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    before = bits(model)
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    ld.merge_adapters(model)
    ld.unload(model)
    assert bits(model) == before


def test_what_is_refused() -> None:
    model = two_layers()
    with pytest.raises(ld.ConfigError, match="nothing to undo"):
        ld.unmerge_adapters(model)
    with pytest.raises(ld.ConfigError, match="no adapter 'c'"):
        ld.merge_adapters(model, "c")
    ld.merge_adapters(model, "a")
    for act in (lambda: ld.set_adapters(model, "a"), lambda: ld.delete_adapter(model, "a")):
        with pytest.raises(ld.ConfigError, match="unmerge_adapters first"):
            act()
    ld.merge_adapters(model)
    with pytest.raises(ld.ConfigError, match="no adapter to merge"):
        ld.merge_adapters(model)


def test_nothing_is_merged_where_a_weight_would_overflow(bits: Run) -> None:
    model = two_layers(torch.float16)
    for parameter in ld.adapter_parameters(model, "a")["model"][2:]:
        parameter.data.mul_(1e5)
    before = bits(model)
    with pytest.raises(ld.AdapterMismatchError, match=r"range of torch\.float16"):
        ld.merge_adapters(model)
    assert bits(model) == before


def test_a_pipeline_merged(tiny_pipeline: Any, unet_output: Run, text_output: Run, randomise: Run) -> None:
    ld.add_adapter(tiny_pipeline, ld.LoraConfig(r=2), components=["unet", "text_encoder"])
    randomise(tiny_pipeline)
    wanted = unet_output(tiny_pipeline.unet), text_output(tiny_pipeline.text_encoder)
    report = ld.merge_adapters(tiny_pipeline)
    assert set(report.layers) == {"unet", "text_encoder"}
    got = unet_output(tiny_pipeline.unet), text_output(tiny_pipeline.text_encoder)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
