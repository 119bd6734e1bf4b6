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
_INITS = re.compile(r"gaussian|orthogonal|olora|pissa(_niter_[1-9]\d{0,2})?")


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
        False: A and B both random, so the adapter has an effect before any training (meant for tests). From the base
        weight: "pissa" and "pissa_niter_16" (Meng et al. 2024), "olora" (Büyükakyüz 2024); from random orthogonal rows
        whose product is zero: "orthogonal". The base weight itself is never changed.
    use_dora: learn each output's length apart from its direction (Liu et al. 2024, "DoRA").
    layers_to_transform: numbers of the blocks to adapt, as in "…h.3.attn"; layers_pattern: the name in front of the
        number, where a path has several.
    modules_to_save: names of modules to learn whole copies of, beside the low-rank terms (a new head, say).

    inference_mode: PEFT's: whether the adapter is made frozen (`get_peft_model`); `add_adapter` makes one that learns.

    bias is accepted as "none" only.
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
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    bias: str = "none"
    task_type: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        if not is_number(self.lora_dropout) or not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout={self.lora_dropout!r}: give a probability from 0 up to, not including, 1")
        for name in ("use_rslora", "use_dora", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: give True or False")
        _check_names("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            _check_names("exclude_modules", self.exclude_modules)
        for pattern, rank in _checked_pattern("rank_pattern", self.rank_pattern).items():
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in _checked_pattern("alpha_pattern", self.alpha_pattern).items():
            _check_alpha(f"alpha_pattern[{pattern!r}]", alpha)
        if not (isinstance(self.init_lora_weights, bool) or _INITS.fullmatch(str(self.init_lora_weights))):
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r}: give True, False, "
                '"gaussian", "orthogonal", "olora", "pissa" or "pissa_niter_16"'
            )
        _check_layers(self.layers_to_transform, self.layers_pattern)
        if self.modules_to_save is not None:
            _check_names("modules_to_save", self.modules_to_save)
        if self.task_type is not None and not isinstance(self.task_type, str):
            raise ConfigError(f"task_type={self.task_type!r}: give a name or None")
        if self.bias != "none":
            raise ConfigError(f"bias={self.bias!r} is not supported by this version; leave it at 'none'")

    def chooses_layer(self, path: str) -> bool:
        """Whether layers_to_transform lets the module at `path` in: by the number after layers_pattern, else the last
        number in the path that is followed by more (PEFT's rule)."""
        if self.layers_to_transform is None:
            return True
        wanted = self.layers_to_transform
        numbers = {wanted} if isinstance(wanted, int) else set(wanted)
        names = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        name = "|".join(map(re.escape, names)) if names else r"[^.]*"
        found = re.match(rf"(?:.*\.)?(?:{name})\.(\d+)\.", path)
        return found is not None and int(found[1]) in numbers

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


def _check_layers(numbers: object, pattern: object) -> None:
    listed: Any = [numbers] if isinstance(numbers, int) else numbers
    if listed is None:
        if pattern is not None:
            raise ConfigError(f"layers_pattern={pattern!r} needs layers_to_transform")
        return
    fine = isinstance(listed, Sequence | set | frozenset) and not isinstance(listed, str) and listed
    if not fine or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in listed):
        raise ConfigError(f"layers_to_transform={numbers!r}: give a block's number, from 0 on, or a list of them")
    if pattern is not None:
        _check_names("layers_pattern", pattern)


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
