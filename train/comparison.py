"""Pictures side by side with words under them: what a person looks at to see whether it worked."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

TILE, GAP, MARGIN = 160, 10, 24  # pixels
INK, SOFT, PAPER = (28, 28, 34), (110, 110, 120), (252, 252, 250)


@dataclass(frozen=True)
class Row:
    """A row of pictures.

    Attributes:
        title: above the row; empty for a row that continues the one above.
        side: a word in front of the row, such as "base".
        images: pictures of any one size; shown enlarged without smoothing if they are small.
        captions: one under each picture, or none.
    """

    images: Sequence[Image.Image]
    title: str = ""
    side: str = ""
    captions: Sequence[str] = ()


def compose(heading: str, rows: Sequence[Row]) -> Image.Image:
    """One picture of all rows, on a light ground."""
    head, body, small = (ImageFont.load_default(size) for size in (26, 17, 13))
    side_width = 92 if any(row.side for row in rows) else 0
    columns = max(len(row.images) for row in rows)
    width = 2 * MARGIN + side_width + columns * (TILE + GAP) - GAP
    heights = [(38 if row.title else 0) + TILE + (44 if row.captions else GAP) for row in rows]
    out = Image.new("RGB", (width, MARGIN + 46 + sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(out)
    draw.text((MARGIN, MARGIN), heading, fill=INK, font=head)
    y = MARGIN + 46
    for row, height in zip(rows, heights, strict=True):
        top = y
        if row.title:
            draw.text((MARGIN, top + 12), row.title, fill=INK, font=body)
            top += 38
        if row.side:
            draw.text((MARGIN, top + TILE // 2 - 10), row.side, fill=SOFT, font=body)
        for k, image in enumerate(row.images):
            x = MARGIN + side_width + k * (TILE + GAP)
            out.paste(_fit(image), (x, top))
            if row.captions:
                lines = textwrap.wrap(row.captions[k], 24)[:2]
                draw.multiline_text((x, top + TILE + 4), "\n".join(lines), fill=SOFT, font=small, spacing=2)
        y += height
    return out


def _fit(image: Image.Image) -> Image.Image:
    method = Image.Resampling.NEAREST if image.width < TILE else Image.Resampling.LANCZOS
    if image.width < TILE:  # a whole factor first, so that every pixel stays a square of one size or nearly so
        factor = -(-TILE // image.width)
        image = image.resize((image.width * factor, image.height * factor), method)
    return image.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
