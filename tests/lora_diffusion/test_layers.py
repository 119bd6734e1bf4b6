"""The adapted Linear layer against PEFT's, a float64 reference, and in the surroundings it will be used in."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_diffusion as ld


def host(layer: nn.Module, **config: Any) -> nn.Module:
    """A Sequential around one Linear, with a non-trivial adapter."""
    model = nn.Sequential(layer)
    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": "0", **config}
    ld.add_adapter(model, ld.LoraConfig(**config))
    return model


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 9),
    shape=st.sampled_from([(3,), (2, 3), (2, 1, 5), ()]),
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    alpha=st.floats(0.1, 20),
    rslora=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_forward_and_gradients_equal_a_float64_reference(
    rank: int, shape: tuple[int, ...], n: int, m: int, alpha: float, rslora: bool, bias: bool, seed: int
) -> None:
    """y = W·x + b + s·B·A·x and its gradients for x, A and B, for any shape of x."""
    torch.manual_seed(seed)
    model = host(nn.Linear(n, m, bias=bias), r=rank, lora_alpha=alpha, use_rslora=rslora)
    a, b = ld.adapter_parameters(model)["model"]
    x = torch.randn(*shape, n, requires_grad=True)
    y = model(x)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, a, b), dy)

    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, a, b))
    scale = alpha / rank**0.5 if rslora else alpha / rank
    base = model[0]
    y64 = F.linear(x64, base.weight.double(), base.bias.double() if bias else None) + scale * (x64 @ a64.T @ b64.T)
    reference = torch.autograd.grad(y64, (x64, a64, b64), dy.double())
    for got, wanted in zip((y, *ours), (y64, *reference)):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_equals_peft(rslora: bool) -> None:
    """Same factors, same output, same gradients, to 1e-6 in fp32; patterns included."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    torch.manual_seed(0)
    ours = nn.ModuleDict({"q": nn.Linear(24, 16), "v": nn.Linear(16, 20)})
    theirs = copy.deepcopy(ours)
    settings_ = {
        "r": 4,
        "lora_alpha": 10,
        "target_modules": ["q", "v"],
        "use_rslora": rslora,
        "rank_pattern": {"v": 2},
        "alpha_pattern": {"q": 3},
        "init_lora_weights": False,
    }
    ld.add_adapter(ours, ld.LoraConfig(**settings_))
    peft_model = get_peft_model(theirs, PeftConfig(**settings_))
    layers = peft_model.base_model.model
    with torch.no_grad():
        for name, low_rank in ld.get_adapter(ours).components["model"].items():
            layers[name].lora_A["default"].weight.copy_(low_rank.a)
            layers[name].lora_B["default"].weight.copy_(low_rank.b)
    x = torch.randn(2, 5, 24, requires_grad=True)
    y_ours, y_theirs = ours["v"](ours["q"](x)), layers["v"](layers["q"](x))
    torch.testing.assert_close(y_ours, y_theirs, rtol=0, atol=1e-6)
    dy = torch.randn_like(y_ours) / 10
    mine = torch.autograd.grad(y_ours, [x, *ld.adapter_parameters(ours)["model"]], dy)
    factors = [layers[n].lora_A["default"].weight for n in "qv"] + [layers[n].lora_B["default"].weight for n in "qv"]
    dx, aq, av, bq, bv = torch.autograd.grad(y_theirs, [x, *factors], dy)
    for got, wanted in zip(mine, (dx, aq, bq, av, bv)):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_bases_keep_fp32_factors(dtype: torch.dtype) -> None:
    """Output in the base's dtype, factors and their gradients in fp32, close to the exact answer."""
    torch.manual_seed(0)
    model = host(nn.Linear(32, 16).to(dtype))
    a, b = ld.adapter_parameters(model)["model"]
    x = torch.randn(4, 32, dtype=dtype)
    y = model(x)
    assert (y.dtype, a.dtype, b.dtype) == (dtype, torch.float32, torch.float32)
    y.float().square().sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == torch.float32
    exact = F.linear(x.float(), model[0].weight.float(), model[0].bias.float()) + 1.5 * x.float() @ a.T @ b.T
    torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=3e-2)


def test_x_is_kept_as_it_is_for_backward() -> None:
    """No fp32 copy of a bf16 activation: what autograd holds of its size is x itself."""
    model = host(nn.Linear(64, 64).to(torch.bfloat16))
    x = torch.randn(512, 64, dtype=torch.bfloat16)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    kept.pop(model[0].weight.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= 1.2 * x.untyped_storage().nbytes()


def test_autocast() -> None:
    """fp32 base and factors under autocast give the base's autocast dtype and gradients in fp32."""
    model = host(nn.Linear(16, 16))
    a, _ = ld.adapter_parameters(model)["model"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(3, 16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == torch.float32
    assert a.grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    """Dropout included: the random state is replayed."""
    model = host(nn.Linear(8, 8), lora_dropout=0.5).train()
    parameters = ld.adapter_parameters(model)["model"]
    x = torch.randn(5, 8, requires_grad=True)
    torch.manual_seed(1)
    plain = torch.autograd.grad(model(x).square().sum(), parameters)
    torch.manual_seed(1)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(parameter.grad, wanted) for parameter, wanted in zip(parameters, plain))


def test_dropout_acts_in_training_only() -> None:
    model = host(nn.Linear(64, 64), lora_dropout=0.9)
    x = torch.randn(2, 64)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


def test_classes_names_and_repr() -> None:
    """Still a Linear for everybody who asks; equal layers share one class; the adapter shows in the repr."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ld.add_adapter(model, ld.LoraConfig(target_modules="all-linear"), "dog")
    assert isinstance(model[0], nn.Linear)
    assert type(model[0]) is type(model[1])
    assert "adapter_dog" in repr(model)
    ld.unload(model)
    assert type(model[0]) is nn.Linear
    assert set(vars(model[0])) == set(vars(nn.Linear(4, 4)))


def test_deepcopy_is_independent() -> None:
    model = host(nn.Linear(4, 4))
    twin = copy.deepcopy(model)
    x = torch.randn(2, 4)
    before = model(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        ld.adapter_parameters(twin)["model"][1].add_(1)
    assert not torch.equal(twin(x), before)
    ld.unload(twin)
    assert type(twin[0]) is nn.Linear
    assert torch.equal(model(x), before)


def test_whole_modules_can_be_pickled() -> None:
    model = host(nn.Linear(4, 4))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(2, 4)
    assert torch.equal(again(x), model(x))
    ld.unload(again)
    assert type(again[0]) is nn.Linear


def test_a_module_with_a_forward_of_its_own_is_refused() -> None:
    """An offloading hook's forward would never reach the adapter: an error, not silence."""
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = model[0].forward
    with pytest.raises(ld.AdapterMismatchError, match="hooks"):
        ld.add_adapter(model, ld.LoraConfig(target_modules="0"))
    assert type(model[0]) is nn.Linear
