"""The loss of language models where the vocabulary is large: no more logits at a time than are needed.

A row of logits is as wide as the vocabulary, 250,880 words in BLOOM: 1 MB in fp32. Where every position of a row of 512
goes through the head, the logits, their softmax and its gradient take 2 GiB and are most of what a step with a frozen
base in 4 bits takes. Two things are done about it, and neither changes the loss:

* only the positions that the loss counts go through the head: an answer of five words has five of them;
* where these are many, they go through it in pieces that are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

AT_ONCE = 2**25  # logits in a piece: 128 MiB in fp32

# Models whose logits are their head's output as it is. Others scale or cap it, or add a bias of their own (BART).
_PLAIN_HEADS = frozenset(
    (
        "bert", "bloom", "deberta", "deberta-v2", "gpt2", "gpt_neox", "llama", "mistral", "mt5", "phi3", "qwen2",
        "qwen3", "roberta", "t5",
    )
)  # fmt: skip


def answer_logits(model: Any, inputs: Mapping[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """The logits of some positions, (n, vocabulary), in the model's dtype; the others are not computed.

    Args:
        inputs: the model's keyword arguments, without labels.
        positions: (n,) int64, in the flattened (rows, length) of the logits.
    """
    head = _head(model)
    if head is None:
        return model(**inputs).logits.flatten(0, 1)[positions]
    handle = head.register_forward_pre_hook(lambda module, args: (_chosen(args[0], positions)[None], *args[1:]))
    try:
        return model(**inputs).logits[0]
    finally:
        handle.remove()


def answer_loss(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    positions: torch.Tensor,
    targets: torch.Tensor,
    *,
    at_once: int = AT_ONCE,
) -> torch.Tensor:
    """The mean cross-entropy at some positions, a scalar in fp32.

    Args:
        inputs, positions: as for `answer_logits`.
        targets: (n,) int64, the words that should be predicted there.
        at_once: logits to be in memory at a time. It has no effect on models that change them after the head.
    """
    head, count = _head(model), targets.shape[0]
    rows = max(1, at_once // _width(model, head))
    if head is None or count <= rows or model.config.model_type not in _PLAIN_HEADS:
        return cross_entropy(answer_logits(model, inputs, positions).float(), targets)
    hidden: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any) -> Any:
        hidden.append(_chosen(args[0], positions))
        return (hidden[0][None, :1], *args[1:])

    def answer(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """The head says the loss in place of logits: so it stays a part of the model's output, as FSDP expects."""
        for handle in handles:
            handle.remove()
        pieces = zip(hidden.pop().split(rows), targets.split(rows))
        parts = [checkpoint(_sum, module, h, wanted, use_reentrant=False) for h, wanted in pieces]
        return (torch.stack(parts).sum() / count).view(1, 1, 1)

    handles = [head.register_forward_pre_hook(keep), head.register_forward_hook(answer)]
    try:
        return model(**inputs).logits.view(())
    finally:
        for handle in handles:
            handle.remove()


def _sum(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(head(hidden[None])[0].float(), targets, reduction="sum")


def _chosen(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return hidden.flatten(0, 1)[positions]


def _head(model: Any) -> nn.Module | None:
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def _width(model: Any, head: nn.Module | None) -> int:
    return int(getattr(head, "out_features", 0) or getattr(model.config, "vocab_size", 1))
