"""How a run looks in a terminal: one bar with loss, speed and time left; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any, TextIO

from tqdm import tqdm

Event = dict[str, Any]
PLAIN_SECONDS = 10.0  # time between two lines of progress where there is no terminal
PREVIEW_LENGTH = 400  # characters of a row that is shown
SMOOTHING = 0.95  # the loss of single timesteps jumps; what is shown is a running mean


class Console:
    """Takes the events of a run and shows them. Progress goes to stderr, what was made to stdout.

    Args:
        out, err: where to write; a bar is drawn if `err` is a terminal.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._live = self._err.isatty()
        self._bar: Any = None
        self._title = ""
        self._loss: float | None = None
        self._said = time.monotonic()

    def __call__(self, event: Event) -> None:
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=self._out, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _on_start(self, event: Event) -> None:
        if event.get("recipe") == "dreambooth":
            precision = {"no": "fp32"}.get(event["precision"], event["precision"])
            resumed = f", going on from step {event['resumed_from']}" if event.get("resumed_from") else ""
            self.say(
                f"training on {event['photos']} photos at {event['resolution']} px: {event['max_steps']} steps of "
                f"{event['model']} on {event['device']} in {precision}{resumed}"
            )

        if event.get("recipe") == "text":
            precision = {"no": "fp32"}.get(event["precision"], event["precision"])
            resumed = f", going on from step {event['resumed_from']}" if event.get("resumed_from") else ""
            share = 100 * event["learned_parameters"] / max(event["model_parameters"], 1)
            self.say(
                f"{event['method']} for {event['task']}: {event['max_steps']} steps of {event['model']} on "
                f"{event['device']} in {precision}, {event['learned_parameters']:,} learned parameters "
                f"({share:.2f} %){resumed}"
            )

    def _on_preview(self, event: Event) -> None:
        for row in event["rows"]:
            self.say(f"  {row if len(row) <= PREVIEW_LENGTH else row[: PREVIEW_LENGTH - 1] + '…'}")

    def _on_metrics(self, event: Event) -> None:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in event["figures"].items())
        self.say(f"step {event['step']}, {event['part']}: {figures}{', best so far' if event.get('best') else ''}")

    def _on_plan(self, event: Event) -> None:
        self.say(f"memory: about {event['peak'] / 2**30:.1f} GiB at the most ({event['phase']})")

    def _on_prepare(self, event: Event) -> None:
        self._progress(event["what"], event["done"], event["total"], "")

    def _on_step(self, event: Event) -> None:
        loss = event.get("loss")
        if loss is not None:
            self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        shown = "" if self._loss is None else f"loss {self._loss:.4f}"
        self._progress("training", event["step"], event["max_steps"], shown, event.get("speed"))

    def _on_sample(self, event: Event) -> None:
        if "step" not in event:
            self._progress("drawing", self._count("drawing") + 1, event["of"], "")

    def _on_score(self, event: Event) -> None:
        best = ", best so far" if event["best"] else ""
        self.say(f"step {event['step']}: score {event['score']:.2f}, likeness {event['likeness']:.2f}{best}")

    def _on_warning(self, event: Event) -> None:
        self.say(f"warning: {event['message']}")

    def _on_note(self, event: Event) -> None:
        self.say(event["message"])

    def _on_end(self, event: Event) -> None:
        self.close()

    _on_error = _on_end

    def _count(self, title: str) -> int:
        return self._bar.n if self._bar is not None and self._title == title else 0

    def _progress(self, title: str, done: int, total: int, text: str, speed: float | None = None) -> None:
        if title != self._title or self._bar is None:
            self.close()
            self._title = title
            self._bar = tqdm(
                total=total, initial=max(0, done - 1), desc=title, file=self._err, disable=not self._live,
                unit="step" if title == "training" else "", dynamic_ncols=True, leave=True,
            )  # fmt: skip
            self._bar.n = max(0, done - 1)
        if self._live:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        else:
            self._bar.n = done
            self._plain(title, done, total, text, speed)
        if done >= total:
            self.close()

    def _plain(self, title: str, done: int, total: int, text: str, speed: float | None) -> None:
        now = time.monotonic()
        if done < total and now - self._said < PLAIN_SECONDS:
            return
        self._said = now
        parts = [f"{title} {done}/{total}", text]
        if speed:
            parts += [f"{speed:.2f} steps/s", f"{_clock((total - done) / speed)} left" if done < total else ""]
        print(", ".join(part for part in parts if part), file=self._err, flush=True)


def quieten() -> None:
    """Stop the warnings and bars of the libraries underneath; ours are events, and shown by `Console`."""
    warnings.simplefilter("ignore")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
