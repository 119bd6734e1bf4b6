"""The endpoints for programs: the same core, limits and checks as the page. Everything else of the page is private.

from gradio_client import Client

client = Client("http://127.0.0.1:7860")
drawn = client.predict("a photo of sks dog", {"dog": 0.8}, api_name="/sample")
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from app.web.context import Context
from app.web.job_state import ALIVE, JobView
from app.web.places import is_inside
from app.web.views.common import HEAVY, shown
from lora_diffusion.errors import ConfigError, LoraDiffusionError
from lora_diffusion.text import printable

NAMES = ("sample", "train", "job", "jobs", "stop", "library")
_log = logging.getLogger(__name__)


class Api:
    """The endpoints, one method each; their signatures and docstrings are the documentation on the page."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def sample(
        self, prompt: str, adapters: dict[str, Any] = {}, negative_prompt: str = "", seed: int = -1, steps: int = 20,  # noqa: B006
        guidance: float = 3.0, width: int = 0, height: int = 0, count: int = 1, model: str = "", key: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        """Draw pictures. `adapters` has a weight for each name; seed -1 draws one; width and height 0 are the model's.
        Returns the pictures (PNG files with their settings inside), the seed, the settings and notes."""
        from app.web.pictures import Request

        request = Request(
            model or self.context.model, prompt, negative_prompt or None, list(_table("adapters", adapters).items()),
            None if seed == -1 else seed, steps, guidance, width or None, height or None, count,
        )  # fmt: skip
        drawn = self.context.compute("pictures", "draw", request, self._owner(key))
        files = [_file(path) for path in drawn.paths]
        return {"pictures": files, "seed": drawn.seed, "settings": drawn.settings, "notes": drawn.notes}

    def train(
        self, recipe: str, settings: dict[str, Any], name: str = "", photos: list[Any] = [], rows: Any = None,  # noqa: B006
        key: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        """Queue a training. `recipe` is dreambooth or text, `settings` are the flags of `lora-diffusion dreambooth` or
        `text`; `photos` (or `rows`, one file) are uploaded with `handle_file` and need not be in the settings. Returns
        the job, whose id the other endpoints take."""
        settings = dict(_table("settings", settings))
        if photos:
            settings["instance_data_dir"] = self._photos(photos, settings)
        if rows:
            settings["train_file"] = self._rows(rows)
        job = self.context.jobs.submit(recipe, settings, name, self._owner(key))
        return self.job(job, key)

    def job(self, id: str, key: str = "") -> dict[str, Any]:
        """The state of a job: status, step, speed, losses, previews, the last lines of its log, and, when it is over,
        the file with what it learned."""
        return _told(self.context.jobs.view(id, self._owner(key)), whole=True)

    def jobs(self, key: str = "") -> list[dict[str, Any]]:
        """All jobs in short: those that run, the queue, then the newest."""
        return [_told(view, whole=False) for view in self.context.jobs.jobs(self._owner(key))]

    def stop(self, id: str, key: str = "") -> dict[str, Any]:
        """End a job after its step and keep what it learned; or take it from the queue. Returns the job."""
        self.context.jobs.stop(id, self._owner(key))
        return self.job(id, key)

    def library(self, key: str = "") -> list[dict[str, Any]]:
        """The adapters that there are: id, name, kind, base model, words for the prompt, rank, size, hash state."""
        names = ("id", "name", "kind", "base", "trigger_words", "rank", "size_bytes", "made", "steps", "hash_state",
                 "problem", "notes")  # fmt: skip
        records = self.context.library.records(self._owner(key))
        return [{name: _json(getattr(one, name)) for name in names} for one in records]

    def _owner(self, key: str) -> str | None:
        return self.context.owner(key)

    def _photos(self, photos: list[Any], settings: Mapping[str, Any]) -> str:
        from app.web.uploads import check_photos

        side = settings.get("resolution") or self.context.side(str(settings.get("pretrained_model_name_or_path", "")))
        files = [_uploaded(one) for one in photos]
        report = check_photos(
            files, side if isinstance(side, int) else 512, self.context.limits, self.context.workspace
        )
        if report.refused or report.folder is None:
            reasons = "; ".join(f"{name}: {why}" for name, why in report.refused) or "there is no photo among the files"
            raise ConfigError(f"photos that cannot be used: {reasons}")
        return str(report.folder)

    def _rows(self, rows: Any) -> str:
        from app.web.rows import keep_rows, rows_file

        upload = keep_rows("", _uploaded(rows), self.context.workspace, self.context.limits)
        return str(rows_file(self.context.workspace, upload))


def attach(context: Context) -> None:
    """Give the page that is being built its endpoints."""
    api = Api(context)
    for name in NAMES:
        handler = getattr(api, name)
        shared: dict[str, Any] = {**HEAVY} if name == "sample" else {"concurrency_limit": 8}
        options = {**shared, "api_visibility": "public"}
        gr.api(_answering(handler), api_name=name, api_description=" ".join((handler.__doc__ or "").split()), **options)


def documentation() -> str:
    """The endpoints as Markdown: what each takes, gives and is for."""
    lines = []
    for name in NAMES:
        handler = getattr(Api, name)
        parameters = list(inspect.signature(handler).parameters.values())[1:]
        taken = ", ".join(one.name if one.default is one.empty else f"{one.name}={one.default!r}" for one in parameters)
        lines.append(f"**/{name}**({taken})\n\n{' '.join((handler.__doc__ or '').split())}\n")
    return "\n".join(lines)


def _answering(handler: Callable[..., Any]) -> Callable[..., Any]:
    """An endpoint whose errors are told to the client: ours in words, others by their kind alone."""

    @functools.wraps(handler)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except LoraDiffusionError as problem:
            raise gr.Error(printable(" ".join(str(problem).split()), 600), print_exception=False) from None
        except Exception as problem:
            _log.exception("unexpected, in the endpoint %s", handler.__name__)
            raise gr.Error(f"unexpected: {type(problem).__name__}; the log says more", print_exception=False) from None

    return run


def _table(what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} are a {type(value).__name__}; give names and values")
    return value


def _uploaded(file: Any) -> str:
    """The path of a file that came with the request. Raises ConfigError for a path of anything else."""
    path = file.get("path") if isinstance(file, Mapping) else None
    if not isinstance(path, str) or not is_inside(get_upload_folder(), path) or not Path(path).is_file():
        raise ConfigError("files come with the request: give handle_file('dog.jpg') from gradio_client")
    return path


def _file(path: Path) -> dict[str, Any]:
    """A file that a client fetches."""
    return {"path": shown(path), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}


def _told(view: JobView, *, whole: bool) -> dict[str, Any]:
    names = ["id", "recipe", "status", "position", "message", "step", "total", "speed", "eta_seconds", "memory",
             "planned_memory", "created", "started", "ended"]  # fmt: skip
    if not whole:
        return {name: _json(getattr(view, name)) for name in names}
    names += ["loss_raw", "loss_smooth", "metrics", "warnings", "log_tail", "wishes", "settings"]
    samples = [{"step": one.step, "prompt": one.prompt, "seed": one.seed, "picture": _file(one.path)}
               for one in view.samples if one.path.is_file()]  # fmt: skip
    over = view.adapter is not None and view.status not in ("queued", *ALIVE)
    adapter = _file(view.adapter) if over and view.adapter else None
    return {**{name: _json(getattr(view, name)) for name in names}, "samples": samples, "adapter": adapter}


def _json(value: Any) -> Any:
    """JSON has no NaN, tuples are lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    return {name: _json(one) for name, one in value.items()} if isinstance(value, dict) else value
