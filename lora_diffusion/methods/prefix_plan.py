"""Which prefixes a batch meets: all adapters' of a component, which of them act, and in which rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .prefix_encoder import PrefixEncoder
from .prefix_site import Site

ATTRIBUTE = "_lora_diffusion_prefixes"  # of modules with hooks, and of the component


@dataclass
class Plan:
    """Which prefixes a batch meets. encoders: whose, one after the other. tokens: of the longest row.

    For a batch of mixed rows, else None: index, (rows, tokens) int64, into the prefixes one after the other; visible,
    (rows, tokens) bool. Shorter prefixes stand at the right, next to the real tokens.
    masks: those that the layers of a forward pass share: given, what for, widened.
    """

    encoders: list[PrefixEncoder]
    tokens: int
    index: torch.Tensor | None = None
    visible: torch.Tensor | None = None
    masks: list[Any] = field(default_factory=list)

    def in_front(self, layer: int, keys: torch.Tensor, cache: Any) -> torch.Tensor:
        """(2, batch, heads, tokens, size): prefix keys and values for a layer whose own keys are (batch, heads, …,
        size), in their dtype. cache: the layer's, None without one."""
        batch, device = keys.shape[0], keys.device
        parts = [encoder.for_batch(layer, batch, cache).to(device) for encoder in self.encoders]
        chosen = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if self.index is not None:
            chosen = chosen[torch.arange(batch, device=device)[:, None], _repeated(self.index, batch, device)]
        return chosen.permute(2, 0, 3, 1, 4).to(keys.dtype)

    def shift(self, batch: int, device: torch.device) -> torch.Tensor | int:
        """By how much positions move up: a number, or (batch, 1); of a batch of 1, positions that all rows share,
        (rows, 1)."""
        if self.visible is None:
            return self.tokens
        return _repeated(self.visible, max(batch, len(self.visible)), device).sum(1, keepdim=True)

    def widened(
        self,
        mask: torch.Tensor | None,
        batch: int,
        queries: int,
        keys: int,
        causal: bool,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> torch.Tensor | None:
        """A mask, (batch or 1, heads or 1, queries or 1, keys), bool or added to the scores, with columns for the
        prefix in front. None stays None where all may see all.

        causal: what None means to the layer. dtype, device: of a mask that has to be made; None for bool.
        """
        if mask is None:
            if self.visible is None and (not causal or queries == 1):
                return None
            own = torch.ones(queries, keys, dtype=torch.bool, device=device)
            mask = (own.tril() if causal and queries > 1 else own)[None, None]
            mask = mask if dtype is None else _added(mask, dtype)
        if self.visible is None:
            front = mask.new_ones(1, 1, 1, self.tokens, dtype=torch.bool)
        else:
            front = _repeated(self.visible, batch, mask.device)[:, None, None]
            mask = mask.expand(batch, -1, -1, -1)
        front = front if mask.dtype is torch.bool else _added(front, mask.dtype)
        return torch.cat([front.expand(*mask.shape[:3], -1), mask], dim=3)


@dataclass
class Prefixes:
    """All prefixes of one component: by adapter's name what is learned, how strongly it acts (0 or 1), and in which
    rows of a mixed batch; `plan` is what follows from them, None where nothing acts."""

    site: Site
    encoders: dict[str, PrefixEncoder] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    by_row: dict[str, list[float]] = field(default_factory=dict)
    plan: Plan | None = None
    _hooked: list[nn.Module] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def hook(self, module: nn.Module, note: Any, *, before: Any = None, after: Any = None) -> None:
        """Hooks in front of and behind a module, which find `note` on it (hence on its copies theirs)."""
        setattr(module, ATTRIBUTE, note)
        self._hooked.append(module)
        if before is not None:
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            self._handles.append(module.register_forward_hook(after))

    def unhook(self) -> None:
        """Take all hooks out; nothing of them is left."""
        for handle in self._handles:
            handle.remove()
        for module in self._hooked:
            delattr(module, ATTRIBUTE)

    def arrange(self) -> None:
        """Bring `plan` in line with the rest."""
        rows = max((len(weights) for weights in self.by_row.values()), default=0)
        weights = {n: self.by_row.get(n, [self.weights.get(n, 0.0)] * max(rows, 1)) for n in self.encoders}
        acting = {name: values for name, values in weights.items() if any(values)}
        encoders = [self.encoders[name] for name in acting]
        self.plan = None
        if encoders and rows:
            self.plan = Plan(encoders, *_right_aligned([encoder.tokens for encoder in encoders], list(acting.values())))
        elif encoders:
            self.plan = Plan(encoders, sum(encoder.tokens for encoder in encoders))


def _right_aligned(lengths: list[int], weights: list[list[float]]) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(tokens, index, visible) of a Plan. lengths: of each prefix; weights: of each, for each row."""
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    rows = [
        [start + i for start, length, values in zip(starts, lengths, weights) if values[row] for i in range(length)]
        for row in range(len(weights[0]))
    ]
    tokens = max(map(len, rows))
    index = torch.tensor([[0] * (tokens - len(row)) + row for row in rows])
    visible = torch.tensor([[False] * (tokens - len(row)) + [True] * len(row) for row in rows])
    return tokens, index, visible


def _repeated(rows: torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
    """(batch, …): what is known of each row, for a batch that repeats the rows. Raises ConfigError if it does not."""
    if batch % len(rows):
        raise ConfigError(
            f"adapters_per_sample was told {len(rows)} adapters and the batch has {batch} rows: "
            "name one adapter (or None) for each row"
        )
    return rows.repeat_interleave(batch // len(rows), dim=0).to(device)


def _added(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask that is added to scores: 0 where something is visible, else the lowest number."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
