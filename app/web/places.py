"""Where the app keeps its things: one folder, and the only way from a name to a path inside it.

Names come from a page, from an API call or from a file, so each goes through `safe_name` and `inside` before it
touches the disk.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable

LONGEST = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)  # no file names on Windows


class Workspace:
    """The folder of an app. Its parts are made when they are first asked for."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()

    runs = property(lambda self: self._part("runs"))
    adapters = property(lambda self: self._part("adapters"))
    gallery = property(lambda self: self._part("gallery"))
    uploads = property(lambda self: self._part("uploads"))
    trash = property(lambda self: self._part("trash"))

    def _part(self, name: str) -> Path:
        """Raises ConfigError where the folder cannot be made."""
        path = self.root / name
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            why = problem.strerror
            raise ConfigError(f"the folder {path} cannot be made: {why}; start with another --root") from None
        return path


def safe_name(text: str) -> str:
    """`text`, if it can be the name of a run, an adapter or a file: 1 to 64 of A-Z a-z 0-9 . _ -, the first of them a
    letter or digit, without two dots in a row or a dot at the end.

    Raises:
        ConfigError: it cannot; the name is never changed in silence.
    """
    fits = isinstance(text, str) and _NAME.fullmatch(text) and ".." not in text and not text.endswith(".")
    if not fits or _DEVICES.fullmatch(text):
        shown = printable(text, 40) if isinstance(text, str) else type(text).__name__
        raise ConfigError(
            f"{shown!a} cannot be a name: use 1 to {LONGEST} letters (A-Z), digits, '-', '_' and single dots, with a "
            "letter or digit first"
        )
    return text


def suggested_name(text: str, otherwise: str = "run") -> str:
    """A name that `safe_name` takes, as near to any text as can be; `otherwise` where nothing is left."""
    plain = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode()
    words = re.sub(r"[^A-Za-z0-9_-]+", "-", plain).strip("-_")[:LONGEST].strip("-_")
    try:
        return safe_name(words)
    except ConfigError:
        return otherwise


def inside(root: str | Path, name: str) -> Path:
    """The path of `name` in the folder `root`.

    Raises:
        ConfigError: `name` is no safe name, or is a link that leads out of `root`.
    """
    root = Path(root)
    path = root / safe_name(name)
    if not is_inside(root, path):
        raise ConfigError(f"{name} is a link that leads out of its folder; remove it")
    return path


def is_inside(root: str | Path, path: str | Path) -> bool:
    """Whether a path lies under `root` after all links are followed. A path that cannot be one does not."""
    try:
        return Path(path).resolve().is_relative_to(Path(root).resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def free_name(folder: str | Path, wish: str) -> str:
    """`wish`, or with -2, -3 … at its end, so that nothing in `folder` has this name, in whatever case.

    A suffix such as .safetensors stays at the end.

    Raises:
        ConfigError: `wish` is no safe name.
    """
    safe_name(wish)
    folder = Path(folder)
    taken = {path.name.lower() for path in folder.iterdir()} if folder.is_dir() else set()
    dot = wish.rfind(".")
    stem, suffix = (wish[:dot], wish[dot:]) if dot > 0 and len(wish) - dot <= 13 else (wish, "")
    name, number = wish, 2
    while name.lower() in taken:
        end = f"-{number}{suffix}"
        name, number = stem[: LONGEST - len(end)] + end, number + 1
    return safe_name(name)
