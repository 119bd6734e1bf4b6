"""Pictures on disk: PNGs that carry how they were made, under names that can be read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "lora_diffusion"


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> Path:
    """Write a picture with its settings inside, complete or not at all.

    Two text chunks: `lora_diffusion` holds `settings` as JSON, `parameters` the same as the line that the usual web UIs
    read. Settings used by the latter: prompt, negative_prompt, steps, guidance, seed, width, height, model, adapters (a
    list of {"file", "weight"}).
    """
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(settings, ensure_ascii=False, sort_keys=True))
    info.add_itxt("parameters", parameters_text(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    image.save(unfinished, format="PNG", pnginfo=info)
    unfinished.replace(path)
    return path


def read_settings(path: Path) -> dict[str, Any]:
    """The settings inside a PNG that `save_png` wrote; an empty dict where there are none."""
    try:
        with Image.open(path) as image:
            return json.loads(getattr(image, "text", {}).get(KEY, "{}"))
    except (OSError, SyntaxError, ValueError):
        return {}


def parameters_text(settings: Mapping[str, Any]) -> str:
    """Settings in the notation of the usual web UIs: prompt, negative prompt, then `Name: value` pairs."""
    tags = "".join(f" <lora:{_name_of(one)}:{one['weight']:g}>" for one in settings.get("adapters", ()))
    lines = [f"{settings.get('prompt', '')}{tags}"]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    pairs = [("Steps", "steps"), ("CFG scale", "guidance"), ("Seed", "seed"), ("Model", "model")]
    parts = [f"{label}: {settings[key]}" for label, key in pairs if settings.get(key) is not None]
    if "width" in settings and "height" in settings:
        parts.append(f"Size: {settings['width']}x{settings['height']}")
    lines.append(", ".join(parts))
    return "\n".join(lines)


def _name_of(adapter: Mapping[str, Any]) -> str:
    return str(adapter.get("name") or Path(str(adapter["file"])).stem)


def readable_name(prompt: str, seed: int, adapters: Sequence[tuple[str, float]] = (), *, limit: int = 60) -> str:
    """A file name without its suffix: 'a-photo-of-sks-dog_rex-0.8_seed7'."""
    words = _plain(prompt)[:limit].strip("-") or "picture"
    tags = "".join(f"_{_plain(name)[:30]}" + ("" if weight == 1 else f"-{weight:g}") for name, weight in adapters)
    return f"{words}{tags}_seed{seed}"


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
