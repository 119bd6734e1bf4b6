"""What to draw: a request, its checks, and its way into a PNG and out again.

A PNG that somebody drops on the page is a stranger's: only its text chunks are read, up to a limit each, nothing is
inflated, and what they say goes through the same checks as a request from the page.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from app.web.limits import Limits
from app.web.prompt_syntax import MAX_TAGS, Weight, check_weight
from lora_diffusion.errors import ConfigError, DatasetError
from lora_diffusion.text import printable
from train.pictures import KEY

MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 50.0
SMALLEST, STEP = 8, 8  # pixels of a side
MAX_NAME = 200  # characters of a model's or an adapter's name
MAX_CHUNK, MAX_CHUNKS = 100_000, 500  # of a PNG: bytes of a text, chunks before its pixels
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Request:
    """What to draw.

    Attributes:
        model: "pocket", a folder, or a hub id.
        prompt: with or without `<lora:name:0.8>`.
        adapters: names from the library, each with its weight: a number, or one for each component.
        seed: of the first picture, the next have the next ones; None draws one, which the answer tells.
        steps, guidance: denoising steps, and how strictly to follow the prompt (1: no guidance).
        width, height: in pixels; None: the model's own.
        count: pictures.
    """

    model: str
    prompt: str
    negative_prompt: str | None = None
    adapters: Sequence[tuple[str, Weight]] = ()
    seed: int | None = None
    steps: int = 30
    guidance: float = 7.5
    width: int | None = None
    height: int | None = None
    count: int = 1


def checked(request: Request, limits: Limits) -> Request:
    """The request, if it is within the limits, its adapters as a list of pairs.

    Raises:
        ConfigError: naming the first setting that cannot be used, its value and what can be.
    """
    _text("model", request.model, MAX_NAME)
    if limits.models is not None and request.model not in limits.models:
        raise ConfigError(f"the model {printable(request.model, 60)!a} is not offered here; choose from "
                          f"{', '.join(limits.models)}")  # fmt: skip
    _text("prompt", request.prompt, limits.prompt, empty=True)
    if request.negative_prompt is not None:
        _text("negative prompt", request.negative_prompt, limits.prompt, empty=True)
    _whole("steps", request.steps, 1, limits.inference_steps)
    _whole("count", request.count, 1, limits.count)
    if request.seed is not None:
        _whole("seed", request.seed, 0, MAX_SEED - limits.count)
    guidance = request.guidance
    if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not 0 <= guidance <= MAX_GUIDANCE:
        raise ConfigError(f"guidance {printable(str(guidance), 20)}: give a number from 0 to {MAX_GUIDANCE:g}")
    for name, side in (("width", request.width), ("height", request.height)):
        if side is not None:
            _whole(name, side, SMALLEST, limits.side)
            if side % STEP:
                raise ConfigError(f"{name} {side}: give a multiple of {STEP}, such as {side - side % STEP + STEP}")
    return replace(request, adapters=_adapters(request.adapters), guidance=float(guidance))


def settings_dict(request: Request, adapters: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> dict[str, Any]:
    """What goes into the PNG of a request's one picture: JSON values, in the names that `train.pictures` knows.

    adapters: {"name", "file", "weight", "sha256"} each, and "weights" where components have their own.
    """
    return {
        "model": request.model,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "width": size[0],
        "height": size[1],
        "adapters": [dict(one) for one in adapters],
    }


def one_weight(weight: Weight) -> dict[str, Any]:
    """A weight as a PNG has it: a number that other tools can read, and those of the components beside it."""
    if not isinstance(weight, dict):
        return {"weight": weight}
    return {"weight": weight.get("unet", next(iter(weight.values()))), "weights": dict(weight)}


def request_in(path: Path, limits: Limits, model: str = "pocket") -> Request:
    """The request inside a PNG: one of ours, or one with the usual web UIs' `parameters`.

    model: for a foreign one, which names its model in a way that says nothing here.

    Raises:
        DatasetError: it is no PNG, is too large, or says nothing of how it was made.
        ConfigError: what it says is beyond the limits.
    """
    texts = _texts(path, limits.image_bytes)
    if KEY in texts:
        return checked(_own(texts[KEY]), limits)
    if "parameters" in texts:
        return checked(_foreign(texts["parameters"], model), limits)
    raise DatasetError("the picture does not say how it was made; PNGs that were drawn here do, if nobody edited them")


def _own(text: str) -> Request:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise DatasetError("the settings inside the picture are damaged") from None
    if not isinstance(values, dict):
        raise DatasetError("the settings inside the picture are damaged")
    values = values.get("request", values) if isinstance(values.get("request"), dict) else values
    adapters = values.get("adapters", [])
    if not isinstance(adapters, list) or not all(isinstance(one, dict) for one in adapters):
        raise ConfigError("the picture's list of adapters cannot be read")
    given = [(one.get("name"), one.get("weights", one.get("weight"))) for one in adapters[: MAX_TAGS + 1]]
    kept = {name: values[name] for name in _FIELDS if values.get(name) is not None}
    return Request(**{"model": "", "prompt": "", **kept, "adapters": given})


_FIELDS = ("model", "prompt", "negative_prompt", "seed", "steps", "guidance", "width", "height")
_PAIR = re.compile(r"\s*([A-Za-z][A-Za-z ]{0,30}):\s*([^,]{1,100})(?:,|$)")


def _foreign(text: str, model: str) -> Request:
    """Prompt, "Negative prompt: …", and a last line of "Steps: 20, CFG scale: 7, Seed: 1, Size: 512x512"."""
    lines = text.strip().split("\n")
    pairs = dict(_PAIR.findall(lines[-1])) if "Steps:" in lines[-1] else {}
    words = "\n".join(lines[:-1] if pairs else lines)
    prompt, _, negative = words.partition("Negative prompt:")
    width, _, height = pairs.get("Size", "").partition("x")
    sides = [int(side) // STEP * STEP if side.isdecimal() and len(side) < 7 else None for side in (width, height)]
    plain = Request(model, prompt.strip(), negative.strip() or None)
    return replace(
        plain,
        seed=_read(int, pairs.get("Seed"), None),
        steps=_read(int, pairs.get("Steps"), plain.steps),
        guidance=_read(float, pairs.get("CFG scale"), plain.guidance),
        width=sides[0],
        height=sides[1],
    )


def _read(kind: type, text: str | None, otherwise: Any) -> Any:
    try:
        return otherwise if text is None else kind(text)
    except ValueError:
        return otherwise


def _texts(path: Path, most: int) -> dict[str, str]:
    """The plain text chunks before a PNG's pixels. Raises DatasetError."""
    try:
        if path.stat().st_size > most:
            raise DatasetError(f"the picture is larger than {most // 2**20} MiB")
        with path.open("rb") as file:
            if file.read(8) != _SIGNATURE:
                raise DatasetError("this is no PNG; settings are kept in the PNG that was drawn, not in copies of it")
            return dict(_chunks(file))
    except (OSError, ValueError) as problem:
        raise DatasetError(f"the picture cannot be read: {type(problem).__name__}") from None


def _chunks(file: BinaryIO) -> Iterator[tuple[str, str]]:
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"IDAT", b"IEND"):
            return
        if kind not in (b"tEXt", b"iTXt") or length > MAX_CHUNK:
            file.seek(length + 4, 1)
            continue
        key, _, rest = file.read(length).partition(b"\0")
        file.seek(4, 1)
        if kind == b"iTXt":
            if rest[:1] != b"\0":  # compressed
                continue
            rest = rest[2:].split(b"\0", 2)[-1]
        yield key.decode("latin-1"), rest.decode("utf-8" if kind == b"iTXt" else "latin-1", errors="replace")


def _adapters(given: object) -> list[tuple[str, Weight]]:
    pairs = list(given) if isinstance(given, list | tuple) else None
    if pairs is None or len(pairs) > MAX_TAGS or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise ConfigError(f"adapters: give at most {MAX_TAGS} names, each with its weight")
    found = []
    for name, weight in pairs:
        _text("adapter's name", name, MAX_NAME)
        found.append((name, check_weight(weight, name)))
    return found


def _text(what: str, value: object, most: int, *, empty: bool = False) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"the {what} is no text")
    if not empty and not value.strip():
        raise ConfigError(f"the {what} is empty")
    if len(value) > most:
        raise ConfigError(f"the {what} has {len(value):,} characters; at most {most:,} can be used")
    if "\0" in value or any(0xD800 <= ord(char) <= 0xDFFF for char in value):
        raise ConfigError(f"the {what} holds characters that are no text")


def _whole(what: str, value: object, least: int, most: int) -> None:
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        raise ConfigError(f"{what} {value}: give a whole number")
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        shown = printable(str(value)[:40], 24)
        raise ConfigError(f"{what} {shown}: give a whole number from {least:,} to {most:,}")
