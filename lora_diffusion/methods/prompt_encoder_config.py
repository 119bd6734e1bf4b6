"""How P-tuning is made (Liu et al. 2021). No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from .config import check_count, check_fraction, check_word
from .prompt_template import PromptTemplate
from .prompt_tuning_config import PromptConfig

MAX_HIDDEN, MAX_LAYERS = 2**16, 16

ENCODERS = ("LSTM", "MLP", "NONE")
SHAPES = ("lama", "few-shot", "peft")


@dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig(PromptConfig):
    """Virtual tokens anywhere in a text, whose vectors come out of a small network (Liu et al. 2021).

    template: where they stand: `"{P:3} {mask} {P:3} {x} {P:3}"`, or the paper's code's (3, 3, 3); see `PromptTemplate`.
        None: in front of the input, as in PEFT.
    num_virtual_tokens: given by the template, where there is one.
    encoder_reparameterization_type: the network: "LSTM" or "MLP"; "NONE" leaves bare vectors. None: LSTM with a
        template, as in the paper, and MLP without, as in PEFT.
    encoder_shape: of which code, with token_dim d and encoder_hidden_size h:
        "lama"      LSTM(d, h) both ways, Linear(2h, 2h), ReLU, Linear(2h, d), h = d/2: the paper's code for LAMA
        "few-shot"  LSTM(d, h) both ways, Linear(2h, d), ReLU, Linear(d, d), h = d; MLP: Linear(d, h), ReLU,
                    Linear(h, d), h = d: the paper's code for few-shot SuperGLUE
        "peft"      LSTM as "lama" with h = d; MLP: Linear(d, h), ReLU, Linear(h, h), ReLU, Linear(h, d), h = d
        None: with a template "lama", or "few-shot" for an MLP, which the code for LAMA does not have; else "peft".
    encoder_hidden_size: h. encoder_num_layers: of the LSTM. encoder_dropout: between the LSTM's layers.
    Raises ConfigError.
    """

    kind: ClassVar[str] = "p_tuning"

    template: str | Sequence[int] | PromptTemplate | None = None
    encoder_reparameterization_type: str | None = None
    encoder_shape: str | None = None
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.template is not None:
            template = PromptTemplate.parse(self.template)
            plain = template.text if isinstance(self.template, str | PromptTemplate) else tuple(self.template)
            object.__setattr__(self, "template", plain)
            if self.num_virtual_tokens not in (None, template.num_virtual_tokens):
                raise ConfigError(
                    f"num_virtual_tokens={self.num_virtual_tokens}, and the template has "
                    f"{template.num_virtual_tokens}: leave num_virtual_tokens out"
                )
            object.__setattr__(self, "num_virtual_tokens", template.num_virtual_tokens)
        super().__post_init__()
        given = self.encoder_reparameterization_type
        encoder = getattr(given, "value", given) or ("MLP" if self.template is None else "LSTM")  # PEFT has an enum
        check_word("encoder_reparameterization_type", encoder, ENCODERS)
        usual = "peft" if self.template is None else "few-shot" if encoder == "MLP" else "lama"
        shape = self.encoder_shape or usual
        check_word("encoder_shape", shape, SHAPES)
        object.__setattr__(self, "encoder_reparameterization_type", encoder)
        object.__setattr__(self, "encoder_shape", shape)
        if self.encoder_hidden_size is not None:
            check_count("encoder_hidden_size", self.encoder_hidden_size, 1, MAX_HIDDEN)
        check_count("encoder_num_layers", self.encoder_num_layers, 1, MAX_LAYERS)
        check_fraction("encoder_dropout", self.encoder_dropout)
        if encoder == "MLP" and shape == "lama":
            raise ConfigError("encoder_shape='lama' is an LSTM's: choose 'few-shot' or 'peft' for an MLP")
        if encoder == "MLP" and (self.encoder_num_layers != 2 or self.encoder_dropout):
            raise ConfigError("encoder_num_layers and encoder_dropout are an LSTM's: leave them out for an MLP")

    @property
    def parsed(self) -> PromptTemplate | None:
        return None if self.template is None else PromptTemplate.parse(self.template)
