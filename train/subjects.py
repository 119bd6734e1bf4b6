"""The subjects that are shipped with pocket: photos to learn from, and pictures that calibrate the likeness judge."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_diffusion.errors import ConfigError
from train.pocket import subjects_dir

SIDE = 64  # pixels of a picture; a sheet holds several in a row


@dataclass(frozen=True)
class Ask:
    """A prompt and what the judge should find in its picture, as `{attribute: value}` in the judge's words."""

    prompt: str
    asks: dict[str, str]


@dataclass(frozen=True)
class Subject:
    """A thing that pocket has never seen.

    Attributes:
        name: what it is called here.
        class_word: what kind of thing it is ("creature").
        folder: holds `photos/`, the sheets and `subject.json`.
        instance_prompt, class_prompt: for DreamBooth.
        places: prompts that put it where the photos do not show it.
        company: prompts that put it beside another thing.
    """

    name: str
    class_word: str
    folder: Path
    instance_prompt: str
    class_prompt: str
    places: tuple[Ask, ...]
    company: tuple[Ask, ...]

    @property
    def photos_dir(self) -> Path:
        return self.folder / "photos"

    def photos(self) -> list[Image.Image]:
        return [Image.open(p).convert("RGB") for p in sorted(self.photos_dir.glob("*.png"))]

    def sheet(self, role: str) -> list[Image.Image]:
        """`true` (itself elsewhere), `one_wrong` (one attribute changed), `half_formed` (its colours, with parts that
        are another's or smeared) or `random` (others of its class)."""
        strip = Image.open(self.folder / f"{role}.png").convert("RGB")
        return [strip.crop((x, 0, x + SIDE, SIDE)) for x in range(0, strip.width, SIDE)]


def subject_names() -> list[str]:
    return sorted(p.parent.name for p in subjects_dir().glob("*/subject.json"))


def load_subject(name: str) -> Subject:
    """The shipped subject `name`.

    Raises:
        ConfigError: there is none of that name; the message lists those there are.
    """
    if name not in subject_names():
        raise ConfigError(f"there is no shipped subject {name!r}; there are {', '.join(subject_names())}")
    folder = subjects_dir() / name
    facts = json.loads((folder / "subject.json").read_text(encoding="utf-8"))
    return Subject(
        name=name,
        class_word=facts["class"],
        folder=folder,
        instance_prompt=facts["instance_prompt"],
        class_prompt=facts["class_prompt"],
        places=tuple(Ask(**a) for a in facts["places"]),
        company=tuple(Ask(**a) for a in facts["company"]),
    )
