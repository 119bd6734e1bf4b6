"""`<lora:name:0.8>` in a prompt: which adapters it asks for, and how strongly. The one place that reads this notation.

<lora:dog>                              weight 1
<lora:dog:0.8>
<lora:dog:unet=0.8:text_encoder=0.3>    a weight for each component
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable
from train.config import nearest

Weight = float | dict[str, float]
MAX_TAGS = 16
MAX_WEIGHT = 10.0
_TAG = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)
_OPEN = re.compile(r"<lora:", re.IGNORECASE)
_COMPONENT = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt without its tags, and what they ask for, in their order."""

    text: str
    adapters: list[tuple[str, Weight]]


def parse_prompt(prompt: str) -> ParsedPrompt:
    """Take the tags out of a prompt.

    Raises:
        ConfigError: a tag that cannot be read, an adapter twice, or too many tags.
    """
    found: list[tuple[str, Weight]] = []

    def take(match: re.Match[str]) -> str:
        found.append(_tag(match[1], match[0]))
        return " "

    text = _TAG.sub(take, prompt)
    if (broken := _OPEN.search(text)) is not None:
        shown = printable(text[broken.start() :], 40)
        raise ConfigError(f"the prompt has {shown!a}, a tag without its end: write <lora:name:0.8>")
    if len(found) > MAX_TAGS:
        raise ConfigError(f"the prompt asks for {len(found)} adapters; at most {MAX_TAGS} can be used")
    for place, (name, _) in enumerate(found):
        if name in [other for other, _ in found[:place]]:
            raise ConfigError(f"the prompt has <lora:{printable(name, 40)}…> twice: give each adapter once")
    if not found:
        return ParsedPrompt(prompt, found)
    return ParsedPrompt(" ".join(text.split()).replace(" ,", ","), found)


def merged(
    chosen: Iterable[tuple[str, Weight]], tagged: Iterable[tuple[str, Weight]]
) -> tuple[list[tuple[str, Weight]], list[str]]:
    """The adapters that were chosen beside the prompt and those in it, and what a user should hear of it.

    A tag wins over the weight that was chosen. Raises ConfigError for one that was chosen twice.
    """
    together: dict[str, Weight] = {}
    for name, weight in chosen:
        if name in together:
            raise ConfigError(f"the adapter {printable(name, 64)!a} is chosen twice: give each once, with one weight")
        together[name] = weight
    notes = []
    for name, weight in tagged:
        if name in together and together[name] != weight:
            notes.append(f"{name}: the prompt's weight is used, {written_weight(weight)}")
        together[name] = weight
    return list(together.items()), notes


def known(name: str, names: Iterable[str]) -> str:
    """`name`, spelled as one of `names` is; capitals do not matter where that leaves one only.

    Raises ConfigError for an unknown name, with the nearest ones.
    """
    there = list(names)
    if name in there:
        return name
    alike = [one for one in there if one.lower() == name.lower()]
    if len(alike) == 1:
        return alike[0]
    shown = printable(name, 64)
    if not there:
        raise ConfigError(f"there is no adapter {shown!a}, nor any other: train or import one first")
    listed = nearest(name, there) or f"; there are {', '.join(sorted(there)[:5])}{', …' if len(there) > 5 else ''}"
    raise ConfigError(f"there is no adapter {shown!a}{listed}")


def check_weight(weight: object, name: str) -> Weight:
    """A weight that is a finite number, or one for each component. Raises ConfigError."""
    if isinstance(weight, Mapping):
        if not 1 <= len(weight) <= 8 or not all(isinstance(key, str) and _COMPONENT.fullmatch(key) for key in weight):
            raise ConfigError(f"{printable(name, 64)}: its weights need names of components, such as unet=0.8")
        return {str(key): _number(value, name) for key, value in weight.items()}
    return _number(weight, name)


def written_weight(weight: Weight) -> str:
    """A weight as it stands in a tag."""
    if isinstance(weight, dict):
        return ":".join(f"{component}={value:g}" for component, value in weight.items())
    return f"{weight:g}"


def tag_of(name: str, weight: Weight) -> str:
    """The tag that `parse_prompt` reads as this."""
    return f"<lora:{name}:{written_weight(weight)}>"


def _tag(inside: str, whole: str) -> tuple[str, Weight]:
    name, *rest = [part.strip() for part in inside.split(":")]
    shown = printable(whole, 60)
    if not name:
        raise ConfigError(f"the prompt has {shown!a}, which names no adapter: write <lora:name:0.8>")
    if not rest:
        return name, 1.0
    if len(rest) == 1 and "=" not in rest[0]:
        return name, check_weight(_read(rest[0], shown), name)
    weights: dict[str, float] = {}
    for part in rest:
        component, equals, value = part.partition("=")
        if not equals or component.strip() in weights:
            raise ConfigError(
                f"the prompt has {shown!a}: write <lora:name:0.8>, or <lora:name:unet=0.8:text_encoder=1>"
            )
        weights[component.strip()] = _read(value, shown)
    return name, check_weight(weights, name)


def _read(text: str, shown: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"the prompt has {shown!a}, and {printable(text, 20)!a} is no number: write 0.8") from None


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{printable(name, 64)}: the weight {printable(str(value), 20)} is no finite number")
    if abs(value) > MAX_WEIGHT:
        raise ConfigError(f"{printable(name, 64)}: the weight {value:g} is beyond {MAX_WEIGHT:g}; 1 is full strength")
    return float(value)
