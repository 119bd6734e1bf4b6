"""The adapters on disk: what was imported or made (`adapters/`), and what runs have learned (`runs/*/`).

    adapters/dog.safetensors   the adapter; its name is its id
    adapters/dog.json          when and how it came: time, owner, run
    adapters/dog.png           a picture, if there is one

What a run has learned is there at once, with the id `runs/<run>`; `add_run` makes it an adapter of its own. Ids come
from pages: they are looked up among the files that are there, and never become a path.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from app.web import job_files, library_actions
from app.web.intake import taken_in
from app.web.library_shelf import RUN, SUFFIX, Record, Shelf, stamp_of, usable
from app.web.limits import Limits
from app.web.places import Workspace, free_name, inside, safe_name, suggested_name
from app.web.trash import Trash
from lora_diffusion.adapter import Adapter
from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable

__all__ = ["Library", "Record"]

LONGEST_NAME = 64 - len(SUFFIX)
OFFERED = ("pocket", "pocket-bert", "pocket-gpt")  # models that are on every machine
PREVIEW_SIDE = 512
SECONDS = 0.6  # that one listing spends on files that it has not read before; the others follow with the next


class Library:
    """The adapters of a workspace. May be called from several threads.

    Where `limits.private_runs`, each visitor (`owner`) sees the adapters that belong to nobody and what is their own,
    and changes only what is their own; elsewhere owners do not matter.

    Args:
        undo_seconds: how long a deletion can be undone.
    """

    def __init__(self, workspace: Workspace, limits: Limits, *, undo_seconds: float = 24 * 3600) -> None:
        self.workspace, self.limits = workspace, limits
        self._trash = Trash(workspace, undo_seconds)
        self._lock = threading.RLock()
        self._shelf = Shelf(workspace, limits)

    def records(self, owner: str | None = None, *, seconds: float = SECONDS) -> list[Record]:
        """All adapters, the newest first.

        Headers are read first, then hashes are checked, until `seconds` are over: what is known stays known as long as
        the file does not change.
        """
        until = time.monotonic() + seconds
        with self._lock:
            found = self._shelf.records(owner, until)
        found = [self._shelf.with_hash(one, until) for one in found]
        self._shelf.memory.save()
        return sorted(found, key=lambda one: (-one.made, one.id))

    def record(self, id: str, owner: str | None = None) -> Record:
        """One adapter, with everything known of it. Raises ConfigError where there is no such id."""
        self._shelf.read(self._find(id, owner).path)
        return self._shelf.with_hash(self._find(id, owner), 0.0)

    def report(self, id: str, model: str | None = None, owner: str | None = None) -> str:
        """What is in an adapter and which of its layers fit a model, line by line.

        Args:
            model: default: the one that it was made for, if that is one that is offered. What a file says is no path.
        """
        record = self.record(id, owner)
        if model:
            self._check_model(model)
        elif record.base is not None and record.base in (self.limits.models or OFFERED):
            model = record.base
        return library_actions.load_report(library_actions.read(record), model)

    def import_file(
        self, path: str | Path, name: str | None = None, *, model: str | None = None, owner: str | None = None
    ) -> tuple[Record, str]:
        """Take in a `.safetensors` file; returns its record and what was found in it, line by line.

        Args:
            name: default: made from the file's. A name that is taken is refused, never written over.
            model: the base model that the report is about: a folder, or a name such as "pocket".

        Raises:
            AdapterFormatError: it is no sound adapter file.
            ConfigError: the name cannot be used.
        """
        path = Path(path)
        self._check_owner(owner)
        if model:
            self._check_model(model)
        name = None if name is None or not name.strip() else self._check_free(name.strip())
        with taken_in(path, self.workspace.adapters, self.limits) as (copy, adapter):
            report = library_actions.load_report(adapter, model)
            wish = name or suggested_name(path.stem, "adapter")
            id = self._place(copy, wish, owner, exact=name is not None, source=printable(path.name, 100))
        return self.record(id, owner), report

    def add_run(self, folder: str | Path, name: str | None = None, *, owner: str | None = None) -> Record:
        """Copy what a run has learned, so that it stays when the run is removed; once for the same result.

        Raises:
            ConfigError: there is no such run, it has learned nothing yet, or the name cannot be used.
        """
        run = safe_name(Path(folder).name)
        with self._lock:
            copies = [one for one in self._shelf.records(owner, 0.0) if one.run == run and not one.id.startswith(RUN)]
        same = next((one for one in copies if self._origin(one)), None)
        if same is not None:
            return self.record(same.id, owner) if name in (None, same.id) else self.rename(same.id, str(name), owner)
        record = self.record(RUN + run, owner)
        stamp = stamp_of(record.path)
        name = None if name is None else self._check_free(name)
        copy = self.workspace.adapters / f".new-{secrets.token_hex(8)}{SUFFIX}"
        try:
            shutil.copyfile(record.path, copy)
            id = self._place(
                copy, name or suggested_name(run, "adapter"), owner or record.owner, exact=name is not None, run=run,
                stamp=list(stamp), made=record.made,
            )  # fmt: skip
        finally:
            copy.unlink(missing_ok=True)
        if record.preview is not None:
            self._save_preview(self._beside(id, SUFFIX), record.preview)
        return self.record(id, owner)

    def set_preview(self, id: str, picture: Path, owner: str | None = None) -> None:
        """Show an adapter by a picture from now on. Raises ConfigError where that is not allowed."""
        record = self._changeable(id, owner)
        if id.startswith(RUN):
            raise ConfigError(f"{record.name} is shown by the last picture of its run; add it to the library first")
        self._save_preview(record.path, picture)

    def rename(self, id: str, name: str, owner: str | None = None) -> Record:
        """Give an adapter another name, which is its id from then on. What a run has learned is copied under it.

        Raises:
            ConfigError: the name cannot be used or is taken, or this is not allowed.
        """
        record = self._changeable(id, owner)
        if id.startswith(RUN):
            return self.add_run(record.path.parent, name, owner=owner)
        with self._lock:
            if name == record.name:
                return record
            self._check_free(name, but=record.path)
            for suffix in (SUFFIX, ".json", ".png"):
                file = record.path.with_name(f"{record.path.name.removesuffix(SUFFIX)}{suffix}")
                if file.is_file():
                    file.replace(self._beside(name, suffix))
        return self.record(name, owner)

    def combine(
        self, ids: Sequence[str], weights: Sequence[float], method: str = "cat", *, r: int | None = None,
        name: str | None = None, owner: str | None = None,
    ) -> Record:  # fmt: skip
        """A new adapter that does what several do together; see `lora_diffusion.combine`."""
        records = [self.record(id, owner) for id in ids]
        result = library_actions.combined(records, weights, method, r, self.limits)
        return self._write(result, name, "-".join(one.name[:16] for one in records), owner)

    def resize(
        self, id: str, r: int | None = None, *, energy: float | None = None, name: str | None = None,
        owner: str | None = None,
    ) -> Record:  # fmt: skip
        """A new adapter of another rank; see `lora_diffusion.resize`."""
        record = self.record(id, owner)
        result = library_actions.resized(record, r, energy, self.limits)
        end = f"r{r}" if r is not None else "small"
        return self._write(result, name, f"{record.name[: LONGEST_NAME - 8]}-{end}", owner)

    def convert(self, id: str, format: str, owner: str | None = None) -> Path:
        """A file for download in another format: "diffusers" and "kohya" are `.safetensors`, "peft" is a zip."""
        return library_actions.converted(self.record(id, owner), format, self.workspace)

    def delete(self, id: str, owner: str | None = None) -> str:
        """Move an adapter to the trash, and with it the result of the run that it is a copy of.

        Returns:
            what `undo` takes, for a day.
        """
        with self._lock:
            record = self._changeable(id, owner)
            files = [record.path]
            if not id.startswith(RUN):
                stem = record.path.name.removesuffix(SUFFIX)
                files += [file for end in (".json", ".png") if (file := record.path.with_name(stem + end)).is_file()]
                files += self._origin(record)
            return self._trash.put(files)

    def undo(self, token: str) -> list[str]:
        """Take back a deletion; returns the ids that are there again. Raises ConfigError where it is too late."""
        with self._lock:
            back = set(self._trash.back(token))
            return [one.id for one in self._shelf.records(None, 0.0, everything=True) if one.path in back]

    def push(self, id: str, repo: str, token: str, *, private: bool = True, owner: str | None = None) -> str:
        """Upload an adapter and its card to the hub with a token that is used once and kept nowhere.

        Returns:
            the address of the repository.
        """
        return library_actions.pushed(self.record(id, owner), repo, token, private=private)

    def _write(self, adapter: Adapter, name: str | None, wish: str, owner: str | None) -> Record:
        self._check_owner(owner)
        name = None if name is None or not name.strip() else self._check_free(name.strip())
        copy = self.workspace.adapters / f".new-{secrets.token_hex(8)}{SUFFIX}"
        try:
            library_actions.write(adapter, copy)
            id = self._place(copy, name or suggested_name(wish, "adapter"), owner, exact=name is not None)
        finally:
            copy.unlink(missing_ok=True)
        return self.record(id, owner)

    def _save_preview(self, adapter: Path, picture: Path) -> None:
        with Image.open(picture, formats=("PNG",)) as image:
            small = image.convert("RGB")
        small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        small.save(adapter.with_name(adapter.name.removesuffix(SUFFIX) + ".png"))

    def _place(self, copy: Path, wish: str, owner: str | None, *, exact: bool, **told: Any) -> str:
        """Move a finished file to its name; returns that. Nothing is ever written over."""
        with self._lock:
            name = wish if exact else self._free(wish)
            self._check_free(name)
            job_files.write(self._beside(name, ".json"), {"made": time.time(), "owner": owner, **told})
            copy.replace(self._beside(name, SUFFIX))
            return name

    def _free(self, wish: str) -> str:
        name = free_name(self.workspace.adapters, wish[:LONGEST_NAME].rstrip(".-_") + SUFFIX)
        return name.removesuffix(SUFFIX)

    def _check_free(self, name: str, but: Path | None = None) -> str:
        """Raises ConfigError for a name that cannot be used or is taken."""
        if len(safe_name(name)) > LONGEST_NAME:
            raise ConfigError(f"{name} has {len(name)} characters; a name has at most {LONGEST_NAME}")
        target = self._beside(name, SUFFIX)
        taken = {file.name.lower() for file in self.workspace.adapters.iterdir() if file != but}
        if target.name.lower() in taken:
            raise ConfigError(f"there is an adapter {name} already; choose another name")
        return name

    def _beside(self, name: str, suffix: str) -> Path:
        return self.workspace.adapters / (safe_name(name) + suffix)

    def _check_model(self, model: str) -> None:
        if self.limits.models is not None and model not in self.limits.models:
            raise ConfigError(f"the model {printable(model, 60)!a} is not offered here; choose another one")

    def _check_owner(self, owner: str | None) -> None:
        if self.limits.private_runs and owner is None:
            raise ConfigError("adapters can be added here by a visitor of the page only; reload it")

    def _find(self, id: str, owner: str | None) -> Record:
        with self._lock:
            found = next((one for one in self._shelf.records(owner, 0.0) if one.id == id), None)
        if found is None:
            shown = printable(id, 60) if isinstance(id, str) else type(id).__name__
            raise ConfigError(f"there is no adapter {shown!a} (any more); choose another one")
        return found

    def _changeable(self, id: str, owner: str | None) -> Record:
        record = self._find(id, owner)
        if not record.can_change:
            raise ConfigError(
                f"{record.name} belongs to everybody here and cannot be changed; copy this Space to do so"
            )
        return record

    def _origin(self, record: Record) -> list[Path]:
        """The result of a run that an adapter is a copy of."""
        told = job_files.read(record.path.with_name(record.path.name.removesuffix(SUFFIX) + ".json"))
        if record.run is None or not (self.workspace.runs / record.run).is_dir():
            return []
        file = inside(self.workspace.runs, record.run) / "adapter.safetensors"
        return [file] if usable(file) and list(stamp_of(file)) == told.get("stamp") else []
