"""Initial factors: distributions and determinism."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_diffusion as ld
from lora_diffusion.initial import factors_of_weight, initial_factors


def test_default_is_kaiming_uniform_for_a_and_zero_for_b() -> None:
    torch.manual_seed(0)
    a, b = initial_factors((8, 400), (5, 8), True)
    torch.manual_seed(0)
    assert torch.equal(a, nn.init.kaiming_uniform_(torch.empty(8, 400), a=math.sqrt(5)))
    assert not b.any()


def test_gaussian_has_deviation_one_over_r() -> None:
    a, b = initial_factors((16, 4000), (5, 16), "gaussian", torch.Generator().manual_seed(0))
    assert float(a.std()) == pytest.approx(1 / 16, rel=0.01)
    assert not b.any()


def test_false_fills_both() -> None:
    a, b = initial_factors((4, 8), (5, 4), False)
    assert a.any()
    assert b.any()


def test_follows_the_global_seed_or_the_generator(toy: nn.Module) -> None:
    def values(generator: torch.Generator | None = None) -> list[torch.Tensor]:
        ld.add_adapter(toy, ld.LoraConfig(r=2), generator=generator)
        out = [parameter.detach().clone() for parameter in ld.adapter_parameters(toy)["model"]]
        ld.unload(toy)
        return out

    torch.manual_seed(5)
    first = values()
    torch.manual_seed(5)
    again = values()
    other = values()
    drawn, redrawn = (values(torch.Generator().manual_seed(9)) for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, drawn, redrawn))
    assert not torch.equal(first[0], other[0])


class TestFromTheWeight:
    """PiSSA and OLoRA: PEFT's factors, our untouched base."""

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_equals_peft(self, init: str) -> None:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(20, 12))
        base[0].weight.data = torch.linalg.qr(torch.randn(20, 12)).Q.t() * torch.arange(12, 0, -1.0)[:, None]
        before = base[0].weight.detach().clone()
        settings = {"r": 3, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": init}
        peft = get_peft_model(copy.deepcopy(base), PeftConfig(**settings)).base_model.model[0]
        ld.add_adapter(base, ld.LoraConfig(**settings))
        a, b = ld.adapter_parameters(base)["model"]
        torch.testing.assert_close(b @ a, peft.lora_B["default"].weight @ peft.lora_A["default"].weight,
                                   rtol=1e-5, atol=1e-5)  # fmt: skip
        assert torch.equal(base[0].weight, before)
        x = torch.randn(4, 20)
        torch.testing.assert_close(base(x), peft(x), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            a.mul_(1.5)
            peft.lora_A["default"].weight.copy_(a)
            peft.lora_B["default"].weight.copy_(b)
        torch.testing.assert_close(base(x), peft(x), rtol=1e-3, atol=2e-3)

    def test_the_randomised_method_finds_the_largest_triples(self) -> None:
        torch.manual_seed(0)
        weight = torch.randn(40, 30)
        u, s, vh = torch.linalg.svd(weight)
        a, b = factors_of_weight(weight, 3, 2.0, "pissa_niter_16")
        torch.testing.assert_close(2.0 * b @ a, (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-3, atol=1e-3)

    def test_the_file_is_a_plain_lora_for_the_plain_base(self, tmp_path: Path) -> None:
        """Twice the rank, and right on a base that nobody changed."""
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(20, 12))
        fresh = copy.deepcopy(base)
        ld.add_adapter(base, ld.LoraConfig(r=3, target_modules=["0"], init_lora_weights="pissa"))
        ld.adapter_parameters(base)["model"][0].data.add_(0.1)
        ld.save_adapter(base, tmp_path / "p.safetensors")
        report = ld.load_adapter(fresh, tmp_path / "p.safetensors")
        assert dict(report.components["model"].ranks) == {6: 1}
        x = torch.randn(4, 20)
        torch.testing.assert_close(fresh(x), base(x), rtol=1e-4, atol=1e-5)

    def test_taken_up_again(self) -> None:
        """`flat` and `put_adapter` carry the fixed part along."""
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(8, 6)) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        for model in models:
            ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
        ld.adapter_parameters(models[0])["model"][1].data.mul_(1.3)
        ld.put_adapter(models[1], ld.get_adapter(models[0]).flat())
        x = torch.randn(3, 8)
        torch.testing.assert_close(models[1](x), models[0](x))

    @pytest.mark.parametrize(
        ("layer", "r", "said"), [(nn.Linear(8, 6), 9, "rank 9 is more"), (nn.Conv2d(3, 3, 3), 2, "for linear layers")]
    )
    def test_too_much_rank_and_other_layers(self, layer: nn.Module, r: int, said: str) -> None:
        config = ld.LoraConfig(r=r, target_modules=["0"], init_lora_weights="pissa")
        with pytest.raises(ld.ConfigError, match=said):
            ld.add_adapter(nn.Sequential(layer), config)


def test_orthogonal_starts_at_zero_with_both_factors_alive() -> None:
    torch.manual_seed(0)
    a, b = initial_factors((4, 10), (7, 4), "orthogonal")
    assert float((b @ a).abs().max()) < 1e-6
    assert a.abs().mean() > 0.02 and b.abs().mean() > 0.02
    with pytest.raises(ld.ConfigError, match="even rank"):
        initial_factors((3, 10), (7, 3), "orthogonal")
