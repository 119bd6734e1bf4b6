"""Bottleneck adapters in a model: small modules on the modules whose outputs they add to.

One forward hook on each adapted module finds the bottlenecks there by itself, among the module's own children. Several
on one module act side by side: each reads the module's output without the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import AdapterMismatchError, ConfigError
from ..targets import find_copies, matches, nearest_words
from .blocks import Site, candidates, out_width, stacks_or_refuse
from .bottleneck_config import BottleneckConfig
from .piece import Piece

_PREFIX = "bottleneck_"
_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
_STD = 0.01  # Houlsby et al. 2019, section 3.6


class Bottleneck(nn.Module):
    """down: (r, d), up: (d, r), with biases (r,) and (d,); norm_weight, norm_bias: (d,), only with `norm`.

    activation: the word for what stands between. again: whether the module is a norm, which has to see its own input
    with the output of this. strength: what multiplies the output; 0.0 leaves the module's alone.
    rows: a strength for each row of the batch instead, or None.
    """

    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(self, down: torch.Tensor, up: torch.Tensor, activation: str, norm: bool, again: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.down_bias = nn.Parameter(down.new_zeros(down.shape[0]))
        self.up_bias = nn.Parameter(up.new_zeros(up.shape[0]))
        self.norm_weight = nn.Parameter(down.new_ones(down.shape[1])) if norm else None
        self.norm_bias = nn.Parameter(down.new_zeros(down.shape[1])) if norm else None
        self.activation, self.again = activation, again
        self.strength = 0.0
        self.rows: tuple[float, ...] | None = None

    def acts(self) -> bool:
        return self.strength != 0.0 if self.rows is None else any(self.rows)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """What is added to h, (batch, …, d), in h's dtype; the parameters are cast to it."""
        x = h
        if self.norm_weight is not None and self.norm_bias is not None:
            x = F.layer_norm(h, h.shape[-1:], self.norm_weight.to(h.dtype), self.norm_bias.to(h.dtype))
        x = F.linear(x, self.down.to(h.dtype), self.down_bias.to(h.dtype))
        x = F.linear(_ACTIVATIONS[self.activation](x), self.up.to(x.dtype), self.up_bias.to(x.dtype)).to(h.dtype)
        if self.rows is None:
            return x if self.strength == 1.0 else x * self.strength
        times, rest = divmod(h.shape[0], len(self.rows))
        if rest or not times:
            raise ConfigError(
                f"adapters_per_sample was told {len(self.rows)} adapters and the batch has {h.shape[0]} rows: "
                "name one adapter (or None) for each row"
            )
        return x * x.new_tensor(self.rows).repeat_interleave(times).view(-1, *[1] * (x.ndim - 1))


def _add_bottlenecks(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """The forward hook: the output with what the module's bottlenecks make of it."""
    acting = [part for part in module._modules.values() if isinstance(part, Bottleneck) and part.acts()]
    if not acting:
        return None
    h = output[0] if isinstance(output, tuple) else output
    again = [part(h) for part in acting if part.again]
    beside = [part(h) for part in acting if not part.again]
    if again:
        h = module.forward(inputs[0] + sum(again[1:], start=again[0]))
    for term in beside:
        h = h + term
    return (h, *output[1:]) if isinstance(output, tuple) else h


class BottleneckPiece(Piece):
    """The bottlenecks of one adapter. places: {path: the module that carries one}."""

    def __init__(self, config: BottleneckConfig, name: str, places: dict[str, nn.Module]) -> None:
        super().__init__(config, name)
        self._places = places

    def modules(self) -> Iterator[Bottleneck]:
        for module in self._places.values():
            part = module._modules[_PREFIX + self.name]
            assert isinstance(part, Bottleneck), "build() put it there"
            yield part

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{path}.{key}": value
            for path, part in zip(self._places, self.modules())
            for key, value in part.named_parameters()
        }

    def act(self, weight: float) -> None:
        for part in self.modules():
            part.strength, part.rows = weight, None

    def act_in_rows(self, weights: Sequence[float] | None) -> None:
        for part in self.modules():
            part.rows = None if weights is None else tuple(weights)

    def remove(self) -> None:
        for module in self._places.values():
            del module._modules[_PREFIX + self.name]
            if not any(isinstance(part, Bottleneck) for part in module._modules.values()):
                hooks = module._forward_hooks
                for key in [key for key, hook in hooks.items() if hook is _add_bottlenecks]:
                    del hooks[key]


def build(
    component: nn.Module,
    config: BottleneckConfig,
    name: str,
    *,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> BottleneckPiece:
    """Put new bottlenecks into a component, not acting; the values are drawn on the CPU, block by block.

    Raises ConfigError or AdapterMismatchError (blocks of an unknown kind, a name that matches nothing, a block that
    does not exist); the component is then as it was.
    """
    sites = _named_sites(component, config) if config.target_modules is not None else _sites(component, config)
    copied = tuple(f"{path}." for path in find_copies(component, config))
    for site in sites:
        if f"{site.path}.".startswith(copied):
            raise ConfigError(f"modules_to_save names {site.path}, or what it is a part of, which carries a bottleneck")
        if _PREFIX + name in site.module._modules:
            raise ConfigError(f"{site.path} has an adapter {name!r} already, given to it through another target")
    device = next(component.parameters()).device
    made = []
    for site in sites:
        down, up = _initial(config.size_for(site.width), site.width, config.init_weights, generator)
        own = next(site.module.parameters(), None)
        where = device if own is None else own.device
        part = Bottleneck(
            down.to(where, dtype), up.to(where, dtype), config.activation, config.placement == "lin", site.norm
        )
        made.append(part.train(site.module.training))
    for site, part in zip(sites, made):
        if not any(hook is _add_bottlenecks for hook in site.module._forward_hooks.values()):
            site.module.register_forward_hook(_add_bottlenecks)
        site.module.add_module(_PREFIX + name, part)
    return BottleneckPiece(config, name, {site.path: site.module for site in sites})


def _sites(component: nn.Module, config: BottleneckConfig) -> list[Site]:
    names = ", ".join(map(repr, candidates(component)[:6])) or "…"
    way_out = f"name the modules whose outputs are adapted in target_modules, of {names}"
    blocks = [block for stack in stacks_or_refuse(component, way_out) for block in stack]
    beyond = [number for number in config.leave_out if number >= len(blocks)]
    if beyond:
        raise ConfigError(f"leave_out names block {beyond[0]}: the model has {len(blocks)}, 0 to {len(blocks) - 1}")
    kept = [block for block in blocks if block.number not in set(config.leave_out)]
    if not kept:
        raise ConfigError(f"leave_out names all {len(blocks)} blocks: nothing would be learned")
    if config.placement == "houlsby":
        return [site for block in kept for site in (*block.attention(), *block.mlp())]
    if config.placement == "pfeiffer":
        return [site for block in kept for site in block.behind_mlp()]
    return [site for block in kept for site in block.mlp()]


def _named_sites(component: nn.Module, config: BottleneckConfig) -> list[Site]:
    assert config.target_modules is not None, "only called with names"
    ours = (f".{_PREFIX}", ".adapter_")
    there = {path: m for path, m in component.named_modules() if path and not any(part in path for part in ours)}
    named = {path: module for path, module in there.items() if matches(config.target_modules, path)}
    if not named:
        raise AdapterMismatchError(
            f"target_modules={str(config.target_modules)[:80]!r} matches no module of {type(component).__name__}; "
            f"{nearest_words(config.target_modules, there)}"
        )
    hidden = getattr(getattr(component, "config", None), "hidden_size", None)
    found = []
    for path, module in named.items():
        width = out_width(module) or hidden
        if not isinstance(width, int):
            raise AdapterMismatchError(
                f"target_modules: the width of what {path} computes is not known ({type(module).__name__}): "
                "name a linear layer or a norm"
            )
        found.append(Site(path, module, width))
    return found


def _initial(size: int, width: int, init: str, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """D (r, d) and U (d, r) in fp32 on the CPU; see `BottleneckConfig.init_weights`."""
    down, up = torch.empty(size, width), torch.zeros(width, size)
    nn.init.trunc_normal_(down, std=_STD, a=-2 * _STD, b=2 * _STD, generator=generator)
    if init == "houlsby":
        nn.init.trunc_normal_(up, std=_STD, a=-2 * _STD, b=2 * _STD, generator=generator)
    return down, up
