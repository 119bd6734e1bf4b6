"""Models of few layers, adapted by us and by PEFT with the same numbers in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_diffusion as ld


def copy_into_peft(ours: nn.Module, theirs: nn.Module, name: str = "default") -> None:
    """Give PEFT's layers the factors that ours have."""
    with torch.no_grad():
        for path, low_rank in ld.get_adapter(ours, name).components["model"].items():
            layer = theirs.get_submodule(path)
            if name in layer.lora_embedding_A:
                layer.lora_embedding_A[name].copy_(low_rank.a)
                layer.lora_embedding_B[name].copy_(low_rank.b)
                continue
            layer.lora_A[name].weight.copy_(low_rank.a)
            layer.lora_B[name].weight.copy_(low_rank.b)
            if low_rank.magnitude is not None:
                magnitude = layer.lora_magnitude_vector[name].weight
                magnitude.copy_(low_rank.magnitude.view(magnitude.shape))


def peft_gradients(theirs: nn.Module, paths: list[str], name: str = "default") -> list[torch.Tensor]:
    """Gradients in the order of `ld.adapter_parameters`: A, B and, with DoRA, the lengths of each layer."""
    found = []
    for path in paths:
        layer = theirs.get_submodule(path)
        if name in layer.lora_embedding_A:
            found += [layer.lora_embedding_A[name].grad, layer.lora_embedding_B[name].grad]
            continue
        found += [layer.lora_A[name].weight.grad, layer.lora_B[name].weight.grad]
        if name in layer.lora_magnitude_vector:
            found.append(layer.lora_magnitude_vector[name].weight.grad.flatten())
    return found


@pytest.fixture
def same_as_peft() -> Callable[..., None]:
    """same_as_peft(model, x, **config): our output and gradients and PEFT's agree, to 1e-5 in fp32."""

    def run(model: nn.Module, x: torch.Tensor, *, tolerance: float = 1e-5, **config: Any) -> None:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        theirs = copy.deepcopy(model)
        ours = {key: value for key, value in config.items() if key != "fan_in_fan_out"}  # we look at the module
        ld.add_adapter(model, ld.LoraConfig(**ours))
        peft = get_peft_model(theirs, PeftConfig(**config)).base_model.model
        for parameter in ld.adapter_parameters(model)["model"]:  # away from zero, and from each other
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        copy_into_peft(model, peft)
        xs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
        got, wanted = model(xs[0]), peft(xs[1])
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
        dy = torch.randn_like(got) / 10
        got.backward(dy)
        wanted.backward(dy)
        paths = list(ld.get_adapter(model).components["model"])
        mine = [parameter.grad for parameter in ld.adapter_parameters(model)["model"]]
        for mine_, want in zip(mine, peft_gradients(peft, paths), strict=True):
            torch.testing.assert_close(mine_, want, rtol=tolerance, atol=tolerance)
        if x.is_floating_point():
            torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=tolerance, atol=tolerance)

    return run
