"""`modules_to_save`: whole modules that an adapter learns a copy of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_diffusion as ld

Run = Callable[..., Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"to_q": nn.Linear(6, 6)})
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body["to_q"](x)))


def learned(model: nn.Module, name: str = "a", modules: Any = ("norm", "head")) -> nn.Module:
    """An adapter that has been through one step."""
    ld.add_adapter(model, ld.LoraConfig(r=2, modules_to_save=modules), name=name)
    parameters = ld.adapter_parameters(model, name)["model"]
    model(torch.randn(4, 6, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    torch.optim.SGD(parameters, 0.1).step()
    for p in parameters:
        p.grad = None
    return model


def test_copies_learn_and_the_base_does_not(bits: Run) -> None:
    model = Net()
    before, x = bits(model), torch.randn(3, 6)
    base = model(x)
    learned(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.copy_a.weight", "norm.copy_a.bias"} <= names and "head.weight" not in names
    assert all(bits(model)[name] == value for name, value in before.items())
    changed = model(x)
    assert not torch.allclose(changed, base)
    with ld.disable_adapters(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), changed)
    ld.unload(model)
    assert bits(model) == before and type(model.head) is nn.Linear


def test_equals_peft() -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    model = Net()
    theirs = get_peft_model(copy.deepcopy(model), PeftConfig(r=2, target_modules=["to_q"], modules_to_save=["head"]))
    learned(model, modules=["head"])
    inner = theirs.base_model.model
    with torch.no_grad():
        adapter = ld.get_adapter(model, "a")
        inner.body.to_q.lora_A["default"].weight.copy_(adapter.components["model"]["body.to_q"].a)
        inner.body.to_q.lora_B["default"].weight.copy_(adapter.components["model"]["body.to_q"].b)
        inner.head.modules_to_save["default"].load_state_dict(adapter.copies["model"]["head"])
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-6)
    ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ours == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = learned(Net()), torch.randn(3, 6)
    ld.save_adapter(model, tmp_path / "a.safetensors", "a")
    fresh = Net()
    ld.load_adapter(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(fresh(x), model(x), rtol=1e-5, atol=1e-6)
    assert ld.get_adapter(fresh, "a").configs["model"].modules_to_save == ["norm", "head"]


def test_taken_up_again() -> None:
    model, other, x = learned(Net()), Net(), torch.randn(3, 6)
    ld.add_adapter(other, ld.LoraConfig(r=2, modules_to_save=["norm", "head"]), name="b")
    ld.put_adapter(other, ld.get_adapter(model, "a").flat(), "b")
    torch.testing.assert_close(other(x), model(x))


def test_two_adapters_take_turns() -> None:
    model, x = learned(Net()), torch.randn(3, 6)
    first = model(x)
    ld.set_adapters(model, [])
    learned(model, "b", modules=["head"])
    assert not torch.equal(model(x), first)
    ld.set_adapters(model, "a")
    torch.testing.assert_close(model(x), first)
    twin = copy.deepcopy(model)
    ld.delete_adapter(model, "a")
    torch.testing.assert_close(twin(x), first)
    assert list(ld.list_adapters(model)) == ["b"]


def test_what_is_refused(tmp_path: Path) -> None:
    model = Net()
    with pytest.raises(ld.AdapterMismatchError, match=r"'hed' matches nothing; the nearest names are head"):
        ld.add_adapter(model, ld.LoraConfig(modules_to_save=["hed"]))
    with pytest.raises(ld.AdapterMismatchError, match="which is a part of it"):
        ld.add_adapter(model, ld.LoraConfig(target_modules=["head"], modules_to_save=["body", "body.to_q"]))
    learned(model)
    with pytest.raises(ld.ConfigError, match="only one of them can act"):
        ld.add_adapter(model, ld.LoraConfig(modules_to_save=["head"]), name="b")
    for act in (lambda: ld.merge_adapters(model), lambda: ld.adapters_per_sample(model, ["a"]).__enter__()):
        with pytest.raises(ld.ConfigError, match="whole module"):
            act()
    with pytest.raises(ld.AdapterMismatchError, match="low-rank adapters"):
        ld.add_adapter(model, ld.LoraConfig(target_modules=["head"], modules_to_save=["body"]), name="c")
    ld.save_adapter(model, tmp_path / "a.safetensors", "a")
    other = Net()
    other.head = nn.Linear(6, 5)
    with pytest.raises(ld.AdapterMismatchError, match="copy does not fit"):
        ld.load_adapter(other, tmp_path / "a.safetensors")
    assert ld.list_adapters(other) == {}
