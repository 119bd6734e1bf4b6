"""Reading an adapter out of a pickle: only where it was asked for by name, never by `read_adapter`."""

from __future__ import annotations

import os
from pathlib import Path

from ..adapter import Adapter
from ..errors import ConfigError
from . import loralib
from .pickle_file import PickleFile
from .registry import dialect_of, read_source


def read_pickled_adapter(
    path: str | os.PathLike[str], *, alpha: float | None = None, component: str | None = None
) -> Adapter:
    """Read an adapter from a file of `torch.save` (.bin, .pt, .pth, .ckpt), of which nothing is run.

    alpha: of a loralib file, which does not say it; by default the rank.
    component: "unet" or "text_encoder", for a bare list of tensors (cloneofsimo's .pt); see `PickleFile`.
    Raises AdapterFormatError, one line, for everything that is not a sound adapter; ConfigError for an alpha where the
    file has scales of its own, or an unknown component.
    """
    if component not in (None, "unet", "text_encoder"):
        raise ConfigError(f"component={component!r}: give 'unet' or 'text_encoder'")
    source = PickleFile(Path(path), component)
    if alpha is None:
        return read_source(source)
    if dialect_of(source) is not loralib:
        raise ConfigError(f"alpha={alpha!r}: {source.path} has scales of its own, leave alpha out")
    adapter = loralib.read(source, alpha)
    adapter.dialect, adapter.foreign = loralib.NAME, dict(source.metadata)
    return adapter
