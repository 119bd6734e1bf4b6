"""What lies in the library: every adapter file as a record, read once for as long as it does not change."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.web import job_files
from app.web.adapter_facts import Facts
from app.web.adapter_memory import Memory, stamp_of
from app.web.limits import Limits
from app.web.places import Workspace, is_inside
from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable

SUFFIX = ".safetensors"
LARGE = 100 * 2**20  # bytes from which on a hash is checked only where one adapter is asked for
RUN = "runs/"  # begins the id of what a run has learned
_NO_HASH, _UNCHECKED, _BROKEN = "no hash in the file", "not checked yet", "cannot be read"
_UNREAD = Facts(notes=("not read yet; look again in a moment",))


@dataclass(frozen=True)
class Record:
    """An adapter as a page shows it; all texts are plain.

    Attributes:
        id: what every method here takes.
        kind: "pictures" or "text".
        base: the model that it was made for, as its file says.
        rank: the largest; None where nothing in it has a rank.
        made: seconds since 1970.
        intact: whether the tensors are those of the hash in the file; None where that is not known (yet).
        hash_state: the same in words, for a page.
        preview: a PNG.
        steps: that it was trained for.
        parts: what it changes: ("unet", "text_encoder") or ("model",). methods: how: "LoRA", "p_tuning", …
        run: the run that it comes from.
        problem: why it cannot be used; None for a sound one.
        can_change: whether who asks may rename and delete it.
    """

    id: str
    name: str
    path: Path
    kind: str
    base: str | None
    trigger_words: tuple[str, ...]
    rank: int | None
    size_bytes: int
    made: float
    intact: bool | None
    hash_state: str
    preview: Path | None
    steps: int | None
    notes: tuple[str, ...]
    parts: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    dialect: str | None = None
    run: str | None = None
    owner: str | None = field(default=None, repr=False)
    problem: str | None = None
    can_change: bool = True


class Shelf:
    """Finds the adapters of a workspace, and remembers what it has read of them."""

    def __init__(self, workspace: Workspace, limits: Limits) -> None:
        self.workspace, self.limits = workspace, limits
        self.memory = Memory(workspace.adapters / ".seen.json", workspace.root)

    def read(self, file: Path) -> None:
        """Find out all that there is to know of one file."""
        self.memory.facts(file)
        self.memory.verdict(file)

    def records(self, owner: str | None, until: float, *, everything: bool = False) -> list[Record]:
        """The records with what is known of each file; what is not is read until the time is over."""
        found: list[Record] = []
        copied = set()
        for file in sorted(self.workspace.adapters.iterdir()):
            if file.name.startswith(".") or file.suffix != SUFFIX or not usable(file):
                continue
            name = file.name.removesuffix(SUFFIX)
            told = job_files.read(file.with_name(f"{name}.json"))
            run = told.get("run") if isinstance(told.get("run"), str) else None
            copied.add((run, str(told.get("stamp"))))
            found += self._record(printable(name, 100), file, told, run, file.with_name(f"{name}.png"), owner, until)
        for folder in sorted(self.workspace.runs.iterdir()):
            file = folder / "adapter.safetensors"
            if folder.name.startswith(".") or folder.is_symlink() or not usable(file):
                continue
            told = {"owner": job_files.read(folder / job_files.JOB).get("owner")}
            run, preview = folder.name, _last_sample(folder)
            for one in self._record(RUN + printable(run, 100), file, told, run, preview, owner, until):
                found += [one] if (run, str(list(stamp_of(file)))) not in copied else []
        return [one for one in found if everything or self._may_see(one, owner)]

    def _record(
        self, id: str, file: Path, told: dict[str, Any], run: str | None, preview: Path | None, asker: str | None,
        until: float,
    ) -> list[Record]:  # fmt: skip
        """The one record of a file; none where the file has gone in the meantime."""
        try:
            facts, stamp = self.memory.facts(file, time.monotonic() < until) or _UNREAD, stamp_of(file)
        except ConfigError:
            return []
        owner = told.get("owner") if isinstance(told.get("owner"), str) else None
        made = told.get("made")
        return [Record(
            id=id, name=id.removeprefix(RUN), path=file, kind=facts.kind, base=facts.base,
            trigger_words=facts.trigger_words, rank=facts.rank, size_bytes=stamp[1],
            made=float(made) if isinstance(made, int | float) else stamp[0] / 1e9, intact=None,
            hash_state=_NO_HASH if facts is not _UNREAD and not facts.hashed else _UNCHECKED,
            preview=preview if preview is not None and usable(preview) else None, steps=facts.steps,
            notes=facts.notes, parts=facts.parts, methods=facts.methods,
            dialect=facts.dialect, run=run, owner=owner, problem=facts.problem,
            can_change=not self.limits.private_runs or (owner is not None and owner == asker),
        )]  # fmt: skip

    def with_hash(self, record: Record, until: float) -> Record:
        """The record with whether its file is intact; checked, if there is time left."""
        if record.problem is not None:
            return replace(record, hash_state=_BROKEN)
        wanted = record.hash_state == _UNCHECKED and record.size_bytes <= LARGE  # more would keep a page waiting
        try:
            known = self.memory.verdict(record.path, wanted and time.monotonic() < until)
        except ConfigError:
            return record
        if known is None:
            return record
        intact, problem = known
        if problem is not None:
            return replace(record, problem=problem, hash_state=_BROKEN)
        said = {True: "intact", False: "changed: the tensors are not those of the hash in the file", None: _NO_HASH}
        return replace(record, intact=intact, hash_state=said[intact])

    def _may_see(self, record: Record, asker: str | None) -> bool:
        if not self.limits.private_runs or (record.owner is None and not record.id.startswith(RUN)):
            return True
        return record.owner is not None and record.owner == asker


def usable(file: Path) -> bool:
    """A plain file, not a link to somewhere else."""
    try:
        return file.is_file() and not file.is_symlink() and is_inside(file.parent, file)
    except OSError:
        return False


def _last_sample(folder: Path) -> Path | None:
    """The first picture of the last step that a run has drawn."""
    samples = sorted((folder / "samples").glob("step-*.png"))
    if not samples:
        return None
    step = samples[-1].name.rpartition("-")[0]
    return next(path for path in samples if path.name.rpartition("-")[0] == step)
