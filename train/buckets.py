"""Aspect-ratio buckets: a picture that is not square is trained at a size that is not square either.

NovelAI's scheme, which SDXL was trained with (Podell et al., 2023, appendix I): sizes of about one area whose sides are
multiples of a step; every picture goes to the size whose shape is nearest to its own, so that little is cropped away.
Nothing here imports torch: the command line checks its settings with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from train.dreambooth_config import DreamBoothConfig

Size = tuple[int, int]  # width, height in pixels, as Pillow has them
STEP = 64  # pixels; sides of SD and SDXL buckets are multiples of it
MIN_SIDE = 8


def bucket_sizes(config: DreamBoothConfig, resolution: int, factor: int) -> list[Size]:
    """The sizes that pictures are trained at; without buckets the one square.

    Args:
        config: its `aspect_ratio_buckets` and what belongs to it.
        resolution: side of the square in pixels.
        factor: pixels per side of a latent.

    Raises:
        ConfigError: a size that the autoencoder cannot halve often enough, or limits that leave no size.
    """
    if config.aspect_ratio_buckets is None:
        return [(resolution, resolution)]
    listed = parse(config.aspect_ratio_buckets)
    if listed is not None:
        for width, height in listed:
            if width % factor or height % factor:
                raise ConfigError(
                    f"--aspect_ratio_buckets: the sides of {height},{width} must be multiples of {factor} for this "
                    "model"
                )
        return listed
    step = config.bucket_reso_steps or min(STEP, max(factor, resolution // 8 // factor * factor))
    if step % factor:
        raise ConfigError(f"--bucket_reso_steps {step} is not a multiple of {factor}, as this model needs")
    low = config.min_bucket_reso or resolution // 2
    high = config.max_bucket_reso or resolution * 2
    if not low <= resolution <= high:
        raise ConfigError(
            f"--min_bucket_reso {low} and --max_bucket_reso {high} must have --resolution {resolution} between them"
        )
    return automatic(resolution, step, low, high)


def automatic(resolution: int, step: int, low: int, high: int) -> list[Size]:
    """All sizes with sides from `low` to `high`, multiples of `step`, that have at most the area of the square and
    would have more with one step more of height. The square itself comes first."""
    sizes = {(resolution, resolution): None}
    for width in range(math.ceil(low / step) * step, high + 1, step):
        height = min(high, resolution * resolution // width) // step * step
        if height >= low:
            sizes[(width, height)] = None
            sizes[(height, width)] = None
    return list(sizes)


def parse(text: str) -> list[Size] | None:
    """Sizes from 'height,width;height,width' (as diffusers' scripts write them); None for 'auto'.

    Raises:
        ConfigError: it is neither.
    """
    if text.strip().lower() == "auto":
        return None
    sizes = []
    for part in text.split(";"):
        match = re.fullmatch(r"\s*(\d{1,5})\s*[,x]\s*(\d{1,5})\s*", part, re.ASCII)
        if match is None or min(int(match[1]), int(match[2])) < MIN_SIDE:
            raise ConfigError(
                f"--aspect_ratio_buckets {text!r}: {part!r} is no size; give 'auto', or 'height,width' for each "
                "bucket with ';' between them, such as '512,512;576,448'"
            )
        sizes.append((int(match[2]), int(match[1])))
    return list(dict.fromkeys(sizes))


def nearest(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose shape is nearest to a picture's, so that the least of it is cropped; of equals the largest."""
    shape = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - shape), -bucket[0] * bucket[1]))
