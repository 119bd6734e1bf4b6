"""The page: its parts in tabs, the key of a visitor, and what happens when it is loaded."""

from __future__ import annotations

import secrets
from typing import Any

import gradio as gr

from app.web.api import attach
from app.web.context import Context
from app.web.views.about import about
from app.web.views.common import LIGHT, PRESSED, plain
from app.web.views.job import Runs
from app.web.views.library import LibraryView
from app.web.views.sample import Sample
from app.web.views.text import Write
from app.web.views.train_pictures import TrainPictures
from app.web.views.train_text import TrainText

TITLE = "LoRA Diffusion"
_INTRO = "# LoRA Diffusion\nTeach a model your own subject, style or texts, watch it learn, and use what it learned."


def build(context: Context) -> gr.Blocks:
    """The page of an app. Launch it with `app.web.main.serve`, which sets theme, CSS and limits."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 24 * 3600), fill_width=False) as page:
        gr.Markdown(_INTRO, elem_classes="intro")
        visitor = gr.BrowserState("", storage_key="lora-diffusion-visitor", secret="a visitor's own key")
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as tabs:
            trainings: list[Any] = []
            with gr.Tab("Train on photos", id="photos"):
                _training(context)
                trainings.append(TrainPictures(context, visitor))
            with gr.Tab("Train on text", id="texts"):
                _training(context)
                trainings.append(TrainText(context, visitor))
            with gr.Tab("Runs", id="runs"):
                runs = Runs(context, visitor)
            with gr.Tab("Draw", id="draw") as draw:
                sample = Sample(context, visitor)
                draw.select(sample.refresh, visitor, sample.adapters, **LIGHT)
            with gr.Tab("Write", id="write") as writing:
                write = Write(context, visitor)
                writing.select(write.refresh, visitor, write.adapters, **LIGHT)
            with gr.Tab("Library", id="library") as shelf:
                library = LibraryView(context, visitor)
                shelf.select(library.refresh, [library.choice, visitor], library.changed, **LIGHT)
            with gr.Tab("About", id="about"):
                about(context)
        attach(context)
        for training in trainings:
            _start(training, runs, tabs, visitor)
        page.load(_key, visitor, visitor, **LIGHT).then(
            runs.look, [runs.choice, visitor, runs.seen], runs.outputs, **LIGHT
        )  # fmt: skip
    return page


def _start(training: Any, runs: Runs, tabs: gr.Tabs, visitor: gr.BrowserState) -> None:
    """What the button of a training does: queue the run, and go where it is watched."""
    training.button.click(training.start_run, training.inputs, runs.choice, **PRESSED).success(
        lambda: gr.Tabs(selected="runs"), None, tabs, **LIGHT
    ).then(runs.look, [runs.choice, visitor, runs.seen], runs.outputs, **LIGHT)


def _training(context: Context) -> None:
    """Why there is no training here, and what to do."""
    if not context.place.training_allowed:
        gr.Markdown(f"**No training here:** {plain(context.place.reason)}", elem_classes="note")
        if context.place.is_space:
            gr.DuplicateButton("Duplicate this Space")


def _key(visitor: str | None) -> str:
    """The secret that says whose runs are whose; a browser that has one keeps it."""
    return visitor if isinstance(visitor, str) and len(visitor) >= 16 else secrets.token_urlsafe(24)
