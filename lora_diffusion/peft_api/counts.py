"""How many parameters a model has and how many of them learn, counted as PEFT counts."""

from __future__ import annotations

from torch import nn


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(that learn, all). A parameter under several names counts once; weights in four bits count as what they stand
    for."""
    learning = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        learning += count if parameter.requires_grad else 0
    return learning, total


def counts_line(learning: int, total: int) -> str:
    """The line that `print_trainable_parameters` prints."""
    return f"trainable params: {learning:,d} || all params: {total:,d} || trainable%: {100 * learning / total:.4f}"
