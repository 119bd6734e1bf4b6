"""From a caption to the texts that a picture is trained with: templates, and tags in other orders.

All texts of a run are known before it starts. So all can be checked for length, and encoded once where the text encoder
is frozen; which one comes up is drawn for each sample (`train.latents`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from train.randomness import Draws

ORDERS = 8  # orders of a caption's tags that are trained with, its own among them
PLACEHOLDERS = ("caption", "subject")

# What textual inversion does (Gal et al., 2022, appendix B): many neutral ways to say the same.
BUILT_IN = {
    "object": (
        "a photo of {subject}",
        "a picture of {subject}",
        "a photograph of {subject}",
        "an image of {subject}",
        "a good photo of {subject}",
        "a close photo of {subject}",
        "a sharp picture of {subject}",
        "a photo showing {subject}",
        "one photo of {subject}",
        "a snapshot of {subject}",
    ),
    "style": (
        "a picture in the style of {subject}",
        "a painting in the style of {subject}",
        "a drawing in the style of {subject}",
        "artwork in the style of {subject}",
        "an image in the style of {subject}",
        "a scene in the style of {subject}",
        "an illustration in the style of {subject}",
        "a work in the style of {subject}",
    ),
}


def templates_of(text: str | None, file: str | None) -> tuple[str, ...]:
    """The templates that were asked for: a text, the name of a built-in list, or a file with one a line.

    Raises:
        ConfigError: the file cannot be read or holds none.
    """
    if file is None:
        return ("{caption}",) if text is None else BUILT_IN.get(text, (text,))
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"--caption_template_file {file} cannot be read as UTF-8 text: {problem}") from problem
    found = tuple(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))
    if not found:
        raise ConfigError(f"--caption_template_file {file} is empty; write one template a line")
    return found


def check_templates(templates: Sequence[str], subject: str | None) -> None:
    """Check that every template says something of the picture and can be filled in.

    Raises:
        ConfigError: naming the template.
    """
    for template in templates:
        names = re.findall(r"\{(.*?)\}", template)
        for name in names:
            if name not in PLACEHOLDERS:
                raise ConfigError(
                    f"the caption template {template!r} holds {{{name}}}; it may hold {{caption}} and {{subject}}"
                )
        if not names:
            raise ConfigError(
                f"the caption template {template!r} holds neither {{caption}} nor {{subject}}; give a text such as "
                f"'{{caption}}, photo of sks dog', or {' or '.join(map(repr, BUILT_IN))} for a built-in list"
            )
        if "subject" in names and subject is None:
            raise ConfigError(
                f"the caption template {template!r} holds {{subject}}; say with --subject_token what stands for it, "
                "for example 'sks dog'"
            )


def variants(
    caption: str,
    templates: Sequence[str],
    *,
    subject: str | None = None,
    shuffle: bool = False,
    keep: int = 0,
    draws: Draws,
    stream: str,
) -> tuple[str, ...]:
    """The texts that a picture with this caption is trained with.

    Args:
        caption: with `shuffle`, its tags are what commas separate.
        templates: each is filled in once, `{caption}` with the caption and `{subject}` with `subject`.
        shuffle: also with its tags in up to `ORDERS` orders, drawn from `draws` under the name `stream`.
        keep: tags at the beginning that stay where they are.
    """
    orders = _orders(caption, keep, draws, stream) if shuffle else [caption]
    filled = []
    for template in templates:
        for text in orders if "{caption}" in template else orders[:1]:
            pieces = re.split(r"\{(caption|subject)\}", template)  # every second one is a name
            pieces[1::2] = [text if name == "caption" else subject or "" for name in pieces[1::2]]
            filled.append("".join(pieces))
    return tuple(dict.fromkeys(filled))


def _orders(caption: str, keep: int, draws: Draws, stream: str) -> list[str]:
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    fixed, free = tags[:keep], tags[keep:]
    orders = [", ".join(tags)]
    for number in range(ORDERS - 1 if len(free) > 1 else 0):
        places = [draws.shuffled(stream, number * len(free) + place, len(free)) for place in range(len(free))]
        orders.append(", ".join([*fixed, *(free[place] for place in places)]))
    return list(dict.fromkeys(orders))
