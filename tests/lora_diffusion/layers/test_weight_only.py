"""Weights stored as int8 or fp8: what they stand for, what is computed by them, and adapters beside them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_diffusion as ld
from lora_diffusion.layers.quantised import full_precision, is_quantised
from lora_diffusion.layers.weight_only import FORMATS, WeightOnlyConv2d, WeightOnlyLinear, store_weight

NAMES = pytest.mark.parametrize("name", list(FORMATS))
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 16),
    "no bias": lambda: nn.Linear(24, 16, bias=False),
    "conv": lambda: nn.Conv2d(24, 16, 3, padding=1),
    "strided": lambda: nn.Conv2d(24, 16, 3, stride=2, padding=(0, 1), dilation=(1, 2)),
    "groups": lambda: nn.Conv2d(24, 16, 3, groups=4),
    "reflect": lambda: nn.Conv2d(24, 16, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(24, 16, (3, 5), padding="same"),
}
KINDS = pytest.mark.parametrize("kind", list(LAYERS))


def layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[kind]().requires_grad_(False)


def stored(kind: str, name: str) -> nn.Module:
    module = layer(kind)
    store_weight(module, name)
    return module


def like(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    shape = (2, 5, 24) if layer(kind).weight.ndim == 2 else (2, 24, 7, 7)
    return torch.randn(shape).to(dtype).requires_grad_()


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone().view(torch.uint8) for name, value in module.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Net(nn.Module):
    """A convolution and an attention's projections, as they follow each other in a UNet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        for name in ("to_q", "to_k", "to_v"):
            self.add_module(name, nn.Linear(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x).flatten(2).mT.contiguous()
        return self.to_q(h) * self.to_k(h) + self.to_v(h)


def net(name: str | None) -> Net:
    model = Net().requires_grad_(False)
    for module in [*model.children()] if name is not None else []:
        store_weight(module, str(name))
    return model


TARGETS = ["conv", "to_q", "to_k", "to_v"]


@NAMES
@pytest.mark.parametrize("kind", ["linear", "conv", "groups"])
def test_each_weight_is_off_by_half_a_step(kind: str, name: str) -> None:
    plain, module = layer(kind), layer(kind)
    with torch.no_grad():
        plain.weight[3] *= 1e-4  # each output has a scale of its own
        plain.weight[5] = 0
        module.weight.copy_(plain.weight)
    store_weight(module, name)
    assert module.weight.dtype is FORMATS[name] and is_quantised(module.weight)
    weight, got = plain.weight.flatten(1), full_precision(module).flatten(1)
    step = weight.abs().amax(1, keepdim=True) / (254 if name == "int8" else 448 * 2**10)
    relative = 0.0 if name == "int8" else 2**-4
    assert bool(((weight - got).abs() <= (step + relative * weight.abs()) * 1.001).all())
    assert not got[5].any() and got[3].any()
    torch.testing.assert_close(got.abs().amax(1), weight.abs().amax(1))


@NAMES
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_computes_as_the_plain_layer_with_these_weights(kind: str, name: str, dtype: torch.dtype) -> None:
    module, plain = stored(kind, name), layer(kind)
    plain.weight.data = full_precision(module)
    plain.to(dtype)
    xs = [like(kind, dtype) for _ in range(2)]
    got, wanted = module(xs[0]), plain(xs[1])
    torch.testing.assert_close(got, wanted)
    dy = torch.randn_like(got)
    got.backward(dy)
    wanted.backward(dy)
    torch.testing.assert_close(xs[0].grad, xs[1].grad)


@NAMES
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_bias_that_learns(kind: str, name: str) -> None:
    module, plain = stored(kind, name), layer(kind)
    plain.weight.data = full_precision(module)
    grads = []
    for one in (module, plain):
        one.bias.requires_grad_(True)
        one(like(kind)).square().sum().backward()
        grads.append(one.bias.grad)
    torch.testing.assert_close(*grads)


def kept(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)  # held, so that no storage is used again
    del y
    return sum(found.values())


@NAMES
@KINDS
def test_nothing_is_kept_for_backward(kind: str, name: str) -> None:
    x = like(kind)
    own = kept(layer(kind), x)
    assert kept(stored(kind, name), x) <= own


@NAMES
def test_adapters_keep_no_more_than_beside_plain_layers(name: str) -> None:
    amounts = []
    for model in (net(None), net(name)):
        ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=TARGETS))
        amounts.append(kept(model, torch.randn(2, 4, 6, 6, requires_grad=True)))
    assert amounts[1] <= amounts[0]


@NAMES
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_casting_and_copying_leave_the_bits(kind: str, name: str) -> None:
    module = stored(kind, name)
    before = {key: value for key, value in bits(module).items() if key != "bias"}
    module.half().float().bfloat16().to(memory_format=torch.channels_last)
    assert module.bias.dtype is torch.bfloat16 and module.weight.dtype is FORMATS[name]
    assert same_bits({key: value for key, value in bits(module).items() if key != "bias"}, before)
    module.float()
    x = like(kind)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert type(twin) is type(module) and torch.equal(twin(x), module(x))
    torch.manual_seed(5)
    other = LAYERS[kind]().requires_grad_(False)
    store_weight(other, name)
    other.load_state_dict(module.state_dict())
    assert same_bits(bits(other), bits(module))


@NAMES
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_autocast(kind: str, name: str) -> None:
    module = stored(kind, name)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(like(kind))
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), module(like(kind)), rtol=2e-2, atol=2e-2)


@NAMES
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("first", ["stored", "adapted"])
def test_adapters_beside_it(name: str, dora: bool, first: str) -> None:
    """Whichever came first: the plain model with these weights in it, with the same adapter, and back to the bits."""
    model, plain = net(name if first == "stored" else None), net(None)
    config = ld.LoraConfig(r=2, target_modules=TARGETS, use_dora=dora, init_lora_weights=False)
    ld.add_adapter(model, config)
    if first == "adapted":
        for module in [*model.children()]:
            store_weight(module, name)
    for path in TARGETS:
        plain.get_submodule(path).weight.data = full_precision(model.get_submodule(path))
    ld.add_adapter(plain, config)
    ld.put_adapter(plain, ld.get_adapter(model).flat())
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    for one in (model, plain):
        one(x).square().mean().backward()
    for got, wanted in zip(ld.adapter_parameters(model)["model"], ld.adapter_parameters(plain)["model"], strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-3, atol=1e-4)
    ld.unload(model)
    assert type(model.conv) is WeightOnlyConv2d and type(model.to_q) is WeightOnlyLinear
    assert same_bits(bits(model), bits(net(name)))


@NAMES
def test_recomputed_by_checkpointing(name: str) -> None:
    model = net(name)
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, lora_dropout=0.3))
    model.train()
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        model.zero_grad()
        run(x).square().mean().backward()
        grads.append([p.grad.clone() for p in ld.adapter_parameters(model)["model"] if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@NAMES
def test_saved_loaded_and_each_row_its_own(name: str, tmp_path: Any) -> None:
    model, x = net(name), torch.randn(2, 4, 6, 6)
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    with torch.no_grad():
        wanted = model(x)
        ld.save_adapter(model, tmp_path / "a.safetensors")
        fresh = net(name)
        plain = fresh(x)
        ld.load_adapter(fresh, tmp_path / "a.safetensors", name="default")
        assert torch.equal(fresh(x), wanted)
        with ld.adapters_per_sample(fresh, ["default", None]):
            torch.testing.assert_close(fresh(x), torch.stack([wanted[0], plain[1]]), rtol=1e-4, atol=1e-5)


@NAMES
def test_what_cannot_be_is_refused(name: str) -> None:
    model = net(name)
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    with pytest.raises(ld.AdapterMismatchError, match="quantised"):
        ld.merge_adapters(model)
    ld.unload(model)
    assert same_bits(bits(model), bits(net(name)))
    with pytest.raises(ld.AdapterMismatchError, match="quantised weights, of which no copy can learn"):
        ld.add_adapter(net(name), ld.LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv"]))


@NAMES
def test_an_initial_value_from_the_weight(name: str) -> None:
    """PiSSA starts from the weight's largest directions, and as the base."""
    model, x = net(name), torch.randn(2, 4, 6, 6)
    before = model(x)
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa"))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    adapter = ld.get_adapter(model).components["model"]["to_q"]
    assert float(adapter.a.abs().max()) > 0
