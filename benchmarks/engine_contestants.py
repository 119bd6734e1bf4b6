"""One module as each contestant has it (frozen, with PEFT's adapter, with ours), and whether they compute the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

import lora_diffusion as ld

RANK, ALPHA = 16, 32
FP32_TOLERANCE = 1e-4  # of the largest element
BF16_TOLERANCE = 2e-2  # of the norm, and no further from the result in fp32 than twice PEFT's own distance


class DisagreementError(Exception):
    """Ours and PEFT's results differ, or one has none: such a thing is not timed."""


@dataclass
class Contestant:
    """module: called with (x, *context); factors: A and B of each adapted layer, in the order of `named_modules()`."""

    module: nn.Module
    factors: list[nn.Parameter]

    def step(
        self, x: torch.Tensor, context: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Forward, and backward to x and the factors: what a training step does here."""
        x.grad = None
        for factor in self.factors:
            factor.grad = None
        outputs = self.module(x, *context)
        torch.autograd.backward(outputs, gradients)
        return outputs


def frozen(base: nn.Module) -> Contestant:
    """The floor: no adapter, no gradients of weights, the gradient of the input only."""
    return Contestant(copy.deepcopy(base).requires_grad_(False), [])


def with_peft(
    base: nn.Module,
    targets: Sequence[str],
    *,
    dropout: float = 0.0,
    transposed: bool = False,
    names: Sequence[str] = ("default",),
    own_dtype: bool = False,
) -> Contestant:
    """PEFT's LoRA in a copy of `base`; the first of `names` is active.

    own_dtype: factors in the base's dtype rather than fp32, PEFT's default.
    """
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(targets), lora_dropout=dropout, fan_in_fan_out=transposed
    )
    cast = not own_dtype
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=names[0], autocast_adapter_dtype=cast)
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=cast)
    module = model.get_base_model()
    peft_activate(module, names[0])
    return Contestant(module.train(base.training), [f for name in names for f in peft_factors(module, name)])


def with_ours(
    base: nn.Module,
    targets: Sequence[str],
    *,
    dropout: float = 0.0,
    names: Sequence[str] = ("default",),
) -> Contestant:
    """Our adapters in a copy of `base`; the first of `names` is active. Raises LoraDiffusionError where we cannot."""
    module = copy.deepcopy(base)
    config = ld.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), lora_dropout=dropout)
    for name in names:
        ld.add_adapter(module, config, name)
    ld.set_adapters(module, names[0])
    return Contestant(module.train(base.training), [f for name in names for f in our_factors(module, name)])


def peft_factors(module: nn.Module, name: str) -> list[nn.Parameter]:
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    return [pair[name].weight for layer in layers for pair in (layer.lora_A, layer.lora_B)]


def our_factors(target: object, name: str) -> list[nn.Parameter]:
    return [factor for factors in ld.adapter_parameters(target, name).values() for factor in factors]


def peft_activate(module: nn.Module, names: str | list[str]) -> None:
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(names)


def same_factors(*contestants: Contestant) -> None:
    """Give all of them the same random factors, large enough to show in the output."""
    shapes = [[tuple(factor.shape) for factor in contestant.factors] for contestant in contestants]
    if any(other != shapes[0] for other in shapes):
        raise DisagreementError("the factors differ in number or shape")
    if any(factor.dtype != torch.float32 for contestant in contestants for factor in contestant.factors):
        raise DisagreementError("there are factors of another dtype than fp32")
    draw = torch.Generator().manual_seed(2)
    for index, shape in enumerate(shapes[0]):
        # A: (r, in), so that A·x is as large as x; B: (out, r), so that B·A·x is a fifth of it.
        spread = 0.1 / math.sqrt(RANK) if index % 2 else 1 / math.sqrt(shape[1])
        values = torch.randn(shape, generator=draw) * spread
        for contestant in contestants:
            with torch.no_grad():
                contestant.factors[index].copy_(values)


def random_gradients(contestant: Contestant, x: torch.Tensor, context: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients for the outputs, as a loss would send them back."""
    with torch.no_grad():
        outputs = contestant.module(x, *context)
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(y.shape, generator=draw).to(y.device, y.dtype) for y in outputs]


def check(
    ours: Contestant,
    theirs: Contestant,
    x: torch.Tensor,
    context: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    dropout: float = 0.0,
) -> dict[str, float]:
    """That outputs (in training and in inference), the gradient of x and those of the factors agree; with dropout,
    without it and then with it.

    Returns the distances found. Raises DisagreementError, also where one of the two cannot compute at all.
    """
    try:
        return _distances(ours, theirs, x, context, gradients, dropout)
    except RuntimeError as error:
        raise DisagreementError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _distances(
    ours: Contestant,
    theirs: Contestant,
    x: torch.Tensor,
    context: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    dropout: float,
) -> dict[str, float]:
    training = ours.module.training
    for contestant in (ours, theirs):
        contestant.module.train(training and not dropout)
    found, expected = (_results(contestant, x, context, gradients) for contestant in (ours, theirs))
    for contestant in (ours, theirs):
        contestant.module.train(training)
    if x.dtype == torch.float32:
        distance = _largest([(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected)])
        distances = {"largest_difference": distance}
        if not distance <= FP32_TOLERANCE:
            raise DisagreementError(f"ours and PEFT's results differ by {distance:.1e} of the largest element")
    else:
        distances = _distances_from_fp32(found, expected, theirs, x, context, gradients, training and not dropout)
    if dropout and training:
        distances |= _check_dropout(ours, theirs, x, context, gradients)
    return distances


def check_twin(
    twin: Contestant,
    contestant: Contestant,
    x: torch.Tensor,
    context: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
) -> None:
    """That a compiled module gives its eager twin's outputs and gradients. Raises DisagreementError."""
    found, expected = (
        [*(y.detach() for y in one.step(x, context, gradients)), x.grad, *(factor.grad for factor in one.factors)]
        for one in (twin, contestant)
    )
    distance = _largest([(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(found, expected)])
    if not distance <= (FP32_TOLERANCE if x.dtype == torch.float32 else BF16_TOLERANCE):
        raise DisagreementError(f"its results differ from the eager ones by {distance:.1e} of their norm")


def _results(
    contestant: Contestant, x: torch.Tensor, context: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    outputs = contestant.step(x, context, gradients)
    missing = [index for index, factor in enumerate(contestant.factors) if factor.grad is None]
    if missing or x.grad is None:
        raise DisagreementError(f"no gradient of x or of {len(missing)} factors")
    if any(factor.grad.dtype != factor.dtype for factor in contestant.factors):
        raise DisagreementError("a factor's gradient has another dtype than the factor")
    training = contestant.module.training
    with torch.no_grad():  # inference may go another way
        inferred = contestant.module.eval()(x, *context)
    contestant.module.train(training)
    tensors = [*outputs, *inferred, x.grad, *(factor.grad for factor in contestant.factors)]
    return [tensor.detach().float().clone() for tensor in tensors]


def _largest(values: list[torch.Tensor]) -> float:
    return torch.stack(values).max().item()  # nan if one is, unlike Python's max()


def _distances_from_fp32(
    found: list[torch.Tensor],
    expected: list[torch.Tensor],
    theirs: Contestant,
    x: torch.Tensor,
    context: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    training: bool,
) -> dict[str, float]:
    """How far both are from the same computation in fp32: a gain in time must not be bought with precision."""
    exact_module = copy.deepcopy(theirs.module).float().train(training)
    exact_factors = [p for p in exact_module.parameters() if p.requires_grad]
    exact = _results(
        Contestant(exact_module, exact_factors),
        x.detach().float().requires_grad_(),
        [tensor.float() for tensor in context],
        [gradient.float() for gradient in gradients],
    )
    ours, peers = (
        _largest([(a - b).norm() / b.norm() for a, b in zip(results, exact)]) for results in (found, expected)
    )
    if not ours <= max(2 * peers, BF16_TOLERANCE):
        raise DisagreementError(f"ours is {ours:.1e} from the result in fp32, PEFT {peers:.1e}")
    return {"ours_from_fp32": ours, "peft_from_fp32": peers}


def _check_dropout(
    ours: Contestant,
    theirs: Contestant,
    x: torch.Tensor,
    context: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
) -> dict[str, float]:
    """The masks are other draws, so: dropout changes as much as PEFT's does, and in fp32 the gradient is the slope of
    the very function that was computed (that is, backward uses forward's mask)."""
    effects = []
    for contestant in (ours, theirs):
        with torch.no_grad():
            torch.manual_seed(4)
            dropped = contestant.module.train()(x, *context)
            plain = contestant.module.eval()(x, *context)
            contestant.module.train()
        effects.append(sum((a.float() - b.float()).square().sum().item() for a, b in zip(dropped, plain)))
    if not effects[1] / 1.5 <= effects[0] <= effects[1] * 1.5:
        raise DisagreementError(f"dropout changes the output by {effects[0]:.2e}, PEFT's by {effects[1]:.2e} (squares)")
    distances = {"dropout_effect_to_peft": effects[0] / effects[1]}
    if x.dtype == torch.float32:
        torch.manual_seed(4)
        ours.step(x, context, gradients)
        slope = _slope(ours, x, context, gradients)
        steepness = math.sqrt(sum(factor.grad.square().sum().item() for factor in ours.factors))
        distances["slope_to_gradient"] = slope / steepness
        if not abs(slope / steepness - 1) <= 0.01:
            raise DisagreementError(f"with dropout the slope is {slope:.4g} where the gradient says {steepness:.4g}")
    return distances


def _slope(
    contestant: Contestant, x: torch.Tensor, context: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> float:
    """Of <outputs, gradients> along the unit vector of the factors' gradients, by a central difference."""
    length = math.sqrt(sum(factor.grad.square().sum().item() for factor in contestant.factors))
    start = [factor.detach().clone() for factor in contestant.factors]
    size = math.sqrt(sum(factor.square().sum().item() for factor in start))
    values = []
    with torch.no_grad():
        for reach in (1e-2 * size, -1e-2 * size):
            for factor, origin in zip(contestant.factors, start):
                factor.copy_(origin + reach * factor.grad / length)
            torch.manual_seed(4)
            outputs = contestant.module(x, *context)
            values.append(sum((y.double() * g.double()).sum().item() for y, g in zip(outputs, gradients)))
        for factor, origin in zip(contestant.factors, start):
            factor.copy_(origin)
    return (values[0] - values[1]) / (2e-2 * size)
