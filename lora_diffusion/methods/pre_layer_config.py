"""Settings of prefix-layer tuning. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from .config import MethodConfig, check_count
from .prompt_template import PromptTemplate
from .prompt_tuning_config import MAX_VIRTUAL_TOKENS


@dataclass(frozen=True, kw_only=True)
class PreLayerConfig(MethodConfig):
    """Virtual tokens with learned activations in every layer (PreLayer in Hu et al. 2021, section 5.1).

    prefix_length: how many stand in front of the text. infix_length: how many stand behind it, in front of the answer.
    """

    kind: ClassVar[str] = "pre_layer"

    prefix_length: int
    infix_length: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("prefix_length", self.prefix_length, 0, MAX_VIRTUAL_TOKENS)
        check_count("infix_length", self.infix_length, 0, MAX_VIRTUAL_TOKENS)
        if not 1 <= self.tokens <= MAX_VIRTUAL_TOKENS:
            raise ConfigError(
                f"prefix_length={self.prefix_length} and infix_length={self.infix_length}: together they are "
                f"{self.tokens} virtual tokens, and 1 to {MAX_VIRTUAL_TOKENS} can be"
            )

    @property
    def tokens(self) -> int:
        """How many virtual tokens there are in an input."""
        return self.prefix_length + self.infix_length

    @property
    def rows(self) -> int:
        """How many vectors the embedding answers with."""
        return self.tokens

    @property
    def template(self) -> str | None:
        """Where they stand (see `PromptTemplate`); None: all in front of the input."""
        if not self.infix_length:
            return None
        return f"{{P:{self.prefix_length}}} {{x}} {{P:{self.infix_length}}}".removeprefix("{P:0} ")

    @property
    def parsed(self) -> PromptTemplate | None:
        return None if self.template is None else PromptTemplate.parse(self.template)
