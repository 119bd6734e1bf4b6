"""Prefix-layer tuning, PreLayer (Hu et al. 2021, LoRA, section 5.1): virtual tokens whose activations are learned in
every layer, not only after the embedding.

A model of L blocks and width d gets L · d · (prefix_length + infix_length) parameters to learn: a vector for each
virtual token after the embedding, and one after each block but the last, whose activations no other token sees.

The tokens get into an input as those of every other prompt do: `prepend_prompt` for a prefix, a template for an infix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..layers.virtual_tokens import VirtualPart
from .blocks import stacks_or_refuse
from .pre_layer_config import PreLayerConfig
from .prompt_piece import PromptPiece, prompt_hosts
from .prompt_tuning_config import PromptTuningConfig


class LayerVectors(VirtualPart):
    """vectors: (n, d), after the embedding. activations: (blocks - 1, n, d), after each block but the last."""

    def __init__(self, vectors: torch.Tensor, activations: torch.Tensor) -> None:
        super().__init__()
        self.vectors, self.activations = nn.Parameter(vectors), nn.Parameter(activations)

    def forward(self) -> torch.Tensor:
        return self.vectors


@dataclass
class _Marks:
    """Where one adapter's virtual tokens stand in the input that is under way, None if nowhere.

    rows: (batch, tokens) int64, which virtual token each is; below 0 or beyond their number for real ones.
    """

    part: LayerVectors
    rows: torch.Tensor | None = None


@dataclass
class _Step:
    """What the hook behind one block has to know of it: its number, None for the last."""

    marks: _Marks
    number: int | None


class PreLayer(PromptPiece):
    """One adapter's virtual tokens in one component, and what replaces them behind its blocks."""

    config: PreLayerConfig  # type: ignore[assignment]

    def __init__(
        self, config: PreLayerConfig, name: str, hosts: Sequence[Any], part: LayerVectors, blocks: Sequence[nn.Module]
    ) -> None:
        super().__init__(config, name, hosts, part)  # type: ignore[arg-type]
        self._blocks, marks = list(blocks), _Marks(part)
        setattr(self.hosts[0], self._attribute, marks)
        self._handles = [self.hosts[0].register_forward_hook(partial(_mark, self._attribute))]
        for number, block in enumerate(self._blocks):
            setattr(block, self._attribute, _Step(marks, number if number < len(self._blocks) - 1 else None))
            self._handles.append(block.register_forward_hook(partial(_replace, self._attribute)))

    @property
    def _attribute(self) -> str:
        return f"_lora_diffusion_{self.key}"

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in (self.hosts[0], *self._blocks):
            delattr(module, self._attribute)
        super().remove()


def build(
    component: nn.Module,
    config: PreLayerConfig,
    name: str,
    *,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> PreLayer:
    """Attach virtual tokens. Initial values are normal, as wide as the model's own embeddings.

    Raises AdapterMismatchError for a model without blocks of a known kind, or whose embedding takes no prompt.
    """
    hosts = prompt_hosts(component, PromptTuningConfig(num_virtual_tokens=config.tokens))
    blocks = [block.module for block in stacks_or_refuse(component, "prompt tuning learns virtual tokens there")[0]]
    table = hosts[0].weight
    shape = (len(blocks), config.tokens, table.shape[1])
    if table.is_meta:
        values = torch.empty(shape, device="meta")
    else:
        values = torch.randn(shape, generator=generator) * table.detach().float().std().cpu()
    first, rest = values.to(table.device, dtype).split((1, len(blocks) - 1))
    return PreLayer(config, name, hosts, LayerVectors(first[0].clone(), rest.clone()), blocks)


def _mark(attribute: str, embedding: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Behind the embedding: note where the virtual tokens stand."""
    marks: _Marks = embedding.__dict__[attribute]
    rows = args[0] - marks.part.ids[0]
    looking = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    marks.rows = None if looking and not bool(_virtual(rows, marks.part).any()) else rows


def _replace(attribute: str, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Behind a block: the learned activations in the place of those at virtual tokens. (batch, tokens, d)."""
    step: _Step = block.__dict__[attribute]
    marks, rows = step.marks, step.marks.rows
    if rows is None:
        return None
    if step.number is None:  # this input has gone through
        marks.rows = None
        return None
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    if hidden.shape[0] != rows.shape[0]:  # generation gives each row its beams one after the other
        rows = rows.repeat_interleave(hidden.shape[0] // rows.shape[0], dim=0)
    rows = rows.to(hidden.device)
    learned = marks.part.activations[step.number].to(hidden.device, hidden.dtype)
    chosen = nn.functional.embedding(rows.clamp(0, learned.shape[0] - 1), learned)
    replaced = torch.where(_virtual(rows, marks.part).unsqueeze(-1), chosen, hidden)
    return (replaced, *output[1:]) if isinstance(output, tuple) else replaced


def _virtual(rows: torch.Tensor, part: LayerVectors) -> torch.Tensor:
    return (rows >= 0) & (rows < part.vectors.shape[0])
