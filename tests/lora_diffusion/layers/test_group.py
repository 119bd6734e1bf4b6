"""Layers that share their input: found from the modules, computed once, and never wrong where the guess is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_diffusion as ld


class Attention(nn.Module):
    """Self-attention when called with one tensor, cross-attention (if built so) with two."""

    def __init__(self, wide: int, text: int | None = None, inner: int = 12) -> None:
        super().__init__()
        self.is_cross_attention = text is not None
        self.to_q = nn.Linear(wide, inner, bias=False)
        self.to_k = nn.Linear(text or wide, inner)
        self.to_v = nn.Linear(text or wide, inner)
        self.to_out = nn.Linear(inner, wide)

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        text = x if text is None else text
        q, k, v = self.to_q(x), self.to_k(text), self.to_v(text)
        return self.to_out(F.scaled_dot_product_attention(q, k, v))


def adapted(model: nn.Module, **config: Any) -> nn.Module:
    config = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": ["to_q", "to_k", "to_v"], **config}
    ld.add_adapter(model, ld.LoraConfig(**config))
    return model


def groups_of(model: nn.Module) -> list[list[str]]:
    paths = {id(module): path for path, module in model.named_modules()}
    groups = {id(m._group): m._group for m in model.modules() if getattr(m, "_group", None) is not None}
    return [[paths[id(m)] for m in group.members] for group in groups.values()]


def test_groups_are_found_from_the_modules(tiny_pipeline: Any) -> None:
    """q, k and v of self-attention, k and v of cross-attention, in Stable Diffusion's own modules."""
    ld.add_adapter(tiny_pipeline, ld.LoraConfig(), components=["unet", "text_encoder"])
    found = groups_of(tiny_pipeline.unet)
    assert all(len(g) == (3 if ".attn1." in g[0] else 2) for g in found)
    assert len(found) == 2 * len(
        [m for m in tiny_pipeline.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    )
    assert all([n.rpartition(".")[2] for n in g] == ["q_proj", "k_proj", "v_proj"]
               for g in groups_of(tiny_pipeline.text_encoder))  # fmt: skip


def test_an_mlps_gate_and_up_are_a_group() -> None:
    model = nn.ModuleDict({"mlp": nn.ModuleDict({n: nn.Linear(4, 4) for n in ("gate_proj", "up_proj", "down_proj")})})
    ld.add_adapter(model, ld.LoraConfig(target_modules="all-linear"))
    assert groups_of(model) == [["mlp.gate_proj", "mlp.up_proj"]]


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 9), batch=st.integers(1, 3), wide=st.integers(2, 12), rank=st.integers(1, 5),
    cross=st.booleans(), seed=st.integers(0, 999), frozen_x=st.booleans(), adapters=st.integers(1, 2),
    targets=st.sampled_from([["to_q", "to_k", "to_v"], ["to_q", "to_v"], ["to_k", "to_v", "to_out"]]),
)  # fmt: skip
def test_outputs_and_gradients_equal_a_float64_reference(
    tokens: int, batch: int, wide: int, rank: int, cross: bool, seed: int, frozen_x: bool, adapters: int, targets: Any
) -> None:
    """Whole attention blocks, any mixture of layers and adapters, against autograd on W + Σ s·B·A in float64."""
    torch.manual_seed(seed)
    model = Attention(wide, 7 if cross else None)
    for k in range(adapters):
        config = ld.LoraConfig(r=rank + k, lora_alpha=5, init_lora_weights=False, target_modules=targets)
        ld.add_adapter(model, config, name=f"a{k}")
    ld.set_adapters(model, [f"a{k}" for k in range(adapters)], [0.7, -1.3][:adapters])
    x = torch.randn(batch, tokens, wide, requires_grad=not frozen_x)
    text = torch.randn(batch, 5, 7, requires_grad=not frozen_x) if cross else None
    inputs = [t for t in (x, text) if t is not None and t.requires_grad]
    factors = [p for k in range(adapters) for p in ld.adapter_parameters(model, f"a{k}")["model"]]
    y = model(x, text)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, [*inputs, *factors], dy)

    double = {id(t): t.detach().double().requires_grad_() for t in [*inputs, *factors]}
    reference = copy.deepcopy(model)
    ld.unload(reference)
    reference.double()
    weights = {}
    for path in (name for name in ("to_q", "to_k", "to_v", "to_out") if name in targets):
        layer = model.get_submodule(path)
        delta = sum(
            weight
            * layer.part(f"a{k}").scale
            * double[id(layer.part(f"a{k}").lora_B)]
            @ double[id(layer.part(f"a{k}").lora_A)]
            for k, weight in zip(range(adapters), (0.7, -1.3))
        )
        weights[f"{path}.weight"] = layer.weight.detach().double() + delta
    call = [double.get(id(t), t.double()) for t in (x, text) if t is not None]
    wanted = torch.func.functional_call(reference, weights, tuple(call))
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(wanted, [double[id(t)] for t in [*inputs, *factors]], dy.double())
    for got, want in zip(ours, gradients, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-4)


class TestAWrongGuess:
    """A brother that is called with another tensor, or not at all, gets its own right answer."""

    def reference(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        part = layer.part("default")
        return F.linear(x, layer.weight + part.scale * part.lora_B @ part.lora_A, layer.bias)

    @pytest.mark.parametrize("grad", [True, False])
    def test_another_x(self, grad: bool) -> None:
        torch.manual_seed(0)
        model = adapted(Attention(6))
        x, other = torch.randn(2, 4, 6), torch.randn(2, 5, 6)
        with torch.set_grad_enabled(grad):
            for layer, given_ in ((model.to_q, x), (model.to_k, other), (model.to_v, x), (model.to_q, other)):
                torch.testing.assert_close(layer(given_), self.reference(layer, given_), rtol=1e-5, atol=1e-5)

    def test_x_changed_in_place_between_the_calls(self) -> None:
        torch.manual_seed(0)
        model = adapted(Attention(6))
        x = torch.randn(4, 6)
        with torch.no_grad():
            model.to_q(x)
            x.add_(1.0)
            torch.testing.assert_close(model.to_k(x), self.reference(model.to_k, x), rtol=1e-5, atol=1e-5)

    def test_the_mode_changed_between_the_calls(self) -> None:
        torch.manual_seed(0)
        model = adapted(Attention(6))
        x = torch.randn(4, 6)
        with torch.no_grad():
            model.to_q(x)
        assert model.to_k(x).requires_grad
        with torch.inference_mode():
            y = torch.randn(4, 6)
            torch.testing.assert_close(model(y), model(y))

    def test_weights_changed_between_the_calls(self) -> None:
        torch.manual_seed(0)
        model = adapted(Attention(6))
        x = torch.randn(4, 6)
        with torch.no_grad():
            model.to_q(x)
            ld.set_adapters(model, [])
            assert torch.equal(model.to_k(x), F.linear(x, model.to_k.weight, model.to_k.bias))

    def test_factors_changed_between_the_calls(self) -> None:
        torch.manual_seed(0)
        model = adapted(Attention(6))
        x = torch.randn(4, 6)
        with torch.no_grad():
            for change in (model.to_k.part("default").lora_A.mul_, model.to_v.weight.add_):
                model.to_q(x)
                change(2.0)
                for layer in (model.to_k, model.to_v):
                    torch.testing.assert_close(layer(x), self.reference(layer, x), rtol=1e-5, atol=1e-5)

    def test_a_backward_between_the_calls(self) -> None:
        torch.manual_seed(0)
        model = adapted(Attention(6))
        x = torch.randn(4, 6)
        for layer in (model.to_q, model.to_k, model.to_v):
            layer(x).sum().backward()
        assert all(bool(p.grad.count_nonzero()) for p in ld.adapter_parameters(model)["model"])

    def test_training_mode_changed_between_the_calls(self) -> None:
        torch.manual_seed(0)
        model = adapted(Attention(6), lora_dropout=0.5).train()
        x = torch.randn(4, 6)
        model.to_q(x)
        model.eval()
        torch.testing.assert_close(model.to_k(x), self.reference(model.to_k, x), rtol=1e-5, atol=1e-5)

    def test_a_hook_that_replaces_the_input_of_one(self) -> None:
        torch.manual_seed(0)
        model = adapted(Attention(6))
        model.to_v.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        x = torch.randn(3, 6)
        torch.testing.assert_close(model(x), F_attention(model, x, 2 * x), rtol=1e-5, atol=1e-5)


def F_attention(model: Any, x: torch.Tensor, v_input: torch.Tensor) -> torch.Tensor:
    reference = TestAWrongGuess().reference
    q, k, v = reference(model.to_q, x), reference(model.to_k, x), reference(model.to_v, v_input)
    return model.to_out(F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(reentrant: bool, dropout: float) -> None:
    """Recomputed forwards group the same layers and drop the same elements."""
    torch.manual_seed(0)
    model = adapted(Attention(8), lora_dropout=dropout).train()
    x = torch.randn(2, 6, 8, requires_grad=True)
    parameters = [x, *ld.adapter_parameters(model)["model"]]

    def run(wrapped: bool) -> list[torch.Tensor]:
        torch.manual_seed(7)
        for p in parameters:
            p.grad = None
        y = checkpoint(model, x, use_reentrant=reentrant) if wrapped else model(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in parameters)]

    for plain, again in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """A float32 base under autocast: outputs in its dtype, gradients in float32, both close to exact."""
    torch.manual_seed(0)
    model = adapted(Attention(16))
    x = torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = model.to_q(x) + model.to_k(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    got = [x.grad, *(p.grad for p in ld.adapter_parameters(model)["model"][:4])]
    assert all(g.dtype == torch.float32 for g in got)
    x.grad = None
    for p in ld.adapter_parameters(model)["model"]:
        p.grad = None
    (model.to_q(x) + model.to_k(x)).square().sum().backward()
    for mixed, exact in zip(got, [x.grad, *(p.grad for p in ld.adapter_parameters(model)["model"][:4])], strict=True):
        assert (mixed - exact).norm() <= 0.03 * exact.norm()


def test_dropout_is_replayed_and_unbiased() -> None:
    """The mask of backward is that of forward (the gradient is that of the very function computed), it changes from
    call to call, follows the seed, and is off in eval mode."""
    torch.manual_seed(0)
    model = adapted(Attention(64, inner=8), lora_dropout=0.25).double().train()
    x = torch.randn(50, 64, dtype=torch.float64, requires_grad=True)

    def loss(t: torch.Tensor, seed: int = 5) -> torch.Tensor:
        torch.manual_seed(seed)
        return (model.to_q(t) * weight).sum() + model.to_k(t).square().sum() + model.to_v(t).sum()

    weight = torch.randn(50, 8, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss(x), x)
    direction = torch.randn_like(x)
    step = 1e-6
    numeric = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not torch.equal(loss(x), loss(x, seed=6))
        outputs = torch.stack([model.to_q(x) for _ in range(600)])
        model.eval()
        exact = model.to_q(x)
    assert (outputs.mean(0) - exact).abs().mean() < 0.06 * (outputs - exact).abs().mean() + 0.02 * exact.abs().mean()


def test_what_is_kept_for_backward() -> None:
    """q, k and v of one bf16 x with fp32 adapters: one reference to x and a strip of rank-wide products."""
    torch.manual_seed(0)
    for dropout in (0.0, 0.1):
        model = adapted(Attention(640, inner=640), r=16, lora_dropout=dropout).to(torch.bfloat16).train()
        for parameter in ld.adapter_parameters(model)["model"]:
            parameter.data = parameter.data.float()
        x = torch.randn(1024, 640, dtype=torch.bfloat16, requires_grad=True)
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def pack(t: torch.Tensor, known: set = known, kept: dict = kept) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in known:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = [model.to_q(x), model.to_k(x), model.to_v(x)]
        assert sum(kept.values()) <= 1.1 * x.untyped_storage().nbytes()
        del outputs


def test_copies_stand_on_their_own() -> None:
    torch.manual_seed(0)
    model = adapted(Attention(6))
    twin = copy.deepcopy(model)
    x = torch.randn(3, 6)
    wanted = model(x)
    for p in ld.adapter_parameters(model)["model"]:
        p.data.zero_()
    torch.testing.assert_close(twin(x), wanted)
    assert all(m in set(twin.modules()) for m in twin.to_q._group.members)


def test_a_learning_base_gets_its_gradients() -> None:
    """Full fine-tuning beside an adapter goes through autograd's own operations."""
    torch.manual_seed(0)
    model = adapted(Attention(6))
    model.to_k.weight.requires_grad_(True)
    x = torch.randn(3, 6)
    model(x).sum().backward()
    assert model.to_k.weight.grad is not None
    assert all(p.grad is not None for p in ld.adapter_parameters(model)["model"])
