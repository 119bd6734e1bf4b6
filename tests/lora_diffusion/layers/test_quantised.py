"""Adapters beside weights that bitsandbytes or torchao store in fewer bits, or `weight_only.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_diffusion as ld
from lora_diffusion.layers.quantised import full_precision, is_quantised, weight_shape
from lora_diffusion.layers.weight_only import store_weight

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def nf4(n: int, m: int) -> nn.Module:
    layer = bnb.nn.Linear4bit(n, m, compute_dtype=torch.float32, quant_type="nf4")
    return layer.to("cpu")


def int8(n: int, m: int) -> nn.Module:
    return bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False).to("cpu")


def torchao_int8(n: int, m: int) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    layer = nn.Sequential(nn.Linear(n, m))
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    return layer[0]


def weight_only(name: str) -> Callable[[int, int], nn.Module]:
    def make(n: int, m: int) -> nn.Module:
        layer = nn.Linear(n, m).requires_grad_(False)
        store_weight(layer, name)
        return layer

    return make


own_int8, own_fp8 = weight_only("int8"), weight_only("fp8")
KINDS = pytest.mark.parametrize(
    "make", [nf4, int8, torchao_int8, own_int8, own_fp8], ids=["nf4", "int8", "torchao_int8", "own_int8", "own_fp8"]
)


class Attention(nn.Module):
    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("to_q", "to_k", "to_v"):
            self.add_module(name, make(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_q(x) * self.to_k(x) + self.to_v(x)


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The stored numbers of a model, by name; torchao's tensors by what they stand for."""
    found = {name: v for name, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    return {name: v.dequantize() if is_quantised(v) and hasattr(v, "qdata") else v.clone() for name, v in found.items()}


@KINDS
def test_outputs_and_gradients(make: Any) -> None:
    """The base's own answer plus the low-rank term, and gradients for the factors and for x."""
    model = Attention(make)
    dtype = torch.float16 if make is int8 else torch.float32
    x = torch.randn(4, 64, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        base = {name: model.get_submodule(name)(x) for name in ("to_q", "to_k", "to_v")}
    before = numbers(model)
    ld.add_adapter(model, ld.LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))
    adapter = ld.get_adapter(model).components["model"]
    for name, layer in base.items():
        got = model.get_submodule(name)(x)
        wanted = layer.float() + x.float() @ adapter[name].delta().T
        torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=2e-2 if dtype == torch.float16 else 1e-4)
    model(x).float().sum().backward()
    assert x.grad is not None and bool(x.grad.count_nonzero())
    assert all(bool(p.grad.count_nonzero()) for p in ld.adapter_parameters(model)["model"])
    ld.unload(model)
    assert all(torch.equal(numbers(model)[name], value) for name, value in before.items())


@KINDS
def test_dora_knows_the_weight(make: Any) -> None:
    model = nn.Sequential(make(64, 64))
    dtype = torch.float16 if make is int8 else torch.float32
    x = torch.randn(4, 64, dtype=dtype)
    with torch.no_grad():
        base = model(x)
        ld.add_adapter(model, ld.LoraConfig(r=4, use_dora=True, target_modules=["0"]))
        torch.testing.assert_close(model(x).float(), base.float(), rtol=2e-2, atol=2e-2)


@KINDS
def test_merging_is_refused(make: Any) -> None:
    model = nn.Sequential(make(64, 64))
    ld.add_adapter(model, ld.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    assert is_quantised(model[0].weight)
    with pytest.raises(ld.AdapterMismatchError, match="quantised"):
        ld.merge_adapters(model)


def test_full_precision_is_what_the_layer_multiplies_by() -> None:
    for make in (nf4, own_int8, own_fp8):
        layer = make(64, 64)
        with torch.no_grad():
            x = torch.eye(64)
            bias = layer.bias if layer.bias is not None else 0.0
            torch.testing.assert_close((layer(x) - bias).T, full_precision(layer), rtol=1e-3, atol=1e-3)


def test_many_rows_at_once_on_nf4() -> None:
    model = Attention(nf4)
    for name, r in (("a", 2), ("b", 4)):
        ld.add_adapter(model, ld.LoraConfig(r=r, init_lora_weights=False, target_modules=["to_q", "to_v"]), name=name)
    x = torch.randn(3, 5, 64)
    with torch.no_grad():
        wanted = []
        for k, name in enumerate(("b", None, "a")):
            ld.set_adapters(model, [name] if name else [])
            wanted.append(model(x[k : k + 1]))
        with ld.adapters_per_sample(model, ["b", None, "a"]):
            torch.testing.assert_close(model(x), torch.cat(wanted), rtol=1e-4, atol=1e-4)


@KINDS
def test_the_shape_is_that_of_the_full_weight(make: Any) -> None:
    assert weight_shape(make(64, 32).weight) == [32, 64]
