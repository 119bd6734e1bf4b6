"""From a config class to a command line. The fields say it all; here they only become flags.

`-` and `_` in a flag are the same. A switch `--x` has a `--no_x`. An unknown flag is an error that names the nearest
ones. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from lora_diffusion.errors import ConfigError
from train.config import Setting, check, nearest, settings_of

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    """argparse, except that misuse is a `ConfigError` rather than a page of usage and an exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def parse(
    config_class: type[T],
    arguments: Sequence[str],
    *,
    program: str = "",
    description: str = "",
    unsupported: Mapping[str, str] | None = None,
) -> T:
    """A checked config from command-line arguments. `--help` prints and raises `SystemExit`.

    Args:
        unsupported: flags that other programs have and this one has not, with the reason that the error gives.

    Raises:
        ConfigError: a flag that is unknown, unsupported or missing, or a value that cannot be used.
    """
    parser = make_parser(config_class, program=program, description=description)
    known, rest = parser.parse_known_intermixed_args([_spelled(argument) for argument in arguments])
    items = settings_of(config_class)
    if rest:
        _refuse(rest[0], items, unsupported or {})
    values = vars(known)
    missing = [_flag(item) for item in items if item.required and item.name not in values]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given; {program} --help says more".replace("  ", " "))
    repeated = {item.name for item in items if item.repeated}
    config = config_class(**{name: tuple(value) if name in repeated else value for name, value in values.items()})
    check(config)
    return config


def make_parser(config_class: type, *, program: str = "", description: str = "") -> argparse.ArgumentParser:
    """The parser behind `parse`: one flag for each setting, under the heading of its group."""
    parser = _Parser(
        prog=program or None, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    needed = [
        _flag(item) if item.positional else f"{_flag(item)} {item.metavar or item.name.upper()}"
        for item in settings_of(config_class)
        if item.required
    ]
    parser.usage = " ".join(["%(prog)s", *needed, "[--flag value …]"])
    groups: dict[str, Any] = {}
    for item in settings_of(config_class):
        if item.group not in groups:
            groups[item.group] = parser.add_argument_group(item.group)
        _add(groups[item.group], item)
    return parser


def _add(group: Any, item: Setting) -> None:
    text = _help(item)
    if item.positional:
        many = "*" if item.repeated else "?"
        group.add_argument(item.name, nargs=many, metavar=item.metavar or item.name.upper(), help=text)
        return
    short = [f"-{item.short}"] if item.short else []
    flags = [*short, f"--{item.name}", *(f"--{alias}" for alias in item.aliases)]
    if item.kind is bool:
        group.add_argument(*flags, dest=item.name, action="store_true", help=text)
        group.add_argument(f"--no_{item.name}", dest=item.name, action="store_false", help=argparse.SUPPRESS)
        return
    group.add_argument(
        *flags,
        dest=item.name,
        action="append" if item.repeated else "store",
        type=_reader(item),
        metavar=item.metavar or ("{" + ",".join(item.choices) + "}" if item.choices else item.kind.__name__.upper()),
        help=text,
    )


def _reader(item: Setting) -> Any:
    names = {int: "a whole number", float: "a number"}

    def read(text: str) -> Any:
        if item.kind is str:
            return text
        try:
            return item.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {names[item.kind]}") from None

    return read


def _help(item: Setting) -> str:
    text = item.help
    if item.required:
        text += " (required)"
    elif item.kind is not bool and item.default not in (None, ()):
        text += f" (default: {item.default:g})" if item.kind is float else f" (default: {item.default})"
    return text.replace("%", "%%")


def _spelled(argument: str) -> str:
    """A flag with underscores; values are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _flag(item: Setting) -> str:
    if item.positional:
        return item.metavar or item.name.upper()
    return f"-{item.short}" if item.short else f"--{min((item.name, *item.aliases), key=len)}"


def _refuse(argument: str, items: Sequence[Setting], unsupported: Mapping[str, str]) -> NoReturn:
    if not argument.startswith("-"):
        raise ConfigError(f"{argument!r} is one argument too many; a value with spaces needs quotes around it")
    name = argument.lstrip("-").partition("=")[0]
    if name in unsupported:
        raise ConfigError(f"--{name} is not supported: {unsupported[name]}")
    names = [one for item in items for one in (item.name, *item.aliases)]
    raise ConfigError(f"there is no flag --{name}{nearest(name, names, prefix='--')}")
