"""Each kind of layer and method against PEFT's: same numbers in, same outputs and gradients out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D

import lora_diffusion as ld

Same = Callable[..., None]
together = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


SIZES = st.integers(1, 9)


@together
@given(
    n=SIZES, m=SIZES, r=st.integers(1, 2), alpha=SIZES, flags=st.tuples(*[st.booleans()] * 3), seed=st.integers(0, 99)
)
def test_linear(same_as_peft: Same, n: int, m: int, r: int, alpha: int, flags: Any, seed: int) -> None:
    torch.manual_seed(seed)
    bias, dora, rslora = flags
    model = nn.Sequential(nn.Linear(n, m, bias=bias))
    config = {"r": r, "lora_alpha": alpha, "target_modules": ["0"], "use_dora": dora, "use_rslora": rslora}
    same_as_peft(model, torch.randn(2, 3, n), **config, tolerance=1e-4)


KERNELS = st.sampled_from([1, 3, (3, 1)])


@together
@given(n=SIZES, m=SIZES, kernel=KERNELS, stride=st.integers(1, 2), padding=st.integers(0, 1), r=st.integers(1, 4),
       flags=st.tuples(*[st.booleans()] * 2), seed=st.integers(0, 99))  # fmt: skip
def test_conv2d(
    same_as_peft: Same, n: int, m: int, kernel: Any, stride: int, padding: int, r: int, flags: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    bias, dora = flags
    model = nn.Sequential(nn.Conv2d(n, m, kernel, stride, padding, bias=bias))
    same_as_peft(model, torch.randn(2, n, 6, 6), r=r, target_modules=["0"], use_dora=dora, tolerance=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3])
def test_conv2d_in_either_layout(layout: torch.memory_format, kernel: int) -> None:
    """The same numbers, in the layout of the base's output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, kernel, padding=kernel // 2)).to(memory_format=layout)
    x = torch.randn(2, 4, 5, 7).contiguous(memory_format=layout)
    base = model(x)
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    got = model(x)
    assert got.stride() == base.stride()
    ld.merge_adapters(model)
    torch.testing.assert_close(model(x), got, rtol=1e-5, atol=1e-5)


def test_embedding(same_as_peft: Same) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 4))
    same_as_peft(model, torch.randint(0, 11, (3, 5)), r=2, target_modules=["0", "1"])


def test_conv1d(same_as_peft: Same) -> None:
    """transformers' Conv1D, whose weight is (in, out)."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(12, 5), nn.GELU(), Conv1D(5, 12))
    same_as_peft(model, torch.randn(2, 3, 5), r=3, target_modules=["0", "2"], fan_in_fan_out=True)


@pytest.mark.parametrize("sizes", [(12, 5), (6, 6)])
def test_conv1d_without_gradients(sizes: tuple[int, int]) -> None:
    """The quick way of sampling reads the weight the right way round, square ones too."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(*sizes))
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, sizes[1])
    wanted = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_patterns(same_as_peft: Same) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    same_as_peft(model, torch.randn(4, 8), r=4, lora_alpha=6, target_modules=["0", "2", "4"], rank_pattern={"2": 2},
                 alpha_pattern={"4": 1}, use_rslora=True)  # fmt: skip


class TestGroupedConvolutions:
    def test_our_form_is_block_by_block(self) -> None:
        """The low-rank path equals a convolution with the delta that would be merged."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, groups=2))
        ld.add_adapter(model, ld.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
        x = torch.randn(2, 6, 5, 5)
        wanted = model(x)
        ld.merge_adapters(model)
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
        assert ld.get_adapter(model).components["model"]["0"].delta().shape == model[0].weight.shape

    def test_pefts_form_is_taken_and_cannot_be_merged(self) -> None:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2))
        with pytest.warns(UserWarning, match="groups > 1"):
            peft = get_peft_model(copy.deepcopy(model), PeftConfig(r=4, target_modules=["0"], init_lora_weights=False))
        layer = peft.base_model.model[0]
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        ld.load_adapter(model, ld.Adapter({"model": {"0": ld.LowRank(a, b, 2.0)}}), "theirs")
        x = torch.randn(2, 6, 5, 5)
        torch.testing.assert_close(model(x), peft(x), rtol=1e-5, atol=1e-5)
        with pytest.raises(ld.AdapterMismatchError, match="mixes the groups"):
            ld.merge_adapters(model)

    def test_a_rank_that_is_no_multiple(self) -> None:
        model = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2))
        with pytest.raises(ld.ConfigError, match="2 groups"):
            ld.add_adapter(model, ld.LoraConfig(r=3, target_modules=["0"]))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_dilation_and_padding_modes_are_followed(mode: str) -> None:
    """What PEFT leaves out: the low-rank path reads the very pixels that the base reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=2, dilation=2, padding_mode=mode))
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(2, 3, 9, 9)
    wanted = model(x)
    ld.merge_adapters(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_gpt2_as_a_whole(same_as_peft: Same) -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 20}
    off = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2Model(GPT2Config(**sizes, **off))

    class Out(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.gpt(ids).last_hidden_state

    same_as_peft(Out(), torch.randint(0, 50, (2, 9)), r=2, target_modules=["c_attn", "c_proj", "c_fc", "wte"],
                 fan_in_fan_out=True)  # fmt: skip


class TestDora:
    def test_starts_as_the_base(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4))
        x = torch.randn(3, 6)
        wanted = model(x)
        ld.add_adapter(model, ld.LoraConfig(target_modules=["0"], use_dora=True))
        torch.testing.assert_close(model(x), wanted)

    def test_the_weight_goes_from_the_base_to_the_whole(self) -> None:
        """At weight 0 the base, at 1 all of it, in between in between; merging agrees."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4))
        x = torch.randn(3, 6)
        base = model(x)
        ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False))
        ld.adapter_parameters(model)["model"][2].data.mul_(1.7)
        whole = model(x)
        ld.set_adapters(model, "default", 0.3)
        torch.testing.assert_close(model(x), base + 0.3 * (whole - base))
        ld.merge_adapters(model)
        torch.testing.assert_close(model(x), base + 0.3 * (whole - base), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("shape", [(7, 5), (4, 3, 3, 3)])
    def test_norms_without_the_product(self, shape: tuple[int, ...]) -> None:
        from lora_diffusion.layers.dora import row_norms
        from lora_diffusion.layers.factors import LoraFactors

        torch.manual_seed(0)
        weight = torch.randn(shape)
        a, b = torch.randn(3, *shape[1:]), torch.randn(shape[0], 3, *[1] * (len(shape) - 2))
        exact = weight.double().flatten(1) + 0.7 * b.double().flatten(1) @ a.double().flatten(1)
        torch.testing.assert_close(
            row_norms(weight, LoraFactors(a, b, 0.7)), exact.norm(dim=1).float(), rtol=1e-5, atol=1e-5
        )

    def test_refused_for_embeddings(self) -> None:
        with pytest.raises(ld.ConfigError, match="DoRA"):
            ld.add_adapter(nn.Sequential(nn.Embedding(4, 4)), ld.LoraConfig(target_modules=["0"], use_dora=True))

    def test_dropout_as_peft_has_it(self) -> None:
        """In training mode the base's part reads what is left of x, too."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4))
        ld.add_adapter(
            model, ld.LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=0.5, init_lora_weights=False)
        )
        layer, x = model.train()[0], torch.randn(3, 6)
        part = layer.part("default")
        from lora_diffusion.layers.dora import gain_over_base

        torch.manual_seed(9)
        got = model(x)
        torch.manual_seed(9)
        left = torch.nn.functional.dropout(x, 0.5)
        gain = gain_over_base(layer.weight, part)
        low = part.scale * left @ part.lora_A.t() @ part.lora_B.t()
        base = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(got, base + (gain - 1) * (left @ layer.weight.t()) + gain * low)
