"""Base models in memory, each with the adapters that were asked for last; which of them act is decided per request."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_diffusion as ld
from app.web.prompt_syntax import Weight
from lora_diffusion.text import printable
from train.models import load_pipeline, resolve_device, resolve_precision
from train.objective import with_zero_snr

MODELS_KEPT, ADAPTERS_KEPT = 2, 8


@dataclass(frozen=True)
class Loaded:
    """An adapter in a pipeline.

    key: path, time and size of the file. name: in the pipeline. words: it brings some, which would be read in
        everybody's prompts: it does not stay. zero_snr: it was trained on the schedule that ends in pure noise.
    """

    key: tuple[str, int, int]
    name: str
    sha256: str
    words: bool
    zero_snr: bool
    notes: list[str]


class Base:
    """A pipeline and its adapters, the least recently used of which goes first. Not for two threads at once."""

    def __init__(self, model: str, device: str = "auto", kept: int = ADAPTERS_KEPT) -> None:
        place = resolve_device(device)
        self.pipe = load_pipeline(model, precision=resolve_precision("auto", place), device=place)
        self._kept, self._count = kept, 0
        self._adapters: OrderedDict[str, Loaded] = OrderedDict()

    @contextmanager
    def active(self, wanted: Sequence[tuple[Path, Weight]]) -> Iterator[list[Loaded]]:
        """Within it exactly these adapters act; after it none does, whatever happened.

        A layer adds up its adapters in the order in which they came and began to act, and a sum of floats depends on
        its order. So they are brought into the order of their files, whatever was drawn before.

        Raises:
            AdapterFormatError, AdapterMismatchError: a file that is no adapter, or not one for this model.
        """
        scheduler = self.pipe.scheduler
        loaded: list[Loaded] = []
        try:
            for path, _ in wanted:
                loaded.append(self._load(path, {str(one) for one, _ in wanted}))
            # Terms are added in the order of their names here: by path, so that the same choice gives the same bytes.
            acting = sorted(zip(wanted, loaded), key=lambda pair: pair[0][0])
            names, weights = [one.name for _, one in acting], [self._weight(weight) for (_, weight), _ in acting]
            ld.set_adapters(self.pipe, names, weights)
            if any(one.zero_snr for one in loaded):
                self.pipe.scheduler = with_zero_snr(scheduler)
            yield loaded
        finally:
            self.pipe.scheduler = scheduler
            ld.set_adapters(self.pipe, [])
            for one in loaded:
                if one.words:
                    self._forget(one.key[0])

    def _weight(self, weight: Weight) -> Any:
        """Components that a weight does not mention get none of the adapter."""
        if not isinstance(weight, dict):
            return weight
        from lora_diffusion.components import components_of

        return {**dict.fromkeys(components_of(self.pipe), 0.0), **weight}

    def _load(self, path: Path, needed: set[str]) -> Loaded:
        """The adapter, in the model; read again where its file has changed."""
        status = path.stat()
        key = (str(path), status.st_mtime_ns, status.st_size)
        known = self._adapters.get(str(path))
        if known is not None and known.key == key:
            self._adapters.move_to_end(str(path))
            return known
        if known is not None:
            self._forget(str(path))
        for other in [one for one in self._adapters if one not in needed]:
            if len(self._adapters) < self._kept:
                break
            self._forget(other)
        adapter = ld.read_adapter(path)
        self._count += 1
        name = f"adapter_{self._count}"
        report = ld.load_adapter(self.pipe, adapter, name)
        settings = adapter.metadata.get("settings")
        zero_snr = isinstance(settings, dict) and settings.get("rescale_betas_zero_snr") is True
        notes = [printable(note) for note in report.notes]
        notes += [f"made for {printable(report.made_for or 'another base')}, and the {component} here has {verdict}"
                  for component, verdict in report.base.items() if verdict not in ("same", "unknown")]  # fmt: skip
        if report.intact is False:
            notes.append("its tensors are not those of the hash in its file")
        found = Loaded(key, name, hash_of(path), bool(report.tokens), zero_snr, notes)
        self._adapters[str(path)] = found
        return found

    def _forget(self, path: str) -> None:
        one = self._adapters.pop(path, None)
        if one is not None:
            ld.delete_adapter(self.pipe, one.name)


class Bases:
    """The base models in memory, the least recently used of which goes first. Not for two threads at once."""

    def __init__(self, device: str = "auto", kept: int = MODELS_KEPT, adapters_kept: int = ADAPTERS_KEPT) -> None:
        self._device, self._kept, self._adapters_kept = device, kept, adapters_kept
        self._bases: OrderedDict[str, Base] = OrderedDict()

    def get(self, model: str) -> Base:
        """Raises ModelNotFoundError, ConfigError."""
        if model not in self._bases:
            while len(self._bases) >= self._kept:
                self._bases.popitem(last=False)
            self._bases[model] = Base(model, self._device, self._adapters_kept)
        self._bases.move_to_end(model)
        return self._bases[model]


def hash_of(path: Path) -> str:
    """The first sixteen digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
