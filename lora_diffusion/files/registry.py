"""The dialects that are known, and finding the one that a file is in."""

from __future__ import annotations

from types import ModuleType

from ..adapter import Adapter
from . import attn_processor, cloneofsimo, diffusers, embedding, kohya, loralib, lycoris, onetrainer, peft
from .own import OWN_KEY, describe
from .source import Source

# The order of asking. A dialect's module has
#   NAME
#   recognise(source) -> bool                       by names alone
#   read(source) -> Adapter                         raising AdapterFormatError; nothing is skipped in silence
#   METADATA_KEYS                                   optional: names of metadata that `read` has used up
#   used_metadata(source) -> set[str]               optional: the same, where the names depend on the file
# and where it can be written
#   write(adapter) -> (tensors, metadata)           for one file, or
#   write_folder(adapter, path)                     for a folder
# and where it is a folder
#   recognise_folder(path) -> bool, read_folder(path) -> Adapter
DIALECTS: tuple[ModuleType, ...] = (
    onetrainer,
    lycoris,
    kohya,
    cloneofsimo,
    attn_processor,
    loralib,
    peft,
    diffusers,
    embedding,
)


def dialect_of(source: Source) -> ModuleType | None:
    return next((dialect for dialect in DIALECTS if dialect.recognise(source)), None)


def read_source(source: Source) -> Adapter:
    """Raises AdapterFormatError, one line, for everything that is not a sound adapter of a known dialect."""
    dialect = dialect_of(source)
    if dialect is None:
        known = ", ".join(dialect.NAME for dialect in DIALECTS)
        shown = ", ".join(list(source.tensors)[:2]) or "no tensor at all"
        raise source.error(f"is no adapter in a known dialect ({known}); it holds {shown}")
    adapter: Adapter = dialect.read(source)
    adapter.dialect = adapter.dialect or dialect.NAME
    used = {OWN_KEY, "format", *getattr(dialect, "METADATA_KEYS", ())}
    if hasattr(dialect, "used_metadata"):
        used |= dialect.used_metadata(source)
    adapter.foreign = {key: value for key, value in source.metadata.items() if key not in used}
    describe(source, adapter)
    return adapter
