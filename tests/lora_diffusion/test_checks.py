"""The questions that a training and a save ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_diffusion as ld


class HalfUsed(nn.Module):
    """`b` is never called, `c` is called and its output thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.c(x)
        return self.a(x)


def test_layers_that_no_gradient_reaches() -> None:
    torch.manual_seed(0)
    model = HalfUsed()
    ld.add_adapter(model, ld.LoraConfig(target_modules=["a", "b", "c"]))
    assert ld.layers_without_gradient(model) == ["model.a", "model.b", "model.c"]
    model(torch.randn(3, 4)).square().sum().backward()
    assert ld.layers_without_gradient(model) == ["model.b", "model.c"]


def test_an_embedding_learns_through_a_first(tiny_pipeline: Any) -> None:
    """There B starts at random and A at zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4))
    ld.add_adapter(model, ld.LoraConfig(target_modules=["0"]))
    model(torch.arange(3)).square().sum().backward()
    assert ld.layers_without_gradient(model) == []


def test_saving_says_what_learned_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HalfUsed()
    ld.add_adapter(model, ld.LoraConfig(target_modules=["a", "b"]))
    report = ld.save_adapter(model, tmp_path / "a.safetensors")
    assert "all of them learned nothing" in str(report)
    ld.adapter_parameters(model)["model"][1].data.fill_(1.0)
    report = ld.save_adapter(model, tmp_path / "a.safetensors")
    assert report.without_effect == ["model.b"] and "1 of them, such as model.b" in str(report)
    ld.adapter_parameters(model)["model"][3].data.fill_(1.0)
    assert "nothing" not in str(ld.save_adapter(model, tmp_path / "a.safetensors"))


def test_layers_that_learned_nothing() -> None:
    torch.manual_seed(0)
    model = HalfUsed()
    ld.add_adapter(model, ld.LoraConfig(target_modules=["a", "b"]))
    assert ld.layers_without_effect(ld.get_adapter(model)) == ["model.a", "model.b"]
    optimizer = torch.optim.SGD([p for ps in ld.adapter_parameters(model).values() for p in ps], 0.1)
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert ld.layers_without_effect(ld.get_adapter(model)) == ["model.b"]
