"""The runs: one that is watched, and the list with the queue. A timer asks; what is new alone is sent."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from app.web.context import Context
from app.web.job_state import ALIVE, JobView
from app.web.views.common import LIGHT, PRESSED, choice, guarded, notes_in, plain, shown
from lora_diffusion.errors import ConfigError

EVERY = 1.5  # seconds between two looks
_NONE = "<h3>No runs yet</h3><p>Start one under “Train on photos” or “Train on text”; it will show here.</p>"
_EMPTY_LIST = [["", "No runs yet", "", "", ""]]
_HEADERS = ["Run", "State", "Step", "Left", "Kind"]


class Runs:
    """The view. `choice` is the run that is watched."""

    def __init__(self, context: Context, visitor: gr.BrowserState) -> None:
        self.context, self.visitor = context, visitor
        self.seen = gr.State({})
        self.choice = choice(
            [], value=None, label="Run", info="The one that is watched below", interactive=True, elem_id="run-choice"
        )  # fmt: skip
        self.status = gr.HTML(_NONE, elem_classes="status", elem_id="run-status", container=True)
        with gr.Row(elem_classes="buttons", equal_height=True):
            self.stop = gr.Button("Stop, keeping what was learned", variant="stop", interactive=False)
            self.resume = gr.Button("Resume", interactive=False)
            self.sample = gr.Button("Sample now", interactive=False)
            self.save = gr.Button("Save now", interactive=False)
        with gr.Row():
            with gr.Column(min_width=300):
                self.loss = gr.LinePlot(
                    x="step", y="loss", color="series", label="Loss (grey: each step, green: smoothed)", x_title="Step",
                    y_title="Loss", height=280,
                    color_map={"each step": "#94a3b8", "smoothed": "#0f766e"}, color_title=" ", buttons=[],
                    elem_id="loss",
                )  # fmt: skip
                self.metrics = gr.LinePlot(
                    x="step", y="value", color="figure", label="Judged on rows or pictures", x_title="Step",
                    y_title="Value", height=240, visible=False, buttons=[],
                )  # fmt: skip
            with gr.Column(min_width=300):
                self.samples = gr.Gallery(
                    label="Previews: the same prompt and seed as training goes on", columns=3, height="auto",
                    object_fit="contain", format="png", buttons=["download", "fullscreen"], interactive=False,
                    elem_id="run-samples", visible=False,
                )  # fmt: skip
        self.log = gr.Textbox(
            label="Last lines of the log", lines=6, max_lines=16, interactive=False, elem_classes="log", autoscroll=True
        )
        with gr.Row(elem_classes="buttons", equal_height=True):
            self.file = gr.DownloadButton("Download the adapter", interactive=False)
            self.again = gr.Button("Start again from the beginning", interactive=False)
            self.remove = gr.Button("Remove this run", interactive=False)
        self.table = gr.Dataframe(
            _EMPTY_LIST, headers=_HEADERS, datatype="str", type="array", interactive=False,
            label="All runs and the queue", wrap=True, elem_id="run-table", buttons=[],
        )  # fmt: skip
        self.timer = gr.Timer(EVERY)
        self._wire()

    @property
    def outputs(self) -> list[Any]:
        return [
            self.seen, self.choice, self.status, self.stop, self.resume, self.sample, self.save, self.loss,
            self.metrics, self.samples, self.log, self.file, self.again, self.remove, self.table,
        ]  # fmt: skip

    def _wire(self) -> None:
        asked = [self.choice, self.visitor, self.seen]
        self.timer.tick(self.look, asked, self.outputs, **LIGHT, trigger_mode="once")
        self.choice.input(self.look, asked, self.outputs, **LIGHT)
        for button, action in (
            (self.stop, self.on_stop), (self.resume, self.on_resume), (self.sample, self.on_sample),
            (self.save, self.on_save), (self.again, self.on_again), (self.remove, self.on_remove),
        ):  # fmt: skip
            button.click(action, [self.choice, self.visitor], None, **PRESSED).then(
                self.look, asked, self.outputs, **LIGHT
            )

    @guarded
    def look(self, chosen: str | None, visitor: str | None, seen: dict[str, Any]) -> dict[Any, Any]:
        """What has changed since the page last looked."""
        try:
            views = self.context.jobs.jobs(self.context.owner(visitor))
        except ConfigError:  # the page has no key yet; the next tick has
            return gr.skip()
        view = next((one for one in views if one.id == chosen), views[0] if views else None)
        now = {
            self.choice: ([_choice(one) for one in views], view.id if view else None),
            self.table: [_row(one) for one in views] or _EMPTY_LIST,
            **(self._parts(view) if view is not None else self._nothing()),
        }
        new = {part: value for part, value in now.items() if seen.get(part._id) != _mark(value)}
        if not new:
            return gr.skip()
        kept = {part._id: _mark(value) for part, value in now.items()}
        return {self.seen: kept, **{part: self._made(part, value) for part, value in new.items()}}

    def _parts(self, view: JobView) -> dict[Any, Any]:
        over = view.status not in ("queued", *ALIVE)
        return {
            self.status: _status(view),
            self.stop: view.can_stop and view.status != "stopping",
            self.resume: view.can_resume,
            self.sample: view.can_ask,
            self.save: view.can_ask,
            self.again: over,
            self.remove: over or view.status == "queued",
            self.loss: _curves(view),
            self.metrics: _figures(view),
            self.samples: [(str(one.path), f"step {one.step}, seed {one.seed}") for one in view.samples],
            self.log: "\n".join(view.log_tail[-10:]).replace(f"{self.context.workspace.root}/", ""),
            self.file: str(view.adapter) if view.adapter and over else None,
        }

    def _nothing(self) -> dict[Any, Any]:
        off = dict.fromkeys((self.stop, self.resume, self.sample, self.save, self.again, self.remove), False)
        return {
            self.status: _NONE,
            **off,
            self.loss: [],
            self.metrics: [],
            self.samples: [],
            self.log: "",
            self.file: None,
        }

    def _made(self, part: Any, value: Any) -> Any:
        """The update of a component from what it shows."""
        if part is self.choice:
            return gr.update(choices=value[0], value=value[1])
        if isinstance(part, gr.DownloadButton):
            return gr.update(value=shown(value) if value else None, interactive=bool(value))
        if isinstance(part, gr.Button):
            return gr.update(interactive=value)
        if part is self.loss:
            return _frame(value, "loss", "series")
        if part is self.metrics:
            return gr.update(value=_frame(value, "value", "figure"), visible=bool(value))
        if part is self.samples:
            pictures = [(shown(path), caption) for path, caption in value]
            return gr.update(value=pictures, visible=bool(pictures))
        return value

    @guarded
    def on_stop(self, chosen: str | None, visitor: str | None) -> None:
        self.context.jobs.stop(_named(chosen), self.context.owner(visitor))

    @guarded
    def on_resume(self, chosen: str | None, visitor: str | None) -> None:
        self.context.jobs.resume(_named(chosen), self.context.owner(visitor))

    @guarded
    def on_again(self, chosen: str | None, visitor: str | None) -> None:
        self.context.jobs.resume(_named(chosen), self.context.owner(visitor), from_start=True)

    @guarded
    def on_sample(self, chosen: str | None, visitor: str | None) -> None:
        self.context.jobs.sample_now(_named(chosen), self.context.owner(visitor))
        gr.Info("Previews will be drawn after this step.")

    @guarded
    def on_save(self, chosen: str | None, visitor: str | None) -> None:
        self.context.jobs.save_now(_named(chosen), self.context.owner(visitor))
        gr.Info("A checkpoint will be made after this step.")

    @guarded
    def on_remove(self, chosen: str | None, visitor: str | None) -> None:
        place = self.context.jobs.remove(_named(chosen), self.context.owner(visitor))
        gr.Info(f"The run is in the trash folder as {place.name}.")


def _named(chosen: str | None) -> str:
    if not chosen:
        raise ConfigError("no run is chosen yet; start one first")
    return chosen


def _mark(value: Any) -> Any:
    """Something small that is equal where a value is: lists of points grow, and their ends say so."""
    if isinstance(value, list) and len(value) > 50:
        return [len(value), value[0], value[-1]]
    return value


def _choice(view: JobView) -> tuple[str, str]:
    return f"{view.id} ({view.status})", view.id


def _row(view: JobView) -> list[str]:
    state = f"waiting, number {view.position}" if view.position else view.status
    steps = f"{view.step:,} of {view.total:,}" if view.total else ""
    kind = {"dreambooth": "photos"}.get(view.recipe, view.recipe)
    return [view.id, state, steps, _left(view.eta_seconds), kind]


def _status(view: JobView) -> str:
    facts = [f"step {view.step:,} of {view.total:,}"] if view.total else []
    facts += (
        [f"{view.speed:.2f} steps a second" if view.speed >= 1 else f"{1 / view.speed:.1f} s a step"]
        if view.speed
        else []
    )
    facts += [f"{_left(view.eta_seconds)} left"] if view.eta_seconds is not None else []
    facts += [f"loss {view.loss_smooth[-1][1]:.4f}"] if view.loss_smooth else []
    facts += [_memory(view)] if view.memory else []
    facts += [f"asked for: {' and '.join(view.wishes)}"] if view.wishes else []
    bar = f'<progress value="{view.step}" max="{view.total}" aria-label="Progress"></progress>' if view.total else ""
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(view.started or view.created))
    name = f"<h3>{plain(view.id)}: {plain(view.status)}</h3>"
    message = plain(view.message[:1].upper() + view.message[1:], 1000)
    return f"{name}<p>{message}</p>{bar}<p>{plain(' · '.join([*facts, begun]))}</p>{notes_in(view.warnings)}"


def _memory(view: JobView) -> str:
    planned = f" ({view.planned_memory / 2**30:.2f} planned)" if view.planned_memory else ""
    return f"{(view.memory or 0) / 2**30:.2f} GiB of memory{planned}"


def _speed(speed: float) -> str:
    return f"{speed:.2f} steps a second" if speed >= 1 else f"{1 / speed:.1f} s a step"


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def _curves(view: JobView) -> list[tuple[int, float, str]]:
    raw = [(step, loss, "each step") for step, loss in view.loss_raw]
    return raw + [(step, loss, "smoothed") for step, loss in view.loss_smooth]


def _figures(view: JobView) -> list[tuple[int, float, str]]:
    return [(step, value, name) for name, points in view.metrics.items() for step, value in points]


def _frame(rows: list[tuple[int, float, str]], value: str, series: str) -> Any:
    import pandas as pd  # type: ignore[import-untyped]

    kinds = {"step": "int64", value: "float64", series: "str"}  # an empty table must not become one of names
    return pd.DataFrame(rows, columns=list(kinds)).astype(kinds)
