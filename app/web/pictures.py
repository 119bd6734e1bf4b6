"""Drawing on the page: several adapters, each with its weight, and the same picture again from the same request.

Every picture is drawn by itself, under one lock: requests that come at once take turns picture by picture, and neither
adapters nor batches of one reach another. What was active is inactive after each, whatever happened.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from app.web import picture_settings
from app.web.adapter_names import AdapterNames
from app.web.library import Library
from app.web.limits import Limits
from app.web.picture_grid import Axis, Cell, cells_of, compose_grid
from app.web.picture_settings import MAX_SEED, Request, checked, one_weight, settings_dict
from app.web.places import Workspace
from app.web.prompt_syntax import Weight, merged, parse_prompt
from lora_diffusion.errors import LoraDiffusionError
from lora_diffusion.text import printable
from train.pictures import read_settings, readable_name, save_png

Progress = Callable[[int, int], None]
Stop = Callable[[], bool]
MODELS_KEPT, ADAPTERS_KEPT = 2, 8
WAIT = 0.2  # seconds between two looks at a wish to stop while others draw
MOST_DRAWN = 2**31  # a seed that is chosen lies below: short enough to be read out


class Stopped(LoraDiffusionError):
    """Whoever asked for it wished to stop before there was a picture."""


@dataclass(frozen=True)
class Drawn:
    """What came of a request.

    Attributes:
        paths: PNG files with their settings inside, in the order of their seeds.
        seed: of the first picture.
        settings: inside the first picture.
        notes: what a user should hear: an adapter for another base, a prompt that is too long.
        stopped: there are fewer pictures than were asked for.
    """

    paths: list[Path]
    seed: int
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    stopped: bool = False


@dataclass(frozen=True)
class _Plan:
    """A checked request without tags, its seed chosen, its adapters found."""

    request: Request
    adapters: list[tuple[str, Path, Weight]]
    notes: list[str]


class Pictures:
    """Draws; may be called from several threads.

    Args:
        library: whose adapters are meant; None: that of the workspace.
        device: "auto" takes CUDA where there is one.
        models_kept, adapters_kept: base models in memory, and adapters in each.
    """

    def __init__(
        self, workspace: Workspace, limits: Limits, library: Library | None = None, *, device: str = "auto",
        models_kept: int = MODELS_KEPT, adapters_kept: int = ADAPTERS_KEPT,
    ) -> None:  # fmt: skip
        self.workspace, self.limits = workspace, limits
        self.names = AdapterNames(workspace, limits, library)
        self._device, self._kept = device, (models_kept, adapters_kept)
        self._bases: Any = None
        self._lock, self._writing = threading.Lock(), threading.Lock()

    def draw(
        self, request: Request, owner: str | None = None, *, on_progress: Progress | None = None,
        should_stop: Stop | None = None,
    ) -> Drawn:  # fmt: skip
        """Draw `count` pictures and keep them in the gallery.

        Args:
            owner: who asks; on a Space, whose adapters may be used and whose gallery it is.
            on_progress: told of (step, steps in all).
            should_stop: asked at every step; the pictures that are done are kept.

        Raises:
            ConfigError: a setting beyond the limits, or an adapter that is not there.
            AdapterMismatchError, AdapterFormatError, ModelNotFoundError: what was named cannot be used.
            Stopped: before the first picture was done.
        """
        plan = self._plan(request, owner)
        meter = _Meter(on_progress, should_stop, plan.request.steps * plan.request.count)
        paths: list[Path] = []
        notes = list(plan.notes)
        for number in range(plan.request.count):
            one = replace(plan.request, seed=_seed(plan) + number, count=1)
            try:
                picture, settings, said = self._one(one, plan.adapters, meter)
            except Stopped:
                if paths:
                    break
                raise
            paths.append(self._keep(picture, settings, owner))
            notes += [note for note in said if note not in notes]
            meter.finish(plan.request.steps * (number + 1))
        return Drawn(paths, _seed(plan), read_settings(paths[0]), notes, len(paths) < plan.request.count)

    def compare(
        self, request: Request, owner: str | None = None, *, on_progress: Progress | None = None,
        should_stop: Stop | None = None,
    ) -> tuple[Path, Path]:  # fmt: skip
        """The first picture of a request without its adapters and with them, from the same noise. Raises as `draw`."""
        plan = self._plan(request, owner)
        meter = _Meter(on_progress, should_stop, 2 * plan.request.steps)
        paths = []
        for number, adapters in enumerate(([], plan.adapters), start=1):
            picture, settings, _ = self._one(replace(plan.request, count=1), adapters, meter)
            paths.append(self._keep(picture, settings, owner))
            meter.finish(plan.request.steps * number)
        return paths[0], paths[1]

    def grid(
        self, request: Request, x_axis: Axis, y_axis: Axis | None = None, owner: str | None = None, *,
        on_progress: Progress | None = None, should_stop: Stop | None = None,
    ) -> Path:  # fmt: skip
        """One PNG of the first picture of a request, over one or two of its settings. Raises as `draw`; stopped after
        the first picture, it has empty places."""
        whole = self._plan(replace(request, count=1), owner)
        start = whole.request
        cells = cells_of(start, x_axis, y_axis, self.names, owner, self.limits)
        plans = [[self._plan(cell.request, owner) for cell in row] for row in cells]  # all mistakes before the first
        steps = sum(plan.request.steps for row in plans for plan in row)
        meter, done, stopped = _Meter(on_progress, should_stop, steps), 0, False
        drawn: dict[tuple[int, int], Image.Image] = {}
        for y, row in enumerate(plans):
            for x, plan in enumerate(row):
                if stopped:
                    continue
                try:
                    drawn[y, x], _, _ = self._one(plan.request, plan.adapters, meter)
                except Stopped:
                    if not drawn:
                        raise
                    stopped = True
                done += plan.request.steps
                meter.finish(done)
        picture = compose_grid(cells, drawn, x_axis, y_axis, self.limits.pixels)
        settings = self._settings(start, whole.adapters, picture.size, {})
        settings |= {"width": start.width, "height": start.height, "grid": _said(cells, x_axis, y_axis)}
        return self._keep(picture, settings, owner, "grid")

    def settings_of(self, path: str | Path, model: str = "pocket") -> Request:
        """The request that a PNG was drawn from; model: for pictures of other programs. Raises DatasetError or
        ConfigError."""
        return picture_settings.request_in(Path(path), self.limits, model)

    def gallery(self, owner: str | None = None, most: int = 100) -> list[Path]:
        """The pictures that were drawn last, the newest first."""
        found = []
        for path in self._folder(owner).glob("*.png"):
            try:
                found.append((path.stat().st_mtime_ns, path.name, path))
            except OSError:  # gone since
                continue
        return [path for _, _, path in sorted(found, reverse=True)[:most]]

    def _plan(self, request: Request, owner: str | None) -> _Plan:
        request = checked(request, self.limits)
        parsed = parse_prompt(request.prompt)
        files = self.names.files(owner)

        def found(pairs: Sequence[tuple[str, Weight]]) -> list[tuple[str, Weight]]:
            return [(self.names.find(name, owner, files)[0], weight) for name, weight in pairs]

        chosen, notes = merged(found(request.adapters), found(parsed.adapters))
        adapters = [(name, self.names.find(name, owner, files)[1], weight) for name, weight in chosen]
        request = replace(request, prompt=parsed.text, adapters=chosen, seed=_chosen(request.seed))
        checked(request, self.limits)
        return _Plan(request, adapters, notes)

    def _one(
        self, request: Request, adapters: Sequence[tuple[str, Path, Weight]], meter: _Meter
    ) -> tuple[Image.Image, dict[str, Any], list[str]]:
        """The one picture of a request, the settings to put into it, and what is to be said of it."""
        from train.sampling import generate
        from train.text_states import token_count, token_limit

        with self._turn(meter):
            base = self._get(request.model)
            with base.active([(path, weight) for _, path, weight in adapters]) as loaded, meter.watching(base.pipe):
                [picture] = generate(
                    base.pipe, request.prompt, [request.seed or 0], steps=request.steps, guidance=request.guidance,
                    batch_size=1, negative_prompt=request.negative_prompt, width=request.width, height=request.height,
                )  # fmt: skip
                count, limit = token_count(base.pipe, request.prompt), token_limit(base.pipe)
                hashes = {name: one.sha256 for (name, _, _), one in zip(adapters, loaded)}
        notes = [f"{name}: {note}" for (name, _, _), one in zip(adapters, loaded) for note in one.notes]
        if count > limit:
            notes.append(f"the prompt has {count} tokens; the model reads the first {limit}")
        return picture, self._settings(request, adapters, picture.size, hashes), notes

    @contextmanager
    def _turn(self, meter: _Meter) -> Iterator[None]:
        """The lock, for which nobody waits who has wished to stop."""
        while not self._lock.acquire(timeout=WAIT):
            meter.check()
        try:
            meter.check()
            yield
        finally:
            self._lock.release()

    def _get(self, model: str) -> Any:
        if self._bases is None:
            from app.web.picture_adapters import Bases

            self._bases = Bases(self._device, *self._kept)
        return self._bases.get(model)

    @staticmethod
    def _settings(
        request: Request, adapters: Sequence[tuple[str, Path, Weight]], size: tuple[int, int], hashes: dict[str, str]
    ) -> dict[str, Any]:
        found = []
        for name, path, weight in adapters:
            told = {"sha256": hashes[name]} if name in hashes else {}
            found.append({"name": name, "file": path.name, **one_weight(weight), **told})
        return settings_dict(request, found, size)

    def _folder(self, owner: str | None) -> Path:
        """Of one's own on a Space, under a name that tells nothing."""
        if owner is None or not self.limits.private_runs:
            return self.workspace.gallery
        folder = self.workspace.gallery / hashlib.sha256(owner.encode()).hexdigest()[:20]
        folder.mkdir(exist_ok=True)
        return folder

    def _keep(self, picture: Image.Image, settings: dict[str, Any], owner: str | None, kind: str = "") -> Path:
        """Write a PNG under a readable name; one that was made otherwise is not overwritten."""
        adapters = [(one["name"], one["weight"]) for one in settings["adapters"]]
        stem = readable_name(settings["prompt"], settings["seed"], adapters[:4])
        stem = f"{kind}_{stem}" if kind else stem
        with self._writing:
            path, number = self._folder(owner) / f"{stem}.png", 1
            while path.exists() and read_settings(path) != settings:
                number += 1
                path = path.with_name(f"{stem}_{number}.png")
            return save_png(picture, path, settings)


class _Meter:
    """Steps of a request, through the one place where a pipeline tells of them: its progress bar."""

    def __init__(self, on_progress: Progress | None, should_stop: Stop | None, total: int) -> None:
        self._say, self._stop = on_progress or (lambda step, total: None), should_stop or (lambda: False)
        self._total, self._done = total, 0

    def check(self) -> None:
        """Raises Stopped."""
        if self._stop():
            raise Stopped("stopped")

    def finish(self, done: int) -> None:
        """So many steps are over, however many were told of."""
        if self._done != done:
            self._done = done
            self._say(done, self._total)

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:
        """Within it the steps of a pipeline are counted here, and end where that is wished."""
        pipe.progress_bar = lambda iterable=None, total=None: self._bar()
        try:
            yield
        finally:
            del pipe.progress_bar

    @contextmanager
    def _bar(self) -> Iterator[_Meter]:
        yield self

    def update(self, steps: int = 1) -> None:
        """What a pipeline calls after each step."""
        self.check()
        self._done = min(self._done + steps, self._total)
        self._say(self._done, self._total)


def _seed(plan: _Plan) -> int:
    assert plan.request.seed is not None, "_plan() has chosen one"
    return plan.request.seed


def _chosen(seed: int | None) -> int:
    return secrets.randbelow(MOST_DRAWN) if seed is None else seed


def _said(cells: Sequence[Sequence[Cell]], x_axis: Axis, y_axis: Axis | None) -> dict[str, Any]:
    """The axes as JSON values."""
    told: dict[str, Any] = {"x": {"kind": x_axis.kind, "values": [printable(cell.x, 100) for cell in cells[0]]}}
    if y_axis is not None:
        told["y"] = {"kind": y_axis.kind, "values": [printable(row[0].y, 100) for row in cells]}
    return told


__all__ = ["MAX_SEED", "Axis", "Drawn", "Pictures", "Request", "Stopped"]
