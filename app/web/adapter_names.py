"""The adapters that can be asked for by name: the library's, and checkpoints of runs (`dog@40`)."""

from __future__ import annotations

import re
from pathlib import Path

from app.web import job_files
from app.web.library import Library
from app.web.library_shelf import RUN, usable
from app.web.limits import Limits
from app.web.places import Workspace
from app.web.prompt_syntax import known
from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable

_STEP = re.compile(r"step-([0-9]{1,9})")


class AdapterNames:
    """Names to files. Names come from pages and pictures; what they lead to is looked up, never put together.

    An adapter goes by its id; a run's also by the run's name alone, where no other adapter has it, and with `@` and a
    step one of the run's checkpoints.
    """

    def __init__(self, workspace: Workspace, limits: Limits, library: Library | None = None) -> None:
        self._workspace, self._limits = workspace, limits
        self._library = library or Library(workspace, limits)

    def files(self, owner: str | None = None) -> dict[str, Path]:
        """{id: file} of what a visitor may use."""
        return {record.id: record.path for record in self._library.records(owner, seconds=0.0)}

    def find(self, name: str, owner: str | None = None, files: dict[str, Path] | None = None) -> tuple[str, Path]:
        """The name as it is known, and the file. A file's path is taken if it is one of these files.

        Raises:
            ConfigError: there is no such adapter; with the nearest names.
        """
        files = self.files(owner) if files is None else files
        if name in files:
            return name, files[name]
        if f"{RUN}{name}" in files:
            return f"{RUN}{name}", files[f"{RUN}{name}"]
        run, at, step = name.rpartition("@")
        if at and (steps := self.checkpoints(run, owner)):
            if step.isdecimal() and len(step) < 10 and int(step) in steps:
                return f"{run.removeprefix(RUN)}@{int(step)}", steps[int(step)]
            listed = ", ".join(map(str, list(steps)[-6:]))
            raise ConfigError(f"{printable(run, 64)} has no checkpoint of step {printable(step, 12)}; it has {listed}")
        by_path = {str(file): one for one, file in files.items()}
        if name in by_path:
            return by_path[name], files[by_path[name]]
        spelled = known(name, files)
        return spelled, files[spelled]

    def checkpoints(self, run: str, owner: str | None = None) -> dict[int, Path]:
        """{step: file} of a run's checkpoints, by step; nothing where there is no such run of one's own."""
        wanted = run.removeprefix(RUN)
        folder = next((one for one in self._workspace.runs.iterdir() if one.name == wanted), None)
        if folder is None or folder.is_symlink() or not (folder / "checkpoints").is_dir():
            return {}
        whose = job_files.read(folder / job_files.JOB).get("owner")
        if self._limits.private_runs and whose is not None and whose != owner:
            return {}
        found = {}
        for place in (folder / "checkpoints").iterdir():
            match, file = _STEP.fullmatch(place.name), place / "adapter.safetensors"
            if match and not place.is_symlink() and usable(file):
                found[int(match[1])] = file
        return dict(sorted(found.items()))
