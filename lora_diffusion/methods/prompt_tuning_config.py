"""How prompt tuning is made (Lester et al. 2021), and what all prompts of virtual tokens have in common. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ConfigError
from .config import MethodConfig, check_count, check_word

MAX_VIRTUAL_TOKENS = 4096  # of one prompt
MAX_TEXT = 100_000  # characters
MAX_SIZE = 2**20  # of what describes a model

INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


@dataclass(frozen=True, kw_only=True)
class PromptConfig(MethodConfig):
    """Virtual tokens in a model's input. The names are PEFT's.

    num_virtual_tokens: how many vectors are learned.
    num_transformer_submodules: 2 keeps as many vectors again, as PEFT does for SEQ_2_SEQ_LM without ever putting
        them into an input: for files that are to be of PEFT's size.
    token_dim, num_layers, num_attention_heads: the model's, if given; token_dim has to be that of its embedding.
    """

    num_virtual_tokens: int | None = None
    num_transformer_submodules: int = 1
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_virtual_tokens", self.num_virtual_tokens, 1, MAX_VIRTUAL_TOKENS)
        check_count("num_transformer_submodules", self.num_transformer_submodules, 1, 2)
        for name in ("token_dim", "num_layers", "num_attention_heads"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1, MAX_SIZE)

    @property
    def tokens(self) -> int:
        """How many virtual tokens one prompt has in the input."""
        assert self.num_virtual_tokens is not None, "__post_init__ has seen it"
        return self.num_virtual_tokens

    @property
    def rows(self) -> int:
        """How many vectors there are."""
        return self.tokens * self.num_transformer_submodules


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(PromptConfig):
    """Virtual tokens whose vectors are learned as they are (Lester et al. 2021).

    prompt_tuning_init: what they start from: "RANDOM", normal values; "SAMPLE_VOCAB", tokens drawn from the model's
        vocabulary; "TEXT", the tokens of `prompt_tuning_init_text`, cut or repeated to the number of vectors.
    tokenizer_name_or_path, tokenizer_kwargs: the tokenizer for that text, as AutoTokenizer takes them. Code that comes
        with a tokenizer is never run.
    Raises ConfigError.
    """

    kind: ClassVar[str] = "prompt_tuning"

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        init = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)  # PEFT has an enum
        object.__setattr__(self, "prompt_tuning_init", init)
        check_word("prompt_tuning_init", init, INITS)
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT):
                raise ConfigError(f"{name}={str(value)[:60]!r}: give a text")
            if init == "TEXT" and value is None:
                raise ConfigError(f"prompt_tuning_init='TEXT' needs {name}: give it")
        kwargs = self.tokenizer_kwargs
        if kwargs is not None and (init != "TEXT" or not isinstance(kwargs, Mapping)):
            raise ConfigError("tokenizer_kwargs are a dict for prompt_tuning_init='TEXT': leave them out")
        if kwargs is not None and "trust_remote_code" in kwargs:
            raise ConfigError("tokenizer_kwargs has trust_remote_code: code that comes with a tokenizer is never run")
