"""PEFT's folders in and out of a model."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..components import components_of
from ..errors import AdapterFormatError, AdapterMismatchError, ConfigError
from ..exchange import load_adapter, save_adapter
from ..files import read_adapter
from ..inject import delete_adapter, put_adapter
from ..report import LoadReport
from ..state import adapter_names, freeze_base, holders
from .config import PeftConfig

_CARD = "README.md"


def write_folders(model: nn.Module, place: str | os.PathLike[str], names: Sequence[str] | None) -> None:
    """Write adapters (None: all) into `place`, or, if not called "default", into a folder of their name there.

    Each file appears whole or not at all; other files, and a card that is there, stay.
    Raises ConfigError or AdapterFormatError.
    """
    target = Path(place)
    if target.is_file():
        raise ConfigError(f"{target} is a file: give the name of a folder")
    chosen = adapter_names(model) if names is None else list(names)
    if not chosen:
        raise ConfigError("there is no adapter to save: add one first")
    base = getattr(model, "name_or_path", None)
    for name in chosen:
        holders(model, name)
        folder = target if name == "default" else target / name
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f".{secrets.token_hex(4)}.tmp"
        try:
            save_adapter(model, fresh, name, format="peft", metadata={"base_model": base} if base else None)
            for file in sorted(fresh.iterdir()):
                if file.name != _CARD or not (folder / _CARD).exists():
                    file.replace(folder / file.name)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def read_into(model: nn.Module, folder: Path, name: str, config: PeftConfig) -> LoadReport:
    """Load a folder as the adapter `name`. One that is there takes the tensors over in place, so that an optimizer
    keeps its parameters; where they do not fit it is replaced. The base is frozen.

    Raises AdapterFormatError or AdapterMismatchError.
    """
    adapter = read_adapter(folder)
    if name in adapter_names(model):
        try:
            put_adapter(model, adapter, name)
            return LoadReport(name, str(folder), adapter.dialect)
        except (AdapterFormatError, AdapterMismatchError):
            delete_adapter(model, name)
    report = load_adapter(model, adapter, name)
    for component in components_of(model).values():
        freeze_base(component)
    for state in holders(model, name).values():
        for layer in state.adapters[name].layers.values():
            layer.part(name).dropout = getattr(config.method, "lora_dropout", 0.0)
    return report
