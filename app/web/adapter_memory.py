"""What was read of adapter files, by path, time of change and size; kept on disk, so that a new start knows it, too."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.web import job_files
from app.web.adapter_facts import Facts, header_facts, verified
from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable

Stamp = tuple[int, int]  # time of the last change in ns, size in bytes
Verdict = tuple[bool | None, str | None]  # whether the hash is right, why the file cannot be used
_FIELDS = [field.name for field in dataclasses.fields(Facts)]


class Memory:
    """Facts and verdicts of files; each is found out once for as long as the file does not change.

    Args:
        file: where it is kept; what is not understood there is found out again.
        root: the files' common folder.
    """

    def __init__(self, file: Path, root: Path) -> None:
        self._file, self._root = file, root
        self._facts: dict[Path, tuple[Stamp, Facts]] = {}
        self._verdicts: dict[Path, tuple[Stamp, Verdict]] = {}
        self._changed = False
        self._lock = threading.Lock()
        self._load()

    def facts(self, path: Path, read: bool = True) -> Facts | None:
        """What the header says. With `read=False` None where that is not known yet.

        Raises:
            ConfigError: the file is gone.
        """
        return self._known(self._facts, path, lambda: header_facts(path), read)

    def verdict(self, path: Path, read: bool = True) -> Verdict | None:
        """What the whole file says; the same otherwise."""
        return self._known(self._verdicts, path, lambda: verified(path), read)

    def save(self) -> None:
        """Write down what has changed; a disk that is full is no reason to fail."""
        with self._lock:
            if not self._changed:
                return
            files = {}
            for path, (stamp, facts) in list(self._facts.items()):
                if not path.is_file() or not path.is_relative_to(self._root):
                    self._facts.pop(path, None)
                    self._verdicts.pop(path, None)
                    continue
                known, verdict = self._verdicts.get(path, (None, None))
                entry = {"stamp": stamp, "facts": dataclasses.asdict(facts)}
                files[str(path.relative_to(self._root))] = entry | ({"verdict": verdict} if known == stamp else {})
            try:
                job_files.write(self._file, {"fields": _FIELDS, "files": files})
            except OSError:
                return
            self._changed = False

    def _known(
        self, table: dict[Path, tuple[Stamp, Any]], path: Path, find: Callable[[], Any], read: bool
    ) -> Any | None:
        stamp, (known, value) = stamp_of(path), table.get(path, (None, None))
        if known == stamp:
            return value
        if not read:
            return None
        value = find()
        table[path], self._changed = (stamp, value), True
        return value

    def _load(self) -> None:
        kept = job_files.read(self._file)
        if kept.get("fields") != _FIELDS or not isinstance(kept.get("files"), dict):
            return
        try:
            for name, entry in kept["files"].items():
                path, stamp = self._root / name, (int(entry["stamp"][0]), int(entry["stamp"][1]))
                self._facts[path] = stamp, _facts(entry["facts"])
                if "verdict" in entry:
                    intact, problem = entry["verdict"]
                    self._verdicts[path] = stamp, (intact, problem)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            self._facts, self._verdicts = {}, {}


def _facts(kept: dict[str, Any]) -> Facts:
    values: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in kept.items()}
    return Facts(**values)


def stamp_of(path: Path) -> Stamp:
    """Raises ConfigError for a file that is gone."""
    try:
        facts = path.stat()
    except OSError:
        raise ConfigError(f"{printable(path.name, 80)} is no longer there; look again") from None
    return facts.st_mtime_ns, facts.st_size
