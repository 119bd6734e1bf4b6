"""What the configs of all methods but LoRA have in common. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """kind: the method's word, in files and in messages.

    task_type: what the model is for, one of PEFT's words ("CAUSAL_LM", "SEQ_CLS" …); it only describes.
    modules_to_save: names of modules that are learned along as whole copies: a new head.
    inference_mode: PEFT's: whether the adapter is made frozen (`get_peft_model`); `add_adapter` makes one that learns.
    """

    kind: ClassVar[str] = ""

    task_type: str | None = None
    modules_to_save: Sequence[str] | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        names = self.modules_to_save
        if names is not None and (
            isinstance(names, str) or not names or not all(isinstance(name, str) and name for name in names)
        ):
            raise ConfigError(f"modules_to_save={names!r}: give a list of module names")
        if not isinstance(self.inference_mode, bool):
            raise ConfigError(f"inference_mode={self.inference_mode!r}: give True or False")
        if self.task_type is not None and not isinstance(self.task_type, str):
            raise ConfigError(f"task_type={self.task_type!r}: give one of PEFT's words, such as 'CAUSAL_LM'")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, `kind` among them; `registry.config_from_dict` is the way back."""
        values = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"kind": self.kind, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises ConfigError for a field that does not exist or a value that is not allowed."""
        known = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in values.items() if name != "kind"}
        unknown = sorted(str(name) for name in given if name not in known)
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}"
            )
        try:
            return cls(**given)
        except TypeError as problem:
            raise ConfigError(f"{cls.__name__}: {problem}") from None


def check_count(name: str, value: object, low: int, high: int) -> int:
    """A whole number between two bounds, both included. Raises ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r}: give a whole number from {low} to {high}")
    return value


def check_fraction(name: str, value: object) -> float:
    """A probability, below 1. Raises ConfigError."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ConfigError(f"{name}={value!r}: give a number from 0 to below 1")
    return float(value)


def check_word(name: str, value: object, known: Sequence[str]) -> None:
    """Raises ConfigError for a word that is not among those known."""
    if value not in known:
        raise ConfigError(f"{name}={value!r}: give one of {', '.join(map(repr, known))}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
