"""What was deleted, for a day: each deletion is a folder with its files and where they came from."""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from app.web import job_files
from app.web.places import Workspace, is_inside
from lora_diffusion.errors import ConfigError

HOURS = 24.0
_MANIFEST = "deleted.json"
_TOKEN = re.compile(r"[0-9a-f]{32}")


class Trash:
    """The trash of a workspace.

    Args:
        seconds: how long a deletion can be undone.
    """

    def __init__(self, workspace: Workspace, seconds: float = HOURS * 3600) -> None:
        self._workspace, self._seconds = workspace, seconds

    def put(self, files: Sequence[Path]) -> str:
        """Move files of the workspace here; returns the token that `back` takes."""
        self.sweep()
        token = secrets.token_hex(16)
        folder = self._workspace.trash / token
        folder.mkdir()
        places = [str(file.relative_to(self._workspace.root)) for file in files]
        job_files.write(folder / _MANIFEST, {"time": time.time(), "files": places})
        for number, file in enumerate(files):
            file.replace(folder / str(number))
        return token

    def back(self, token: str) -> list[Path]:
        """Put the files of one deletion back; returns them.

        Raises:
            ConfigError: it is too late, or something else has taken a place in the meantime; nothing changes then.
        """
        self.sweep()
        folder = self._workspace.trash / (token if isinstance(token, str) and _TOKEN.fullmatch(token) else "-")
        places = job_files.read(folder / _MANIFEST).get("files")
        if not isinstance(places, list):
            raise ConfigError(f"this can no longer be undone: deleted files are kept for {self._kept()}")
        targets = [self._workspace.root / str(place) for place in places]
        for target in targets:
            if target.exists() or not is_inside(self._workspace.root, target):
                raise ConfigError(f"{target.name} is there again under the same name: rename that one first")
        for number, target in enumerate(targets):
            if (folder / str(number)).is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                (folder / str(number)).replace(target)
        shutil.rmtree(folder, ignore_errors=True)
        return targets

    def sweep(self) -> None:
        """Remove for good what is older than can be undone."""
        for folder in self._workspace.trash.iterdir():
            if not _TOKEN.fullmatch(folder.name) or folder.is_symlink():
                continue
            when = job_files.read(folder / _MANIFEST).get("time")
            if isinstance(when, int | float) and time.time() - when > self._seconds:
                shutil.rmtree(folder, ignore_errors=True)

    def _kept(self) -> str:
        return f"{self._seconds / 3600:g} hours" if self._seconds >= 3600 else f"{self._seconds:g} seconds"
