"""What is done with adapters of the library: reports, sums, other ranks, other formats, uploads. No page, no names."""

from __future__ import annotations

import json
import math
import re
import secrets
import shutil
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import lora_diffusion as ld
from app.web.adapter_facts import facts_of, without_path
from app.web.intake import MOST_OF_A_LAYER
from app.web.limits import Limits
from app.web.places import Workspace
from lora_diffusion.adapter import Adapter
from lora_diffusion.components import BARE
from lora_diffusion.errors import AdapterFormatError, ConfigError, LoraDiffusionError
from lora_diffusion.text import printable

if TYPE_CHECKING:
    from app.web.library import Record

FORMATS = ("diffusers", "kohya", "peft")
MOST_COMBINED = 16
LARGEST_WEIGHT = 100.0
_REPO = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_KEPT = 3600.0  # seconds that a file for download is kept


def load_report(adapter: Adapter, model: str | None = None) -> str:
    """What is in an adapter and, with a model, which of its layers fit there. Plain lines."""
    facts = facts_of(adapter)
    layers = {name: len(table) for name, table in adapter.layers().items()}
    count = adapter.layer_count()
    lines = [f"{count} layers in the dialect {facts.dialect}" if count else f"in the dialect {facts.dialect}"]
    lines += [f"{name}: {count} layers, rank {_ranks(adapter, name)}" for name, count in layers.items()]
    lines += [f"{part}: {', '.join(learned)}" for part, learned in adapter.methods.items()]
    lines += [f"{part}: whole modules, {', '.join(copies)}" for part, copies in adapter.copies.items()]
    lines += [f"word: {word}" for word in adapter.tokens]
    lines.append(f"made for {facts.base}" if facts.base else "the file does not say which model it was made for")
    if facts.trigger_words:
        lines.append(f"in the prompt: {', '.join(facts.trigger_words)}")
    lines.append({True: "hash intact", False: "CHANGED: the tensors are not those of the hash in the file",
                  None: "no hash in the file"}[adapter.intact])  # fmt: skip
    lines += [f"note: {note}" for note in facts.notes]
    if model:
        lines += _fit(adapter, model)
    return "\n".join(printable(line, 400) for line in lines)


def combined(
    records: Sequence[Record], weights: Sequence[float], method: str, r: int | None, limits: Limits
) -> Adapter:
    """The sum of several adapters.

    Raises:
        ConfigError: weights or settings that cannot be used.
        AdapterMismatchError: adapters that do not go together.
    """
    if not 2 <= len(records) <= MOST_COMBINED:
        raise ConfigError(f"{len(records)} adapters are chosen; choose 2 to {MOST_COMBINED}")
    if len(weights) != len(records):
        raise ConfigError(f"{len(weights)} weights for {len(records)} adapters; give one for each")
    for weight in weights:
        number = isinstance(weight, int | float) and math.isfinite(weight)
        if not number or abs(weight) > LARGEST_WEIGHT:
            raise ConfigError(f"the weight {printable(str(weight), 20)} is not between -100 and 100")
    if len({one.kind for one in records}) > 1:
        raise ConfigError("adapters for pictures and for text have no sum; choose adapters of one kind")
    _check_rank(r, limits)
    words = list(dict.fromkeys(word for one in records for word in one.trigger_words))
    metadata = {"trigger_words": words} if words else {}
    adapters = [read(one) for one in records]
    if method not in ("cat", "svd"):
        _check_whole_weights(adapters, method)
    adapter = ld.combine(adapters, [float(one) for one in weights], method, r=r, metadata=metadata).adapter
    rank = facts_of(adapter).rank or 0
    if rank > limits.rank:
        raise ConfigError(f"the sum has rank {rank}, the limit is {limits.rank}: choose svd with a smaller rank")
    return adapter


def resized(record: Record, r: int | None, energy: float | None, limits: Limits) -> Adapter:
    """An adapter at another rank. Raises ConfigError for settings that cannot be used."""
    if r is None and energy is None:
        raise ConfigError("choose a rank, or the share of the adapter that is to be kept")
    _check_rank(r, limits)
    return ld.resize(read(record), r, energy=energy).adapter


def converted(record: Record, format: str, workspace: Workspace) -> Path:
    """A file of an adapter in another format, in `exports/`, where it stays for an hour.

    Raises:
        ConfigError: an unknown format.
        AdapterFormatError: the format has no place for what the adapter holds.
    """
    if format not in FORMATS:
        raise ConfigError(f"the format {printable(str(format), 20)!a} is not one of {', '.join(FORMATS)}")
    exports = workspace.root / "exports"
    exports.mkdir(parents=True, exist_ok=True)
    _sweep(exports)
    folder = exports / secrets.token_hex(16)
    folder.mkdir()
    stem = re.sub(r"[^\w.-]+", "-", record.name, flags=re.ASCII).strip("-.") or "adapter"
    target = folder / f"{stem}-{format}.{'zip' if format == 'peft' else 'safetensors'}"
    try:
        if format == "peft":
            write(read(record), folder / "files", format)
            _zip(folder / "files", target)
            shutil.rmtree(folder / "files")
        else:
            write(read(record), target, format)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return target


def pushed(record: Record, repo: str, token: str, *, private: bool = True) -> str:
    """Upload an adapter and a card; returns the repository's address. The token is in no file and no message.

    Raises:
        ConfigError: a name that cannot be a repository, or no token.
        LoraDiffusionError: the hub did not take it.
    """
    if not isinstance(repo, str) or not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise ConfigError(f"{printable(str(repo), 40)!a} cannot be a repository: write user/name")
    if not isinstance(token, str) or not token.strip() or not token.isprintable():
        raise ConfigError("there is no token to upload with; log in to Hugging Face first")
    from huggingface_hub import HfApi

    adapter = read(record)
    with TemporaryDirectory(prefix="push-") as place:
        folder = Path(place)
        _fill(adapter, record, folder)
        problem = ""
        try:
            api = HfApi(token=token.strip())
            name = str(api.create_repo(repo, private=private, exist_ok=True).repo_id)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add an adapter")
        except Exception as raised:  # the hub's client raises its own kinds, httpx's and the system's
            problem = " ".join(str(raised).split()) or type(raised).__name__
    if problem:  # raised here, so that nothing of the request hangs on it
        hidden = printable(problem.replace(token.strip(), "…"), 300)
        raise LoraDiffusionError(f"the hub did not take it: {hidden}; check that your token may write to {repo}")
    return f"https://huggingface.co/{name}"


def write(adapter: Adapter, path: Path, format: str = "diffusers") -> None:
    """Write an adapter. Raises LoraDiffusionError, with the file's name only."""
    try:
        ld.write_adapter(adapter, path, format)
    except OSError as problem:
        raise LoraDiffusionError(f"the adapter could not be written: {problem.strerror or problem}") from None
    except AdapterFormatError as problem:
        raise AdapterFormatError(without_path(problem, path, "the file")) from None


def _fill(adapter: Adapter, record: Record, folder: Path) -> None:
    """The files of a repository: under the name that diffusers looks for, or a folder of PEFT's where that can be."""
    if record.kind == "pictures":
        write(adapter, folder / "pytorch_lora_weights.safetensors")
    else:
        try:
            write(adapter, folder, "peft")
        except (AdapterFormatError, ConfigError):
            write(adapter, folder / "adapter.safetensors")
    if record.preview is not None:
        shutil.copyfile(record.preview, folder / "preview.png")
    (folder / "README.md").write_text(_card(record), encoding="utf-8")


def _card(record: Record) -> str:
    """Whatever the file says stands in JSON strings or between backticks: a card is read as Markdown."""
    pictures = record.kind == "pictures"
    front = ["---", f"library_name: {'diffusers' if pictures else 'peft'}"]
    front.append("tags: [lora, text-to-image]" if pictures else "tags: [lora]")
    if record.base and re.fullmatch(r"[\w.-]+/[\w.-]+", record.base, re.ASCII):
        front.append(f"base_model: {json.dumps(record.base)}")
    if pictures and record.trigger_words:
        front.append(f"instance_prompt: {json.dumps(record.trigger_words[0])}")
    rows = [("base model", record.base), ("in the prompt", ", ".join(record.trigger_words)), ("rank", record.rank),
            ("steps", record.steps)]  # fmt: skip
    lines = [f"- {name}: `{str(value).replace('`', '')}`" for name, value in rows if value]
    shown = ["", "![preview](preview.png)"] if record.preview is not None else []
    title = re.sub(r"[^\w .-]", "", record.name)
    return "\n".join([*front, "---", "", f"# {title}", "", *lines, *shown, "", "Made with lora_diffusion.", ""])


def read(record: Record) -> Adapter:
    """The adapter of a record. Raises AdapterFormatError, with its name only."""
    try:
        return ld.read_adapter(record.path)
    except LoraDiffusionError as problem:
        raise AdapterFormatError(without_path(problem, record.path, record.name)) from None


def _check_rank(r: Any, limits: Limits) -> None:
    if r is not None and (type(r) is not int or not 1 <= r <= limits.rank):
        raise ConfigError(f"the rank {printable(str(r), 20)} is not a whole number from 1 to {limits.rank}")


def _check_whole_weights(adapters: Sequence[Adapter], method: str) -> None:
    """Raises ConfigError where a method that forms whole weights would need too much memory for one."""
    for adapter in adapters:
        for layers in adapter.components.values():
            for path, layer in layers.items():
                if layer.a[0].numel() * layer.b.shape[0] > MOST_OF_A_LAYER:
                    where = printable(path, 100)
                    raise ConfigError(
                        f"{printable(method, 20)} forms whole weights, and {where} is too large: take svd"
                    )


def _ranks(adapter: Adapter, component: str) -> str:
    ranks = sorted({layer.rank for layer in adapter.layers()[component].values()})
    if not ranks:
        return "none"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _fit(adapter: Adapter, model: str) -> list[str]:
    """Whether it fits a model, in lines."""
    from app.file_output import model_folder
    from lora_diffusion.folder_match import match_folder
    from train.pocket_text import folder_of
    from train.saving import model_label

    label = printable(model_label(model), 80)
    try:
        report, _ = match_folder(adapter, model_folder(str(folder_of(model) or model)))
    except LoraDiffusionError as problem:
        return [f"whether it fits {label} cannot be said before that model is here: "
                f"{without_path(problem, Path(model), label)}"]  # fmt: skip
    total = report.matched + report.unmatched
    if not total:
        return [f"on {label}: there are no layers to compare"]
    verdict = "every layer fits" if report.complete else "it fits in part" if report.matched else "it does not fit"
    lines = [f"on {label}: {verdict}, {report.matched} of {total} layers"]
    for line in str(report).splitlines()[1:]:
        same = BARE not in report.base and ("base in hand" in line or "here the" in line)  # a text model's head differs
        lines += [line.strip()] if same or " layers" in line or "left out" in line else []
    return lines


def _zip(folder: Path, target: Path) -> None:
    """A zip with the same bytes for the same files."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                entry = zipfile.ZipInfo(str(file.relative_to(folder)), (1980, 1, 1, 0, 0, 0))
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, file.read_bytes())


def _sweep(exports: Path) -> None:
    for folder in exports.iterdir():
        if folder.is_dir() and not folder.is_symlink() and time.time() - folder.stat().st_mtime > _KEPT:
            shutil.rmtree(folder, ignore_errors=True)
