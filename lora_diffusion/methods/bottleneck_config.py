"""Bottleneck adapters: which, where, how wide."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..config import is_number
from ..errors import ConfigError
from .config import MethodConfig, check_count, check_word

PLACEMENTS = ("houlsby", "pfeiffer", "lin")
NON_LINEARITIES = ("relu", "gelu", "silu", "tanh")
INITS = ("houlsby", "zero")
MAX_SIZE = 1 << 16
MAX_WIDENING = 4  # r may be that many times d
MAX_BLOCKS = 4096
DEFAULT_REDUCTION = 16


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(MethodConfig):
    """Small networks d -> r -> d on what a transformer's blocks compute: h + U·f(D·h + b) + c, for each position.

    placement: "houlsby": after the attention's and after the MLP's output, before the residual sum (Houlsby et al.
        2019, who learn the norms along: modules_to_save=["LayerNorm"]). "pfeiffer": after the MLP alone; where the
        block has a norm behind its residual sum (BERT), D reads behind that norm and the sum goes through the norm
        again: norm(s + U·f(D·norm(s)…)) with s the sum (Pfeiffer et al. 2021); where it has none (GPT-2, Llama, T5) D
        reads the MLP's output. "lin": after the MLP alone, through a LayerNorm of its own (Lin et al. 2020; the
        Adapter-L of the LoRA paper, section 5.1).
    bottleneck_size: r; or reduction_factor: d / r. 16 for neither.
    non_linearity: f; by default GELU with "houlsby", as in its authors' code, and ReLU with the others.
    leave_out: numbers of blocks without adapters, from 0 on; range(n) for the first n (AdapterDrop, Rücklé et al.
        2021). The blocks of a decoder are counted on from the encoder's.
    init_weights: "houlsby": D and U from N(0, 0.01²) cut at two deviations, nearly the base at the start; "zero": U
        zero, exactly the base. Biases are zero.
    target_modules: the modules whose outputs are adapted, by whole paths, suffixes of paths or a regex: for models
        whose blocks are not known. "houlsby" and "pfeiffer" then differ in f alone.
    Raises ConfigError.
    """

    kind: ClassVar[str] = "bottleneck"

    placement: str = "houlsby"
    bottleneck_size: int | None = None
    reduction_factor: float | None = None
    non_linearity: str | None = None
    leave_out: Sequence[int] = ()
    init_weights: str = "houlsby"
    target_modules: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("placement", self.placement, PLACEMENTS)
        check_word("init_weights", self.init_weights, INITS)
        if self.non_linearity is not None:
            check_word("non_linearity", self.non_linearity, NON_LINEARITIES)
        if self.bottleneck_size is not None:
            check_count("bottleneck_size", self.bottleneck_size, 1, MAX_SIZE)
        if self.reduction_factor is not None and self.bottleneck_size is not None:
            raise ConfigError(
                f"bottleneck_size={self.bottleneck_size} and reduction_factor={self.reduction_factor}: give one of them"
            )
        factor = self.reduction_factor
        if factor is not None and not (is_number(factor) and 1 / MAX_WIDENING <= factor <= MAX_SIZE):
            raise ConfigError(f"reduction_factor={factor!r}: give a number from 1/{MAX_WIDENING} to {MAX_SIZE}")
        _check_blocks(self.leave_out)
        _check_names(self.target_modules)
        if self.target_modules is not None and len(self.leave_out):
            raise ConfigError("leave_out goes by blocks, target_modules by names: name only the modules that you want")

    @property
    def activation(self) -> str:
        """The word for f, as published where none was chosen."""
        return self.non_linearity or ("gelu" if self.placement == "houlsby" else "relu")

    def size_for(self, width: int) -> int:
        """r beside activations of `width` channels. Raises ConfigError for one that is far beyond them."""
        if self.bottleneck_size is not None:
            return check_count("bottleneck_size", self.bottleneck_size, 1, MAX_WIDENING * width)
        return max(1, math.floor(width / (self.reduction_factor or DEFAULT_REDUCTION)))


def _check_blocks(numbers: object) -> None:
    if (
        not isinstance(numbers, Sequence)
        or isinstance(numbers, str)
        or len(numbers) > MAX_BLOCKS
        or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < MAX_BLOCKS for n in numbers)
    ):
        raise ConfigError(f"leave_out={str(numbers)[:80]}: give a list of blocks' numbers, from 0 on, or range(n)")


def _check_names(names: object) -> None:
    if names is None:
        return
    if isinstance(names, str) and names:
        try:
            re.compile(names)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"target_modules: {names!r} is not a valid regular expression ({error})") from None
        return
    if (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or not names
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise ConfigError(f"target_modules={names!r}: give module names, or a regex for whole paths")
