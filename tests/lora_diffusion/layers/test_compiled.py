"""Under torch.compile: the same numbers, and no new program when adapters are switched, weighed or swapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_diffusion as ld

CONFIG = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "target_modules": ["to_q", "to_k", "to_v", "to_out"]}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("to_q", "to_k", "to_v", "to_out"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out(F.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x)))


class Counted:
    """A compiler that runs the traced program as it is and counts how often it was asked for one."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.programs = 0
        self.backend = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.programs += 1
        return self.backend(graph, inputs)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_with(names: str = "ab") -> Attention:
    torch.manual_seed(0)
    model = Attention()
    for name in names:
        ld.add_adapter(model, ld.LoraConfig(**CONFIG), name=name)
    return model


def switches(model: nn.Module) -> list[Callable[[], None]]:
    return [
        lambda: ld.set_adapters(model, "a"),
        lambda: ld.set_adapters(model, "b", 0.3),
        lambda: ld.set_adapters(model, ["a", "b"], [0.5, -2.0]),
        lambda: ld.set_adapters(model, []),
        lambda: ld.set_adapters(model, "a", 1.7),
    ]


@pytest.mark.parametrize("grad", [False, True])
def test_switching_and_weighing_compile_nothing_new(grad: bool) -> None:
    model, counted = model_with(), Counted()
    compiled = torch.compile(model, backend=counted, fullgraph=True)
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(grad):
        for switch in switches(model):
            switch()
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        with ld.disable_adapters(model):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert counted.programs == 1


def test_gradients_through_the_compiled_program() -> None:
    model, counted = model_with("a"), Counted()
    x = torch.randn(2, 5, 8, requires_grad=True)
    parameters = [x, *ld.adapter_parameters(model, "a")["model"]]
    wanted = torch.autograd.grad(model(x).square().sum(), parameters)
    got = torch.autograd.grad(torch.compile(model, backend=counted, fullgraph=True)(x).square().sum(), parameters)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_swapping_in_other_adapters_compiles_nothing_new(tmp_path: Any) -> None:
    """Other ranks, other scales, other targets."""
    torch.manual_seed(0)
    files = []
    for k, (r, targets) in enumerate(((1, ["to_q"]), (4, ["to_k", "to_out"]), (3, ["to_q", "to_k", "to_v", "to_out"]))):
        source = Attention()
        config = {**CONFIG, "r": r, "lora_alpha": k + 1, "target_modules": targets}
        ld.add_adapter(source, ld.LoraConfig(**config))
        files.append(tmp_path / f"{k}.safetensors")
        ld.save_adapter(source, files[-1])
    model, counted = Attention(), Counted()
    ld.reserve_adapter(model, 4, "room", target_modules=["to_q", "to_k", "to_v", "to_out"])
    compiled = torch.compile(model, backend=counted, fullgraph=True)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        base = compiled(x)
        for file in files:
            ld.load_adapter(model, file, "room", hotswap=True)
            plain = Attention()
            plain.load_state_dict({k: v for k, v in model.state_dict().items() if "adapter_" not in k})
            ld.load_adapter(plain, file)
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(compiled(x), base)
    assert counted.programs == 1


@pytest.mark.slow
def test_inductor_on_a_unet(tiny_pipeline: Any) -> None:
    """The real compiler, a whole UNet, two adapters: one program, our eager numbers."""
    unet = tiny_pipeline.unet
    for name in "ab":
        ld.add_adapter(unet, ld.LoraConfig(r=2, init_lora_weights=False), name=name)
    counted = Counted("inductor")
    compiled = torch.compile(unet, backend=counted)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    with torch.no_grad():
        for name, weight in (("a", 1.0), ("b", 0.5), ("a", -1.0)):
            ld.set_adapters(unet, name, weight)
            wanted = unet(x, torch.tensor(3), text).sample
            programs = counted.programs
            torch.testing.assert_close(compiled(x, torch.tensor(3), text).sample, wanted, rtol=1e-3, atol=1e-4)
    assert counted.programs == programs
