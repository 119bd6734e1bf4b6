"""Rows of text on their way from a page to a training: kept under uploads, shown as the model will see them."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.web.libraries import load_libraries
from app.web.limits import MIB, Limits
from app.web.places import Workspace, inside
from lora_diffusion.errors import ConfigError, DatasetError
from lora_diffusion.text import printable
from train.config import from_dict
from train.text_config import TextConfig
from train.text_rows import FILE_KINDS

STEM = "rows"
SHOWN = 6  # rows
LONGEST = 1200  # characters of a row that is shown


@dataclass(frozen=True)
class Example:
    """Rows that are shipped along: their folder, and what they are for."""

    title: str
    model: str
    task: str
    settings: dict[str, Any]


EXAMPLES = {
    "sentiment": Example("Sentiment: good or bad", "pocket-bert", "sequence-classification", {}),
    "topic": Example("Topic of a sentence", "pocket-bert", "sequence-classification", {}),
    "entailment": Example("Does one sentence follow from another?", "pocket-bert", "sequence-classification", {}),
    "describe": Example("Write a text from facts", "pocket-gpt", "causal-lm", {}),
    "facts": Example(
        "Fill in facts (P-tuning)", "pocket-bert", "masked-lm",
        {"method": "p-tuning", "prompt_template": "{P:3} {subject} {P:3} {mask} {P:3}"},
    ),
}  # fmt: skip


def keep_rows(text: str, file: str | None, workspace: Workspace, limits: Limits) -> str:
    """Keep what was pasted, or a file; returns the upload's id.

    Raises:
        ConfigError: there is nothing.
        DatasetError: a kind of file that cannot be read, or too much.
    """
    if not file and not (text or "").strip():
        raise ConfigError("there are no rows yet: paste some, or add a file")
    kind = Path(file).suffix.lower() if file else _kind_of(text)
    if kind not in FILE_KINDS:
        raise DatasetError(f"files that end in {printable(kind, 20)!a} cannot be read; give {', '.join(FILE_KINDS)}")
    size = Path(file).stat().st_size if file else len(text.encode("utf-8", "replace"))
    if size > limits.text_bytes:
        raise DatasetError(
            f"the rows have {size / MIB:.1f} MB, more than {limits.text_bytes / MIB:g} MB; leave some out"
        )
    upload = secrets.token_hex(16)
    folder = workspace.uploads / upload
    folder.mkdir()
    target = folder / f"{STEM}{kind}"
    if file:
        shutil.copyfile(file, target)
    else:
        target.write_text(text.strip() + "\n", encoding="utf-8", errors="replace")
    return upload


def rows_file(workspace: Workspace, upload: str) -> Path:
    """The file of an upload. Raises ConfigError where there is none."""
    if not upload:
        raise ConfigError("there are no rows yet: paste some under 1, or add a file")
    folder = inside(workspace.uploads, upload)
    found = next(iter(sorted(folder.glob(f"{STEM}.*"))), None)
    if found is None:
        raise ConfigError("these rows are no longer here; add them again")
    return found


def example_text(name: str, count: int = 300) -> str:
    """The first rows of a shipped data set as JSON lines. Raises ConfigError."""
    from train.pocket_text import data_dir

    if name not in EXAMPLES:
        raise ConfigError(f"there is no example {printable(str(name), 40)!a}; choose one of {', '.join(EXAMPLES)}")
    lines = (data_dir() / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[:count])


def as_seen(settings: dict[str, Any]) -> tuple[str, list[str]]:
    """What the rows are, in a line, and the first of them as the model will see them.

    Args:
        settings: of a text run, checked.

    Raises:
        ConfigError, DatasetError: rows or settings that cannot be used.
    """
    load_libraries()
    from train.text_models import load_config, load_tokenizer
    from train.text_parts import read_parts

    config = from_dict(TextConfig, {**settings, "output_dir": "run"})
    model = config.pretrained_model_name_or_path
    parts = read_parts(config, load_tokenizer(model, config.revision), load_config(model, config.revision))
    said = parts.train.describe().removeprefix(f"{parts.train.name}: ")
    remarks = [remark.replace(parts.train.name, "the rows") for remark in parts.train.remarks]
    rows = [printable(row, LONGEST) for row in parts.train.previews(SHOWN)]
    return "; ".join([said, *remarks]), rows


def _kind_of(text: str) -> str:
    """What was pasted: JSON lines, a JSON list, a table with commas or tabs, or plain lines."""
    first = text.strip().split("\n", 1)[0]
    if first.startswith("{"):
        return ".jsonl"
    if first.startswith("["):
        return ".json"
    if "\t" in first:
        return ".tsv"
    lines = [line for line in text.strip().split("\n")[:5] if line.strip()]
    alike = len({line.count(",") for line in lines}) == 1 and "," in first and len(lines) > 1
    return ".csv" if alike else ".txt"
