"""A base model in fewer bits: `--quantize nf4|int8|fp8`.

Linear layers and convolutions inside a model's numbered blocks are stored in fewer bits and computed with in the run's
precision: over 99 % of the weights of Stable Diffusion's UNet. What the model reads and writes with (conv_in, conv_out,
the embedding of the time, a text encoder's words and projection), norms and biases keep the run's precision.

Bits per weight, and the error of a weight that is normally distributed, relative to its size:
    nf4   4.13   9 %    QLoRA's (Dettmers et al. 2023), by bitsandbytes; linear layers only, convolutions are int8
    int8  8      0.8 %  one scale for each output, weights only
    fp8   8      2.6 %  e4m3, one scale for each output
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lora_diffusion.errors import ConfigError
from lora_diffusion.layers import base_class
from lora_diffusion.layers.weight_only import exchange_class, scheme_for, store_weight
from lora_diffusion.state import state_of

MODES = ("nf4", "int8", "fp8")
_BLOCK, _NESTED = 64, 256  # bitsandbytes: weights to a scale, and scales to a scale of scales


def check_quantize(mode: str, device: torch.device | str) -> None:
    """Raises ConfigError where this machine cannot do it: to be asked before a model is loaded."""
    if mode not in MODES:
        raise ConfigError(f"--quantize {mode}: choose from {', '.join(MODES)}")
    if mode == "nf4" and find_spec("bitsandbytes") is None:
        raise ConfigError("--quantize nf4 needs the package bitsandbytes: pip install bitsandbytes, or --quantize int8")
    if mode == "fp8" and torch.device(device).type == "mps":
        raise ConfigError("--quantize fp8: PyTorch has no fp8 on Apple GPUs; --quantize int8 is as small")


def quantise(component: nn.Module, mode: str, *, precision: torch.dtype, device: torch.device | str = "cpu") -> int:
    """Store the weights of a frozen model in fewer bits, layer after layer, on `device`; the rest stays where it is.

    At no time is more of the model on the device in its old precision than one layer. Adapters may be inside.

    Args:
        precision: what NF4's layers compute in; the others compute in the precision of what they are given.

    Returns:
        The number of layers.

    Raises:
        ConfigError: adapters are merged into the weights.
    """
    state = state_of(component)
    if state is not None and state.merged is not None:
        raise ConfigError("adapters are merged into these weights: unmerge them, quantise, and leave them unmerged")
    done = 0
    for path, layer in _layers(component):
        scheme = scheme_for(component, path, layer, mode)
        if scheme == "nf4":
            _store_nf4(layer, precision, device)
        else:
            store_weight(layer, scheme, device)
        if state is not None and f"{path}.weight" in state.frozen:
            state.frozen.remove(f"{path}.weight")
        done += 1
    return done


def held_bytes(component: nn.Module) -> int:
    """Bytes of all weights and buffers as they are stored, the scales of NF4 included."""
    tensors = [*component.parameters(), *component.buffers()]
    return sum(t.numel() * t.element_size() for tensor in tensors for t in (tensor, *_statistics(tensor)))


def planned_bytes(component: nn.Module, mode: str | None, precision: torch.dtype) -> int:
    """`held_bytes` of a model after loading it in `precision` and `quantise`, from its shapes: it may be on meta."""
    total = sum(t.numel() for t in component.parameters()) * precision.itemsize
    total += sum(t.numel() * (precision if t.is_floating_point() else t.dtype).itemsize for t in component.buffers())
    for path, layer in _layers(component) if mode is not None else ():
        count = layer.weight.numel()
        total -= count * precision.itemsize
        if scheme_for(component, path, layer, str(mode)) == "nf4":
            blocks = -(-count // _BLOCK)
            codes = 4 * (16 + 256 + 1)  # the sixteen values, those of the scales, and the scales' mean
            total += -(-count // 2) + blocks + 4 * -(-blocks // _NESTED) + codes
        else:
            total += count + 4 * int(layer.weight.shape[0])
    return total


def _layers(component: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of those that are stored in fewer bits: whole Linear and Conv2d layers in numbered blocks."""
    for path, module in list(component.named_modules()):
        inside = any(part.isdigit() for part in path.split("."))
        if inside and base_class(module) in (nn.Linear, nn.Conv2d) and ".copy_" not in f".{path}":
            yield path, module


def _store_nf4(layer: Any, precision: torch.dtype, device: torch.device | str) -> None:
    """Make a Linear layer bitsandbytes' Linear4bit where it stands, so that adapters and hooks stay at it."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[import-not-found, unused-ignore]

    options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    pattern = Linear4bit(1, 1, compute_dtype=precision, device="meta", **options)
    exchange_class(layer, Linear4bit)
    for name, value in vars(pattern).items():
        vars(layer).setdefault(name, value)
    # Without gradients bitsandbytes would repack the weight for this processor, and then compute no gradient by it.
    layer.support_avx512bf16_for_cpu = False
    layer.weight = Params4bit(layer.weight.detach(), requires_grad=False, module=layer, **options).to(device)


def _statistics(tensor: torch.Tensor) -> list[torch.Tensor]:
    found = []
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        found += [t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor)]
        state = state.state2
    return found
