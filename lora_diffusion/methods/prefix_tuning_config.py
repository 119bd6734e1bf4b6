"""Settings of prefix tuning and P-tuning v2. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from .config import MethodConfig, check_count, check_fraction

_MAX_TOKENS, _MAX_HIDDEN, _MAX_WIDTH, _MAX_LAYERS = 8192, 16_384, 1_000_000, 10_000


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(MethodConfig):
    """Learned keys and values in front of every layer's (Li & Liang 2021; P-tuning v2, Liu et al. 2022). Fields and
    their meaning are PEFT's.

    num_virtual_tokens: how many keys and values each layer gets.
    prefix_projection: learn them through an embedding and two linear layers with a tanh between, which steadies
        training, rather than as they are.
    encoder_hidden_size: width between those two layers; by default that of the keys. 512 in P-tuning v2.
    prefix_dropout: share of the keys' and values' numbers that a training step leaves out. Not PEFT's; P-tuning v2's.
    init_weights: None for random values, "zero" for zeros.
    token_dim, num_attention_heads, num_layers: width of a layer's keys, heads that they are split into, layers that get
        a prefix. Read off the model; where they are given they have to be the model's.
    """

    kind: ClassVar[str] = "prefix_tuning"

    num_virtual_tokens: int
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    prefix_dropout: float = 0.0
    init_weights: str | None = None
    token_dim: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_virtual_tokens", self.num_virtual_tokens, 1, _MAX_TOKENS)
        check_fraction("prefix_dropout", self.prefix_dropout)
        limits = {
            "encoder_hidden_size": _MAX_HIDDEN,
            "token_dim": _MAX_WIDTH,
            "num_attention_heads": _MAX_WIDTH,
            "num_layers": _MAX_LAYERS,
        }
        for name, limit in limits.items():
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1, limit)
        if not isinstance(self.prefix_projection, bool):
            raise ConfigError(f"prefix_projection={self.prefix_projection!r}: give True or False")
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ConfigError(
                f"encoder_hidden_size={self.encoder_hidden_size} goes with prefix_projection=True: set that, or leave "
                "it out"
            )
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f"init_weights={self.init_weights!r}: give None (random) or 'zero'")
