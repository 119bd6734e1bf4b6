"""An evaluation on disk and in words: tables in Markdown, pictures with how they were made, one picture of all."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable
from train.comparison import Row, compose
from train.evaluate_config import EvaluateConfig
from train.evaluate_figures import TITLES
from train.evaluate_plan import Pictures, Plan, guidance_of
from train.pictures import save_png

MARKER = "report.json"  # a folder with this in it is an older evaluation and may be replaced
COLLAPSED = 0.5  # of the way from the base model's class to the photos: from there on it is said
_COLUMNS = 6  # of the picture of all


def check_room(folder: Path) -> None:
    """Raises ConfigError for a folder with anything in it that is no evaluation."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output_dir {folder} is a file; give a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise ConfigError(f"{folder} holds something that is not an evaluation; name another --output_dir")


def make_room(folder: Path) -> None:
    """Remove an older evaluation."""
    check_room(folder)
    for name in ("comparison.png", "sweep.png", "report.md"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("{}\n", encoding="utf-8")  # so that what is stopped half-way may be replaced, too


def write(folder: Path, report: dict[str, Any], table: str) -> None:
    (folder / "report.md").write_text(table + "\n", encoding="utf-8")
    (folder / MARKER).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_pictures(
    folder: Path, config: EvaluateConfig, plan: Plan, pictures: Pictures, adapters: Sequence[dict[str, Any]]
) -> None:
    """Every picture as `GROUP-NUMBER-seedSEED.png`.

    Args:
        adapters: {"name", "file", "weight"} of what the pictures were drawn with.
    """
    for group, prompts in plan.groups(base=not adapters).items():
        for number, picture in enumerate(pictures.get(group, [])):
            prompt, seed = prompts[number // len(plan.seeds)], plan.seeds[number % len(plan.seeds)]
            settings = {
                "prompt": prompt, "seed": seed, "steps": config.num_inference_steps, "guidance": guidance_of(config),
                "width": picture.width, "height": picture.height, "model": Path(config.model).name,
                "adapters": list(adapters),
            }  # fmt: skip
            save_png(picture, folder / f"{group}-{number // len(plan.seeds) + 1}-seed{seed}.png", settings)


def table(report: dict[str, Any]) -> str:
    """The figures as a Markdown table: the base model, each adapter, the photos."""
    names = [name for name in TITLES if report["base"][name] is not None]
    rows = [["", *(TITLES[name] for name in names)]]
    rows.append(["base model", *(_plain(report["base"][name]["mean"]) for name in names)])
    for one in report["adapters"]:
        rows.append([_cell(one["name"]), *(cell(one["figures"][name]) for name in names)])
    rows.append(["photos", *(_plain(report["photos"].get(name)) for name in names)])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the head, as a table that can also be read as it is."""
    widths = [max(3, *(len(row[k]) for row in rows)) for k in range(len(rows[0]))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def cell(figure: dict[str, float | None] | None) -> str:
    """'0.57 [0.51, 0.63]'."""
    if figure is None or figure["mean"] is None:
        return "–"
    if figure["low"] is None or figure["high"] is None:
        return _plain(figure["mean"])
    return f"{_two(figure['mean'])} [{_two(figure['low'])}, {_two(figure['high'])}]"


def in_words(report: dict[str, Any]) -> list[str]:
    """A line or two about each adapter."""
    lines = []
    for one in report["adapters"]:
        said = []
        if one["likeness_gap_closed"] is not None:
            said.append(f"closes {one['likeness_gap_closed']:.0%} of the gap in likeness")
        if one["prompt_following_kept"] is not None:
            said.append(f"keeps {one['prompt_following_kept']:.0%} of the base model's prompt following")
        lines.append(f"{printable(one['name'])} {' and '.join(said) or 'has no scale to be judged on'}.")
        kind = one["figures"]["class_likeness"]
        if kind is not None and None not in (kind["floor"], kind["ceiling"]):
            gone = (kind["mean"] - kind["floor"]) / max(kind["ceiling"] - kind["floor"], 1e-6)
            if gone > COLLAPSED:
                lines.append(
                    f"  warning: the class has become the subject: its pictures have a likeness of {kind['mean']:.2f} "
                    f"to the photos, {kind['floor']:.2f} without the adapter; train with --with_prior_preservation"
                )
        if one["memorised"]:
            lines.append(
                f"  warning: copies of a photo among its {report['pictures_of_the_subject']} pictures: "
                f"{len(one['copies'])} (cosine above {report['copy_limit']:.2f}); train shorter, or with lower rank"
            )
    return lines


def overview(photos: Sequence[Image.Image], plan: Plan, drawn: Sequence[tuple[str, Pictures]]) -> Image.Image:
    """One picture: the photos, then the first seed of each prompt without and with each adapter."""
    step, shown = len(plan.seeds), min(_COLUMNS, len(plan.subject))
    rows = [Row([_square(photo) for photo in photos[:_COLUMNS]], title="The photos")]
    for number, (name, pictures) in enumerate(drawn):
        images = [_square(pictures["subject"][k * step]) for k in range(shown)]
        side = "\n".join(textwrap.wrap(name, 9)[:4])
        title = f"The same prompts at seed {plan.seeds[0]}" if number == 0 else ""
        captions = plan.subject[:shown] if number == len(drawn) - 1 else ()
        rows.append(Row(images, title=title, side=side, captions=captions))
    return compose("Base model and adapters", rows)


def _square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _plain(value: float | None) -> str:
    return "–" if value is None else _two(value)


def _two(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # no -0.00


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
