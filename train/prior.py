"""Class pictures for prior preservation (Ruiz et al., 2023, section 3.3): what the model itself draws for the class.

Pictures that are there are kept and used; only missing ones are drawn. Each has its own seed, made from the run's seed
and its number, and is always drawn among the same neighbours (batch size touches the last bit), so a generation that is
cut short goes on where it stopped and ends with the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_diffusion.errors import ConfigError
from train.images import SUFFIXES, list_images
from train.pictures import read_settings, save_png
from train.randomness import derive_seed
from train.sampling import generate

GUIDANCE = 7.5


def existing(folder: Path) -> list[Path]:
    """The class pictures that are there, sorted by name; none if there is no folder yet."""
    if not folder.is_dir() or not any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()):
        return []
    return list_images(folder)


def check_drawn_for(folder: Path, prompt: str, model: str) -> None:
    """Refuse class pictures that were drawn for another prompt or by another model; pictures from elsewhere pass.

    Raises:
        ConfigError: naming the first such file.
    """
    for path in existing(folder):
        if path.suffix.lower() != ".png":
            continue
        made = read_settings(path)
        if made and (made.get("prompt"), made.get("model")) != (prompt, model):
            raise ConfigError(
                f"{path} was drawn for {made.get('prompt')!r} by {made.get('model')!r}, not for {prompt!r} by "
                f"{model!r}; remove the folder, or name another one with --class_data_dir"
            )


def missing(folder: Path, count: int) -> list[int]:
    """Numbers of the pictures still to be drawn so that the folder holds `count`."""
    have = existing(folder)
    taken = {path.name for path in have}
    free = (number for number in range(count + len(have)) if name_of(number) not in taken)
    return [next(free) for _ in range(count - len(have))]


def name_of(number: int) -> str:
    return f"class_{number:04d}.png"


def draw_missing(
    pipe: Any,
    folder: Path,
    prompt: str,
    numbers: list[int],
    *,
    seed: int,
    steps: int,
    batch_size: int,
    model: str,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> None:
    """Draw the class pictures with these numbers into `folder`, each saved as soon as it is there."""
    groups = sorted({number // batch_size for number in numbers})
    wanted = set(numbers)
    done = 0
    for group in groups:
        if should_stop is not None and should_stop():
            return
        members = range(group * batch_size, (group + 1) * batch_size)
        seeds = [derive_seed(seed, "class_image", number) for number in members]
        pictures = generate(pipe, prompt, seeds, steps=steps, guidance=GUIDANCE, batch_size=batch_size)
        for number, picture_seed, picture in zip(members, seeds, pictures):
            if number not in wanted:
                continue
            settings = {"prompt": prompt, "seed": picture_seed, "steps": steps, "guidance": GUIDANCE, "model": model}
            save_png(picture, folder / name_of(number), settings)
            done += 1
        if on_progress is not None:
            on_progress(done, len(numbers))
