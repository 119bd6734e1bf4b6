"""What a LoRA adapter should be: ranks, scales, targets. Field names are PEFT's, so that configs carry over.

No torch here: command lines and forms are built from this file, and they have to answer at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from .errors import ConfigError

MAX_RANK = 8192


@dataclass(frozen=True)
class LoraConfig:
    """Settings of a low-rank adapter, y = W·x + s·B·A·x (Hu et al. 2021, "LoRA", section 4.1).

    r: rank, the height of A and the width of B.
    lora_alpha: the scale is s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (Kalajdzievski 2023).
    target_modules: a preset ("attention", "attention-qv", "all-linear"), a name or suffix, a list of them, or a regex
        that has to match the whole module path.
    exclude_modules: the same, for modules to leave out.
    lora_dropout: probability of dropping an input element on the way to A, in training mode only.
    rank_pattern, alpha_pattern: {module path, suffix or regex: value} for modules that differ from r and lora_alpha.
    init_lora_weights: True: A uniform (Kaiming, a=√5), B zero; "gaussian": A normal with deviation 1/r, B zero;
        False: A and B both random, so the adapter has an effect before any training (meant for tests).

    use_dora, layers_to_transform, modules_to_save and bias are accepted with their neutral values only.
    Raises ConfigError, with the value and what to do.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] = "attention"
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    bias: str = "none"
    task_type: str | None = None

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        if not is_number(self.lora_dropout) or not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout={self.lora_dropout!r}: give a probability from 0 up to, not including, 1")
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: give True or False")
        _check_names("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            _check_names("exclude_modules", self.exclude_modules)
        for pattern, rank in _checked_pattern("rank_pattern", self.rank_pattern).items():
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in _checked_pattern("alpha_pattern", self.alpha_pattern).items():
            _check_alpha(f"alpha_pattern[{pattern!r}]", alpha)
        if not (isinstance(self.init_lora_weights, bool) or self.init_lora_weights == "gaussian"):
            raise ConfigError(f'init_lora_weights={self.init_lora_weights!r}: give True, False or "gaussian"')
        if self.task_type is not None and not isinstance(self.task_type, str):
            raise ConfigError(f"task_type={self.task_type!r}: give a name or None")
        self._refuse_what_is_not_built()

    def _refuse_what_is_not_built(self) -> None:
        neutral = {"use_dora": False, "layers_to_transform": None, "modules_to_save": None, "bias": "none"}
        for name, value in neutral.items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not supported by this version; leave it at {value!r}"
                )

    def rank_for(self, path: str) -> int:
        """The rank of the module at `path`: the first rank_pattern that fits, else r."""
        return _first_match(self.rank_pattern, path, self.r)

    def scale_for(self, path: str) -> float:
        """s of the module at `path`: alpha / rank, or alpha / sqrt(rank) with use_rslora."""
        rank = self.rank_for(path)
        alpha = float(_first_match(self.alpha_pattern, path, self.lora_alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `LoraConfig.from_dict` is the way back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Raises ConfigError for a field that does not exist or a value that is not allowed."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ConfigError(
                f"LoraConfig has no field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}"
            )
        return cls(**values)


def pattern_fits(pattern: str, path: str) -> bool:
    """PEFT's rule for rank_pattern and alpha_pattern: a regex that fits `path` whole, or from one of its dots on."""
    return re.match(rf"(.*\.)?(?:{pattern})$", path) is not None


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if pattern_fits(pattern, path)), default)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value, perhaps from a file, is a finite int or float."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def _check_rank(name: str, rank: object) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"{name}={rank!r}: a rank is a whole number from 1 to {MAX_RANK}")


def _check_alpha(name: str, alpha: object) -> None:
    if not is_number(alpha) or not alpha > 0:
        raise ConfigError(f"{name}={alpha!r}: give a finite number above 0 (equal to the rank means a scale of 1)")


def _check_names(name: str, value: object) -> None:
    if isinstance(value, str):
        if not value:
            raise ConfigError(f"{name} is empty: give a preset, a module name, a list of names or a regex")
        _check_regex(name, value)
    elif not isinstance(value, Sequence | set | frozenset) or not value:
        raise ConfigError(f"{name}={value!r}: give a preset, a module name, a non-empty list of names or a regex")
    elif not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f"{name}={value!r}: every entry of the list has to be a non-empty string")


def _checked_pattern(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
        raise ConfigError(f"{name}={value!r}: give a dict of module name or regex to value")
    for key in value:
        _check_regex(name, key)
    return value


def _check_regex(name: str, text: str) -> None:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{name}: {text!r} is not a valid regular expression ({error})") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return value
