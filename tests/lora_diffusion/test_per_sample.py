"""Each row of a batch its own adapter: the same as running each row alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_diffusion as ld

Run = Callable[..., Any]
NAMES = ["a", None, "b", "c", "a"]


def with_adapters(model: Any, targets: Any = "attention", **kwargs: Any) -> Any:
    """Three adapters of different ranks, scales and targets."""
    torch.manual_seed(0)
    for name, r, names in (("a", 2, targets), ("b", 5, targets), ("c", 3, ["to_v", "v_proj", "c_attn"])):
        config = ld.LoraConfig(r=r, lora_alpha=3, target_modules=names, init_lora_weights=False)
        ld.add_adapter(model, config, name=name, **kwargs)
    return model


def alone(model: Any, run: Callable[[int], torch.Tensor], names: list[str | None]) -> torch.Tensor:
    rows = []
    for k, name in enumerate(names):
        ld.set_adapters(model, [name] if name else [])
        rows.append(run(k))
    return torch.cat(rows)


@pytest.mark.parametrize("grad", [True, False])
def test_a_unet(tiny_pipeline: Any, grad: bool) -> None:
    unet = with_adapters(tiny_pipeline.unet)
    x, text = torch.randn(5, 4, 8, 8), torch.randn(5, 7, 32)
    t = torch.tensor([1, 20, 300, 400, 999])
    with torch.set_grad_enabled(grad):
        wanted = alone(unet, lambda k: unet(x[k : k + 1], t[k : k + 1], text[k : k + 1]).sample, NAMES)
        with ld.adapters_per_sample(unet, NAMES):
            got = unet(x, t, text).sample
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_text_encoder(tiny_pipeline: Any) -> None:
    ids = torch.randint(0, 500, (5, 77))
    encoder = with_adapters(tiny_pipeline.text_encoder)
    wanted = alone(encoder, lambda k: encoder(ids[k : k + 1]).last_hidden_state, NAMES)
    with ld.adapters_per_sample(encoder, NAMES):
        torch.testing.assert_close(encoder(ids).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_language_models(family: str) -> None:
    torch.manual_seed(0)
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=60))
    else:
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=32, **ends))
    with_adapters(model.eval(), "all-linear")
    ids = torch.randint(0, 60, (5, 11))
    wanted = alone(model, lambda k: model(ids[k : k + 1]).logits, NAMES)
    with ld.adapters_per_sample(model, NAMES):
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape", "ranks"),
    [
        (nn.Conv2d(3, 4, 3), (5, 3, 6, 6), (2, 4, 1)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"), (5, 4, 7, 7), (3, 1, 2)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), (5, 4, 6, 6), (2, 4, 2)),
        (nn.Embedding(9, 4, padding_idx=0), (5, 7), (2, 4, 1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("grad", [False, True])
def test_convolutions_and_embeddings(
    layer: nn.Module, shape: tuple[int, ...], ranks: tuple[int, ...], grad: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    x = torch.randint(0, 9, shape) if isinstance(layer, nn.Embedding) else torch.randn(shape)
    with torch.set_grad_enabled(grad):
        for name, r in zip("abc", ranks, strict=True):
            ld.add_adapter(model, ld.LoraConfig(r=r, target_modules=["0"], init_lora_weights=False), name=name)
        wanted = alone(model, lambda k: model(x[k : k + 1]), NAMES)
        with ld.adapters_per_sample(model, NAMES):
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
        ld.unload(model)


def test_training_each_adapter_on_its_own_rows(tiny_pipeline: Any) -> None:
    """Gradients of a mixed batch are those of the rows alone, added up per adapter."""
    unet = with_adapters(tiny_pipeline.unet)
    x, t, text = torch.randn(5, 4, 8, 8), torch.tensor([1, 20, 300, 400, 999]), torch.randn(5, 7, 32)
    parameters = [p for name in "abc" for p in ld.adapter_parameters(unet, name)["unet"]]
    with ld.adapters_per_sample(unet, NAMES):
        unet(x, t, text).sample.square().sum().backward()
    mixed = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    alone(unet, lambda k: unet(x[k : k + 1], t[k : k + 1], text[k : k + 1]).sample, NAMES).square().sum().backward()
    for got, p in zip(mixed, parameters, strict=True):
        torch.testing.assert_close(got, p.grad, rtol=2e-3, atol=1e-3)


def test_a_pipeline_with_guidance(tiny_pipeline: Any) -> None:
    """Both halves of classifier-free guidance share a row's adapter, in UNet and text encoder."""
    with_adapters(tiny_pipeline, components=["unet", "text_encoder"])
    prompts = ["one", "two", "three"]

    def draw(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return tiny_pipeline(prompts, num_inference_steps=2, height=32, width=32, generator=generators,
                             guidance_scale=4.0, output_type="pt").images  # fmt: skip

    names = ["b", None, "a"]
    wanted = alone(tiny_pipeline, lambda k: draw([prompts[k]], [k]), names)
    with ld.adapters_per_sample(tiny_pipeline, names):
        got = draw(prompts, [0, 1, 2])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)


def test_weights_are_those_that_were_set() -> None:
    torch.manual_seed(0)
    model = with_adapters(nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_v": nn.Linear(4, 4)}))
    ld.set_adapters(model, ["a", "b"], [0.5, 2.0])
    x = torch.randn(2, 4)
    base = torch.nn.functional.linear(x, model["to_q"].weight, model["to_q"].bias)
    with ld.adapters_per_sample(model, ["b", "a"]):
        got = model["to_q"](x)
    for k, (name, weight) in enumerate((("b", 2.0), ("a", 0.5))):
        delta = ld.get_adapter(model, name).components["model"]["to_q"].delta()
        torch.testing.assert_close(got[k], base[k] + weight * x[k] @ delta.T, rtol=1e-4, atol=1e-5)


def test_everything_is_as_before_afterwards(tiny_pipeline: Any, unet_output: Run) -> None:
    unet = with_adapters(tiny_pipeline.unet)
    ld.set_adapters(unet, ["a"], 0.7)
    before = unet_output(unet)
    with ld.adapters_per_sample(unet, ["b", "c"]):
        unet_output(unet)
        with ld.adapters_per_sample(unet, [None, None]), ld.disable_adapters(unet):
            unet_output(unet)
    assert torch.equal(unet_output(unet), before)


def test_mistakes_are_told(tiny_pipeline: Any, unet_output: Run) -> None:
    unet = with_adapters(tiny_pipeline.unet)
    with pytest.raises(ld.ConfigError, match="no adapter 'z'"), ld.adapters_per_sample(unet, ["z"]):
        pass
    with pytest.raises(ld.ConfigError, match="for each row"), ld.adapters_per_sample(unet, []):
        pass
    with (
        pytest.raises(ld.ConfigError, match="3 adapters and the batch has 2 rows"),
        ld.adapters_per_sample(unet, ["a", "b", "a"]),
    ):
        unet_output(unet)
    ld.add_adapter(unet, ld.LoraConfig(use_dora=True), name="d")
    with pytest.raises(ld.ConfigError, match="DoRA"), ld.adapters_per_sample(unet, ["d"]):
        pass
