"""Settings: one frozen dataclass per job is the single source of its flags, its JSON, its checks and its docs.

A job's config is a plain `@dataclass(frozen=True)` whose fields are made with `setting(...)`. Everything else is
derived from the fields: `app/options.py` makes the command line, `to_dict` and `from_dict` the JSON beside the weights,
`check` the range checks, `differences` the refusal to resume another job. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

from lora_diffusion.errors import ConfigError

T = TypeVar("T")


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    group: str = "general",
    choices: Iterable[str] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    aliases: Iterable[str] = (),
    metavar: str | None = None,
    decides: bool = True,
    positional: bool = False,
    short: str | None = None,
) -> Any:
    """A config field: `dataclasses.field` with what the faces need to know about it.

    Args:
        default: the value when nothing is said; left out, the setting is required.
        help: one sentence for the user, with the unit where there is one.
        group: the heading under which the setting is shown.
        choices: the only values allowed.
        minimum, above, maximum: the range; `above` is an exclusive lower bound.
        aliases: other names for the same setting on the command line.
        metavar: what stands for the value in the help.
        decides: False for settings that do not change the result (previews, logging, places), so that a run may be
            resumed with another value of them.
        positional: given without a flag; a tuple takes any number of values.
        short: one letter that is a flag too ("o" for `-o`).
    """
    metadata = {
        "help": help,
        "group": group,
        "choices": None if choices is None else tuple(choices),
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "aliases": tuple(aliases),
        "metavar": metavar,
        "decides": decides,
        "positional": positional,
        "short": short,
    }
    if isinstance(default, list | dict):
        raise TypeError("a default of a frozen config must not be mutable: use a tuple")
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """One field of a config class, read back: its name, its type and what `setting` was told."""

    name: str
    kind: type  # bool, int, float or str
    optional: bool  # None is allowed
    repeated: bool  # a tuple of `kind`
    default: Any  # MISSING where required
    help: str
    group: str
    choices: tuple[str, ...] | None
    minimum: float | None
    above: float | None
    maximum: float | None
    aliases: tuple[str, ...]
    metavar: str | None
    decides: bool
    positional: bool
    short: str | None

    @property
    def required(self) -> bool:
        return self.default is MISSING


def settings_of(config_class: type) -> tuple[Setting, ...]:
    """The settings of a config class in the order in which they are written."""
    hints = typing.get_type_hints(config_class)
    found = []
    for field in dataclasses.fields(config_class):
        kind, optional, repeated = _kind(hints[field.name])
        meta: dict[str, Any] = {name: field.metadata.get(name) for name in ("help", "group", *_META)}
        meta["aliases"] = field.metadata.get("aliases", ())
        meta["positional"] = field.metadata.get("positional", False)
        meta["decides"] = field.metadata.get("decides", True)
        found.append(Setting(field.name, kind, optional, repeated, field.default, **meta))
    return tuple(found)


_META = ("choices", "minimum", "above", "maximum", "metavar", "short")


def check(config: Any) -> None:
    """Check every field of `config` for type, choices and range.

    Raises:
        ConfigError: naming the first field that cannot be used, its value and what is allowed.
    """
    for item in settings_of(type(config)):
        value = getattr(config, item.name)
        if value is None:
            if not item.optional:
                raise ConfigError(f"--{item.name} is not set: {item.help}")
            continue
        for one in value if item.repeated else (value,):
            _check_value(item, one)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready values."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()
    }


def from_dict(config_class: type[T], values: Mapping[str, Any]) -> T:
    """A config from JSON values; settings that are left out take their defaults.

    Raises:
        ConfigError: for a name that is no setting (with the nearest names), a missing one, or a value out of range.
    """
    items = {item.name: item for item in settings_of(config_class)}
    for name in values:
        if name not in items:
            raise ConfigError(f"there is no setting {name!r}{nearest(name, items)}")
    missing = [item.name for item in items.values() if item.required and item.name not in values]
    if missing:
        raise ConfigError(f"missing: {', '.join('--' + name for name in missing)}")
    config = config_class(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})
    check(config)
    return config


def differences(old: Mapping[str, Any], new: Mapping[str, Any], config_class: type) -> list[str]:
    """Names of the settings that decide the result and differ between two `to_dict` values."""
    return [
        item.name for item in settings_of(config_class) if item.decides and old.get(item.name) != new.get(item.name)
    ]


def nearest(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """A clause for an error message: '; did you mean …?' with the closest known names, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(prefix + item for item in close)}?" if close else ""


def _kind(hint: Any) -> tuple[type, bool, bool]:
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [one for one in typing.get_args(hint) if one is not type(None)]
        optional = len(inner) < len(typing.get_args(hint))
        hint = inner[0]
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], optional, True
    return hint, optional, False


def _check_value(item: Setting, value: Any) -> None:
    flag = f"--{item.name}"
    if item.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, item.kind) or (item.kind is int and isinstance(value, bool)):
        raise ConfigError(f"{flag} {value!r} is not {_ARTICLE[item.kind]}")
    if item.choices is not None and value not in item.choices:
        raise ConfigError(f"{flag} {value!r} is not one of {', '.join(item.choices)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if math.isnan(value):
            raise ConfigError(f"{flag} {value} is not a number")
        if item.minimum is not None and value < item.minimum:
            raise ConfigError(f"{flag} {value} is too small: it must be at least {item.minimum:g}")
        if item.above is not None and value <= item.above:
            raise ConfigError(f"{flag} {value} is too small: it must be above {item.above:g}")
        if item.maximum is not None and value > item.maximum:
            raise ConfigError(f"{flag} {value} is too large: it must be at most {item.maximum:g}")


_ARTICLE = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
