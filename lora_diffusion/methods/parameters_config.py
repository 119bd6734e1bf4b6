"""Learning parameters that the model has already: biases, the top blocks, or everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from .config import MethodConfig, check_count, check_word

BIAS_TERMS = ("all", "query_mlp")
KEPT_ON = ("same", "cpu")
MAX_BLOCKS = 4096


@dataclass(frozen=True, kw_only=True)
class ParametersConfig(MethodConfig):
    """What the three below have in common. What is learned starts as a copy of the base's parameters, in their dtype,
    and takes their place while it acts.

    keep_base_on: where the base's own parameters wait meanwhile: "same" device, or "cpu", which frees as much memory
        on the device as is learned; switching then copies, and a model that is moved takes it along until the next
        switch. It has the same bits when it is back.
    Raises ConfigError.
    """

    keep_base_on: str = "same"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("keep_base_on", self.keep_base_on, KEPT_ON)


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(ParametersConfig):
    """The biases alone (Ben Zaken et al. 2022, "BitFit").

    bias_terms: "all" biases of the model, those of norms included; or "query_mlp": those of the attention's queries and
        of the MLP's first layer, the paper's b_q and b_m2 (section 4), about half as many.
    """

    kind: ClassVar[str] = "bitfit"

    bias_terms: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("bias_terms", self.bias_terms, BIAS_TERMS)


@dataclass(frozen=True, kw_only=True)
class TopLayersConfig(ParametersConfig):
    """The top blocks alone, as they are; FT-Top2 of Li and Liang (2021) with two.

    num_layers: how many blocks, from the output down; of a model with encoder and decoder, the decoder's.
    final_norm: the norm behind the last block too, where the model has one. Off, as in freeze tuning elsewhere; it
        changes a count by 2·d.
    A head goes into `modules_to_save`.
    """

    kind: ClassVar[str] = "top_layers"

    num_layers: int = 2
    final_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_layers", self.num_layers, 1, MAX_BLOCKS)
        if not isinstance(self.final_norm, bool):
            raise ConfigError(f"final_norm={self.final_norm!r}: give True or False")


@dataclass(frozen=True, kw_only=True)
class FullConfig(ParametersConfig):
    """All parameters of the model: full fine-tuning, with a base to go back to. The base is kept, hence twice the
    memory for weights (see keep_base_on)."""

    kind: ClassVar[str] = "full"
