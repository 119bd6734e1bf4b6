"""The library: every adapter as a card, and what can be done with one."""

from __future__ import annotations

import math
import os
import time
from typing import Any
from urllib.parse import quote

import gradio as gr

from app.file_configs import METHODS
from app.web.context import Context
from app.web.views.common import HEAVY, LIGHT, PRESSED, choice, guarded, plain, shown
from lora_diffusion.errors import ConfigError

_EMPTY = "<p>No adapters yet. Train one, or import a .safetensors file below.</p>"


class LibraryView:
    """The view. `changed` are the components that `refresh` gives."""

    def __init__(self, context: Context, visitor: gr.BrowserState) -> None:
        self.context, self.visitor = context, visitor
        self.by_login = context.place.is_space and "OAUTH_CLIENT_ID" in os.environ  # hf_oauth in the Space's README
        self.deleted = gr.State("")
        self.cards = gr.HTML(_EMPTY, elem_id="cards", elem_classes="cards")
        self.choice = choice(
            [], value=None, label="Adapter", info="What the actions below are about", elem_id="library-choice"
        )
        self.told = gr.Textbox(
            "", label="What was done or found", lines=2, max_lines=16, interactive=False, elem_id="library-told",
            placeholder="Choose an adapter and press one of the buttons.",
        )  # fmt: skip
        with gr.Row(elem_classes="buttons", equal_height=True):
            self.inspect = gr.Button("What is in it?")
            self.keep = gr.Button("Keep a copy of the run's result")
            self.delete = gr.Button("Delete", variant="stop")
            self.undo = gr.Button("Undo the deletion", interactive=False)
        self._import_part()
        self._change_part()
        self._out_part()
        self._wire()

    def _import_part(self) -> None:
        with gr.Accordion("Import a file", open=True), gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.file = gr.File(
                    label="An adapter (.safetensors)", file_types=[".safetensors"], height=130, elem_id="import-file"
                )  # fmt: skip
            with gr.Column(min_width=280):
                self.import_name = gr.Textbox("", label="Name", info="Empty: that of the file")
                self.import_model = gr.Dropdown(
                    self.context.models + self.context.text_models, value=self.context.model,
                    label="Compare with model",
                    allow_custom_value=self.context.limits.models is None,
                )  # fmt: skip
                self.take = gr.Button("Import", variant="primary", elem_id="import")

    def _change_part(self) -> None:
        with gr.Accordion("Rename, combine, resize", open=False):
            with gr.Row(elem_classes="fields"):
                self.new_name = gr.Textbox("", label="New name", info="For renaming, or for what is made below")
                self.rename = gr.Button("Rename")
            with gr.Row(elem_classes="fields"):
                self.others = choice([], value=[], multiselect=True, label="Combine with", info="One or more others")
                self.weights = gr.Textbox(
                    "", label="Weights", info="One for each, the chosen one first: 1, 0.5 (empty: all 1)"
                )
                self.method = gr.Dropdown(
                    list(METHODS), value="cat", label="Method", info="cat is exact, svd keeps the rank"
                )
                self.combine = gr.Button("Combine")
            with gr.Row(elem_classes="fields"):
                self.rank = gr.Number(4, label="Rank", precision=0, info="Of the smaller copy", minimum=1)
                self.resize = gr.Button("Resize")

    def _out_part(self) -> None:
        with gr.Accordion("Download, convert, push to the hub", open=False):
            with gr.Row(elem_classes="fields"):
                self.format = gr.Radio(
                    [("diffusers", "diffusers"), ("kohya (A1111, ComfyUI)", "kohya"), ("PEFT (zip)", "peft")],
                    value="diffusers", label="Format",
                )  # fmt: skip
                self.convert = gr.Button("Make the file")
                self.download = gr.DownloadButton("Download", interactive=False, elem_id="download")
            with gr.Row(elem_classes="fields"):
                self.repo = gr.Textbox("", label="Repository", info="user/name, on huggingface.co")
                if self.by_login:
                    gr.LoginButton()
                else:
                    self.token = gr.Textbox(
                        "", label="Token", type="password", info="Used once, kept nowhere; it needs the right to write"
                    )
                self.private = gr.Checkbox(True, label="Private", info="Only you can see it")
                self.push = gr.Button("Push to the hub")

    @property
    def changed(self) -> list[Any]:
        return [self.cards, self.choice, self.others]

    def _wire(self) -> None:
        one = [self.choice, self.visitor]
        self.inspect.click(self.on_inspect, one, self.told, **PRESSED)
        for button, action, inputs in (
            (self.keep, self.on_keep, one),
            (self.take, self.on_import, [self.file, self.import_name, self.import_model, self.visitor]),
            (self.rename, self.on_rename, [*one, self.new_name]),
        ):
            button.click(action, inputs, [self.told, self.choice], **PRESSED).then(
                self.refresh, one, self.changed, **LIGHT
            )
        for button, action, inputs in (
            (self.combine, self.on_combine, [*one, self.others, self.weights, self.method, self.new_name]),
            (self.resize, self.on_resize, [*one, self.rank, self.new_name]),
        ):
            button.click(action, inputs, [self.told, self.choice], **HEAVY).then(
                self.refresh, one, self.changed, **LIGHT
            )
        self.delete.click(self.on_delete, one, [self.told, self.deleted, self.undo], **PRESSED).then(
            self.refresh, one, self.changed, **LIGHT
        )
        self.undo.click(self.on_undo, self.deleted, [self.told, self.choice, self.undo], **PRESSED).then(
            self.refresh, one, self.changed, **LIGHT
        )
        self.convert.click(self.on_convert, [*one, self.format], [self.told, self.download], **HEAVY)
        if self.by_login:
            self.push.click(self.on_push_from_space, [*one, self.repo, self.private], self.told, **PRESSED)
        else:
            self.push.click(
                self.on_push, [*one, self.repo, self.private, self.token], [self.told, self.token], **PRESSED
            )

    @guarded
    def refresh(self, chosen: str | None, visitor: str | None) -> dict[Any, Any]:
        """The cards and the choices as they are now."""
        records = self.context.library.records(self.context.owner(visitor))
        choices = [(one.name, one.id) for one in records]
        there = [id for _, id in choices]
        value = chosen if chosen in there else there[0] if there else None
        return {
            self.cards: _shelf(records),
            self.choice: gr.update(choices=choices, value=value),
            self.others: gr.update(choices=choices),
        }

    @guarded
    def on_inspect(self, chosen: str | None, visitor: str | None) -> str:
        record = self._record(chosen, visitor)
        return f"{record.name}\n{self.context.library.report(record.id, owner=self.context.owner(visitor))}"

    @guarded
    def on_keep(self, chosen: str | None, visitor: str | None) -> tuple[str, str]:
        record = self._record(chosen, visitor)
        if not record.id.startswith("runs/"):
            raise ConfigError(f"{record.name} is in the library already; this is for the results of runs")
        kept = self.context.library.add_run(record.path.parent, owner=self.context.owner(visitor))
        return f"{kept.name} stays in the library when the run is removed.", kept.id

    @guarded
    def on_import(self, file: str | None, name: str, model: str, visitor: str | None) -> tuple[str, str]:
        if not file:
            raise ConfigError("no file is chosen yet: drop a .safetensors file first")
        record, report = self.context.library.import_file(file, name, model=model, owner=self.context.owner(visitor))
        return f"{record.name} is in the library.\n{report}", record.id

    @guarded
    def on_rename(self, chosen: str | None, visitor: str | None, name: str) -> tuple[str, str]:
        record = self.context.library.rename(_id(chosen), (name or "").strip(), self.context.owner(visitor))
        return f"It is called {record.name} now.", record.id

    @guarded
    def on_combine(
        self, chosen: str | None, visitor: str | None, others: list[str] | None, weights: str, method: str, name: str
    ) -> tuple[str, str]:
        ids = [_id(chosen), *(one for one in others or [] if one != chosen)]
        record = self.context.library.combine(
            ids,
            _numbers(weights, len(ids)),
            method,
            name=(name or "").strip() or None,
            owner=self.context.owner(visitor),
        )
        return f"{record.name} is the sum of {len(ids)} adapters, of rank {record.rank}.", record.id

    @guarded
    def on_resize(self, chosen: str | None, visitor: str | None, rank: float | None, name: str) -> tuple[str, str]:
        wanted = int(rank) if rank is not None and math.isfinite(rank) else 0
        record = self.context.library.resize(
            _id(chosen), wanted, name=(name or "").strip() or None, owner=self.context.owner(visitor)
        )
        return f"{record.name} has rank {record.rank} and {_size(record.size_bytes)}.", record.id

    @guarded
    def on_delete(self, chosen: str | None, visitor: str | None) -> tuple[str, str, Any]:
        record = self._record(chosen, visitor)
        token = self.context.library.delete(record.id, self.context.owner(visitor))
        return f"{record.name} is in the trash; Undo takes it back for a day.", token, gr.update(interactive=True)

    @guarded
    def on_undo(self, token: str) -> tuple[str, str | None, Any]:
        back = self.context.library.undo(token)
        return "It is back.", back[0] if back else None, gr.update(interactive=False)

    @guarded
    def on_convert(self, chosen: str | None, visitor: str | None, format: str) -> tuple[str, Any]:
        path = self.context.library.convert(_id(chosen), format, self.context.owner(visitor))
        return f"{path.name} is ready: press Download.", gr.update(value=shown(path), interactive=True)

    @guarded
    def on_push(self, chosen: str | None, visitor: str | None, repo: str, private: bool, token: str) -> tuple[str, str]:
        address = self.context.library.push(
            _id(chosen), (repo or "").strip(), token or "", private=bool(private), owner=self.context.owner(visitor)
        )
        return f"It is at {address}", ""

    @guarded
    def on_push_from_space(
        self, chosen: str | None, visitor: str | None, repo: str, private: bool, token: gr.OAuthToken | None
    ) -> str:
        if token is None:
            raise ConfigError("log in with Hugging Face first; the login is used for this push and is not kept")
        return self.on_push(chosen, visitor, repo, private, token.token)[0]

    def _record(self, chosen: str | None, visitor: str | None) -> Any:
        return self.context.library.record(_id(chosen), self.context.owner(visitor))


def _id(chosen: str | None) -> str:
    if not chosen:
        raise ConfigError("no adapter is chosen; train or import one first")
    return chosen


def _numbers(text: str, count: int) -> list[float]:
    if not (text or "").strip():
        return [1.0] * count
    try:
        return [float(word) for word in text.replace(";", ",").split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"the weights {text[:40]!a} are no numbers; write 1, 0.5") from None


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _shelf(records: list[Any]) -> str:
    return (
        f'<div class="shelf" tabindex="0" role="region" aria-label="Adapters">{"".join(map(_card, records))}</div>'
        if records
        else _EMPTY
    )


def _card(record: Any) -> str:
    """One adapter as HTML; all that came from its file is text."""
    picture = '<div class="blank">no picture</div>'
    if record.preview is not None:
        address = f"gradio_api/file={quote(shown(record.preview))}"
        picture = f'<img src="{address}" alt="Drawn with {plain(record.name, 64)}" loading="lazy">'
    facts = [
        ("For", f"{record.kind}, {record.base or 'base model not said'}"),
        ("In the prompt", ", ".join(record.trigger_words) or "nothing special"),
        ("Rank", record.rank if record.rank is not None else "none"),
        ("Size", _size(record.size_bytes)),
        ("Made", time.strftime("%Y-%m-%d %H:%M", time.localtime(record.made))),
        ("Check", record.problem or record.hash_state),
    ]
    rows = "".join(f"<dt>{name}</dt><dd>{plain(value, 200)}</dd>" for name, value in facts)
    return f"<article>{picture}<h3>{plain(record.name, 64)}</h3><dl>{rows}</dl></article>"
