"""Packed convolutions: the same numbers as PyTorch's own, forward and back, and the model as it was afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train import packed as module_under_test
from train.packed import WORTH, can_be_packed, packed, packed_sizes, suit_cpu


@pytest.fixture(autouse=True)
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "WORTH", 1)


def convolution(**changes: object) -> nn.Conv2d:
    torch.manual_seed(0)
    options: dict = {"kernel_size": 3, "padding": 1, **changes}
    return nn.Conv2d(6, 10, **options).requires_grad_(False)


@pytest.mark.parametrize("kernel, padding", [(3, 1), (1, 0), (3, 0), ((3, 5), (1, 2))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients(kernel: object, padding: object, layout: torch.memory_format, bias: bool) -> None:
    module = convolution(kernel_size=kernel, padding=padding, bias=bias)
    x = torch.randn(2, 6, 9, 7).contiguous(memory_format=layout).requires_grad_()
    plain = module(x)
    weights = torch.randn_like(plain)
    (expected,) = torch.autograd.grad((plain * weights).sum(), x)
    with packed(module) as number:
        assert number == 1
        for _ in range(2):
            said = module(x)
            (gradient,) = torch.autograd.grad((said * weights).sum(), x)
            torch.testing.assert_close(said, plain)
            torch.testing.assert_close(gradient, expected)


def test_another_size_than_the_first() -> None:
    module = convolution()
    with packed(module):
        module(torch.randn(1, 6, 4, 4))
        x = torch.randn(3, 6, 33, 20)
        said = module(x)
    torch.testing.assert_close(said, module(x))


@pytest.mark.parametrize("changes", [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "circular"}])
def test_what_is_left_alone(changes: dict) -> None:
    module = convolution(**changes)
    assert not can_be_packed(module)
    with packed(module) as number:
        assert number == 0 and "forward" not in vars(module)


def test_what_learns_or_is_in_half_precision_is_left_alone() -> None:
    assert not can_be_packed(convolution().requires_grad_(True))
    assert not can_be_packed(convolution().bfloat16())


def test_the_model_is_as_before_also_after_an_error() -> None:
    module = convolution()
    with pytest.raises(RuntimeError, match="broken"), packed(module):
        assert "forward" in vars(module)
        raise RuntimeError("broken")
    assert "forward" not in vars(module)


def test_bytes_of_the_copies() -> None:
    assert packed_sizes(nn.Sequential(convolution(), convolution(stride=2))) == [6 * 10 * 9 * 4] * 2


def test_only_the_size_that_it_trains_with_is_packed() -> None:
    """What is drawn in between changes nothing of the steps after it."""
    module, x = convolution(), torch.randn(1, 6, 8, 8, requires_grad=True)
    with packed(module):
        with torch.no_grad():
            module(torch.randn(2, 6, 8, 8))
        after_a_picture = module(x)
    with packed(module):
        at_once = module(x)
    assert torch.equal(after_a_picture, at_once)


def test_small_convolutions_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "WORTH", WORTH)
    small, large = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(256, 256, 3, padding=1)
    for module in (small, large):
        suit_cpu(module.requires_grad_(False))
    assert not can_be_packed(small) and small.weight.is_contiguous(memory_format=torch.channels_last)
    assert can_be_packed(large) and large.weight.is_contiguous()
