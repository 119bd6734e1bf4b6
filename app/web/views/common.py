"""What all views need: errors in plain words, files on their way to a browser, texts that cannot be HTML."""

from __future__ import annotations

import functools
import html
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from app.web.context import Context
from app.web.forms import in_labels
from lora_diffusion.errors import LoraDiffusionError
from lora_diffusion.text import printable

_log = logging.getLogger(__name__)

# What computes shares one place in the line, so that two of them never run at once.
HEAVY: dict[str, Any] = {"concurrency_id": "heavy", "concurrency_limit": 1, "api_visibility": "private"}
# What only looks answers at once, however many ask.
LIGHT: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
# What a person presses and waits a moment for.
PRESSED: dict[str, Any] = {"concurrency_limit": None, "show_progress": "minimal", "api_visibility": "private"}


def choice(choices: list[Any], **settings: Any) -> gr.Dropdown:
    """A dropdown whose choices change as time goes on: what comes back is looked up by the core, not here."""
    return gr.Dropdown(choices, allow_custom_value=True, **settings)


def guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors are told on the page: ours as they are, others without what is inside."""

    @functools.wraps(handler)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except LoraDiffusionError as problem:
            raise told(str(problem)) from None
        except gr.Error:
            raise
        except Exception as problem:
            _log.exception("unexpected, in %s", handler.__name__)
            raise told(f"something went wrong that should not ({type(problem).__name__}); the log says more") from None

    return run


def told(message: str) -> gr.Error:
    """A message of an error for the page: flags by their labels, nothing that a browser takes for HTML."""
    text = in_labels(printable(" ".join(message.split()), 600))
    return gr.Error(html.escape(text[:1].upper() + text[1:], quote=False), duration=12, print_exception=False)


def shown(path: str | Path) -> str:
    """A copy of a file where a browser may fetch it, byte for byte; nothing of the app's own folder is served."""
    return str(save_file_to_cache(path, cache_dir=get_upload_folder()))


def stop_of(context: Context, request: gr.Request) -> Callable[[], bool]:
    """What a core asks at every step: whether this page's visitor has pressed Stop since now."""
    session = str(request.session_hash)
    context.stopped.discard(session)
    return lambda: session in context.stopped


def plain(text: object, most: int = 500) -> str:
    """Untrusted text for HTML."""
    return html.escape(printable(str(text), most))


def card(rows: list[tuple[str, str]], title: str = "", notes: list[str] | None = None) -> str:
    """A small table of facts as HTML."""
    head = f"<h3>{plain(title)}</h3>" if title else ""
    lines = "".join(f"<tr><td>{plain(name)}</td><td>{plain(value, 2000)}</td></tr>" for name, value in rows)
    return f'{head}<table role="presentation">{lines}</table>{notes_in(notes or [])}'


def notes_in(notes: list[str]) -> str:
    """Sentences as an HTML list."""
    return "<ul>" + "".join(f"<li>{plain(in_labels(note), 1000)}</li>" for note in notes) + "</ul>" if notes else ""
