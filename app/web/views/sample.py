"""Draw: a prompt and adapters with weights; pictures, the same without the adapters, and grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.web.context import Context
from app.web.views.common import HEAVY, LIGHT, PRESSED, choice, guarded, notes_in, plain, shown, stop_of
from lora_diffusion.errors import ConfigError

ROWS = 4  # adapters beside those in the prompt
AXES = ("weight", "seed", "checkpoint", "adapter", "prompt", "steps", "guidance")
_NOTHING = "<p>Nothing drawn yet. Write a prompt, choose an adapter if you have one, and press Draw.</p>"


class Sample:
    """The view."""

    def __init__(self, context: Context, visitor: gr.BrowserState) -> None:
        self.context, self.visitor = context, visitor
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self._request_part()
            with gr.Column(scale=3, min_width=300):
                self._results_part()
        self._wire()

    def _request_part(self) -> None:
        pocket, limits = self.context.model == "pocket", self.context.limits
        self.prompt = gr.Textbox(
            "", label="Prompt", lines=3, info="An adapter can be named in it too: <lora:name:0.8>", elem_id="prompt",
            placeholder="a photo of sks creature in a forest",
        )  # fmt: skip
        self.negative = gr.Textbox("", label="Negative prompt", info="What to stay away from")
        self.adapters: list[gr.Dropdown] = []
        self.weights: list[gr.Slider] = []
        self._adapter_row(1)
        with gr.Accordion("More adapters", open=False):
            for number in range(2, ROWS + 1):
                self._adapter_row(number)
        self.model = gr.Dropdown(
            self.context.models, value=self.context.model, label="Base model", elem_id="sample-model",
            allow_custom_value=limits.models is None,
        )  # fmt: skip
        with gr.Row(elem_classes="fields"):
            self.seed = gr.Textbox("", label="Seed", info="Empty: chosen, and told", min_width=130)
            self.count = gr.Slider(1, limits.count, value=1, step=1, label="Pictures", min_width=130, buttons=[])
        with gr.Row(elem_classes="fields"):
            most = limits.inference_steps
            self.steps = gr.Slider(
                1, most, value=20 if pocket else 30, step=1, label="Steps", min_width=130, buttons=[]
            )
            self.guidance = gr.Slider(
                1, 20, value=3 if pocket else 7.5, step=0.5, label="Guidance", min_width=130, buttons=[]
            )
        with gr.Row(elem_classes="fields"):
            self.width = gr.Textbox("", label="Width", info="Empty: the model's own", min_width=130)
            self.height = gr.Textbox("", label="Height", info="Empty: the model's own", min_width=130)
        self.file = gr.File(
            label="A picture drawn here: gives its settings back", file_types=[".png"], height=160, elem_id="restore"
        )  # fmt: skip

    def _adapter_row(self, number: int) -> None:
        with gr.Row(elem_classes="fields"):
            self.adapters.append(
                choice(
                    [("(none)", "")], value="", label=f"Adapter {number}", min_width=150, elem_id=f"adapter-{number}"
                )
            )
            self.weights.append(
                gr.Slider(-1, 2, value=1, step=0.05, label=f"Weight {number}", min_width=150, buttons=[])
            )

    def _results_part(self) -> None:
        with gr.Row(elem_classes="buttons", equal_height=True):
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
            self.compare = gr.Button("Compare with the base", elem_id="compare")
            self.stop = gr.Button("Stop", elem_id="stop-drawing")
        self.told = gr.HTML(_NOTHING, elem_classes="note", elem_id="drawn-told")
        self.pictures = gr.Gallery(
            label="Pictures", format="png", columns=2, height="auto", object_fit="contain", interactive=False,
            buttons=["download", "download_all", "fullscreen"], elem_id="pictures", visible=False,
        )  # fmt: skip
        with gr.Accordion("Without and with the adapters, from the same noise", open=False) as self.beside:
            self.slider = gr.ImageSlider(
                label="Left: the base model; right: with the adapters", format="png", type="filepath",
                interactive=False,
                buttons=["fullscreen"], elem_id="slider", max_height=520,
            )  # fmt: skip
        with gr.Accordion("Grid over one or two settings", open=False):
            with gr.Row(elem_classes="fields"):
                self.x_kind = gr.Dropdown(list(AXES), value="weight", label="Across", min_width=130)
                self.x_values = gr.Textbox(
                    "0..1/5", label="Values across", info="1, 2, 5 or 0..1/5 (prompts: one a line)", min_width=150
                )
                self.y_kind = gr.Dropdown(
                    [("(nothing)", ""), *((one, one) for one in AXES)], value="seed", label="Down", min_width=130
                )
                self.y_values = gr.Textbox("1..3", label="Values down", info="In the same way", min_width=150)
            self.make_grid = gr.Button("Draw the grid", elem_id="draw-grid")
            self.grid = gr.Image(
                label="Grid", format="png", type="filepath", interactive=False, buttons=["download", "fullscreen"],
                elem_id="grid",
            )  # fmt: skip
        with gr.Accordion("Earlier pictures", open=False) as self.shelf:
            self.earlier = gr.Gallery(
                label="Choose one to get its settings back", format="png", columns=4, height="auto",
                object_fit="contain", interactive=False, allow_preview=False, elem_id="earlier",
            )  # fmt: skip

    def _wire(self) -> None:
        fields = [
            self.model, self.prompt, self.negative, self.seed, self.steps, self.guidance, self.width, self.height,
            self.count, *self.adapters, *self.weights,
        ]  # fmt: skip
        asked = {self.visitor, *fields}
        axes = {self.x_kind, self.x_values, self.y_kind, self.y_values}
        self.draw.click(self.on_draw, asked, [self.pictures, self.told], **HEAVY)
        self.prompt.submit(self.on_draw, asked, [self.pictures, self.told], **HEAVY)
        self.compare.click(lambda: gr.Accordion(open=True), None, self.beside, **LIGHT)
        self.compare.click(self.on_compare, asked, [self.slider, self.told], **HEAVY)
        self.make_grid.click(self.on_grid, asked | axes, [self.grid, self.told], **HEAVY)
        self.stop.click(self.on_stop, None, None, **LIGHT)
        self.file.upload(self.on_file, self.file, [*fields, self.told], **PRESSED)
        self.shelf.expand(self.on_shelf, self.visitor, self.earlier, **PRESSED)
        self.earlier.select(self.on_earlier, None, [*fields, self.told], **PRESSED)

    @guarded
    def refresh(self, visitor: str | None) -> dict[Any, Any]:
        """The adapters that there are now."""
        records = [one for one in self.context.library.records(self.context.owner(visitor)) if one.kind == "pictures"]
        choices = [("(none)", ""), *((one.name, one.id) for one in records if one.problem is None)]
        return {part: gr.update(choices=choices) for part in self.adapters}

    def request(self, data: dict[Any, Any]) -> Any:
        from app.web.pictures import Request

        chosen = [(data[a], float(data[w])) for a, w in zip(self.adapters, self.weights) if data[a]]
        return Request(
            data[self.model], data[self.prompt] or "", (data[self.negative] or "").strip() or None, chosen,
            whole_number("the seed", data[self.seed]), int(data[self.steps]), float(data[self.guidance]),
            whole_number("the width", data[self.width]), whole_number("the height", data[self.height]),
            int(data[self.count]),
        )  # fmt: skip

    @guarded
    def on_draw(self, data: dict[Any, Any], request: gr.Request, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        drawn = self.context.compute(
            "pictures", "draw", self.request(data), self.context.owner(data[self.visitor]),
            on_progress=_told_to(progress), should_stop=stop_of(self.context, request),
        )  # fmt: skip
        pictures = [(shown(path), f"seed {drawn.seed + number}") for number, path in enumerate(drawn.paths)]
        return gr.update(value=pictures, visible=True), _said(drawn)

    @guarded
    def on_compare(self, data: dict[Any, Any], request: gr.Request, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        base, adapted = self.context.compute(
            "pictures", "compare", self.request(data), self.context.owner(data[self.visitor]),
            on_progress=_told_to(progress), should_stop=stop_of(self.context, request),
        )  # fmt: skip
        seed = self.context.pictures.settings_of(adapted, data[self.model]).seed
        return (shown(base), shown(adapted)), f"<p>Both from the noise of seed {seed}: drag the line.</p>"

    @guarded
    def on_grid(self, data: dict[Any, Any], request: gr.Request, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        from app.web.picture_grid import parse_axis

        x_axis = parse_axis(data[self.x_kind], data[self.x_values] or "")
        y_axis = parse_axis(data[self.y_kind], data[self.y_values] or "") if data[self.y_kind] else None
        path = self.context.compute(
            "pictures", "grid", self.request(data), x_axis, y_axis, self.context.owner(data[self.visitor]),
            on_progress=_told_to(progress), should_stop=stop_of(self.context, request),
        )  # fmt: skip
        return shown(path), f"<p>The grid is in the gallery as {plain(path.name)}.</p>"

    @guarded
    def on_stop(self, request: gr.Request) -> None:
        self.context.stopped.add(str(request.session_hash))
        gr.Info("Stopping after this step; what is done is kept.")

    @guarded
    def on_file(self, file: str | None) -> dict[Any, Any]:
        return self._restored(file) if file else {self.told: _NOTHING}

    @guarded
    def on_shelf(self, visitor: str | None) -> list[str]:
        return [shown(path) for path in self.context.pictures.gallery(self.context.owner(visitor), 40)]

    @guarded
    def on_earlier(self, chosen: gr.SelectData) -> dict[Any, Any]:
        return self._restored(chosen.value["image"]["path"])

    def _restored(self, file: str) -> dict[Any, Any]:
        """The fields as they were for a picture; the file is one that the page was given, or gave."""
        from gradio.utils import get_upload_folder

        from app.web.places import is_inside

        if not is_inside(get_upload_folder(), file):
            raise ConfigError("this picture was not given to the page; drop the file itself")
        request = self.context.pictures.settings_of(Path(file), self.context.model)
        chosen = [*request.adapters, *[("", 1.0)] * ROWS][:ROWS]
        weights = [weight if isinstance(weight, int | float) else 1.0 for _, weight in chosen]
        return {
            self.model: request.model, self.prompt: request.prompt, self.negative: request.negative_prompt or "",
            self.seed: _typed(request.seed), self.steps: request.steps, self.guidance: request.guidance,
            self.width: _typed(request.width), self.height: _typed(request.height), self.count: 1,
            **dict(zip(self.adapters, (name for name, _ in chosen))), **dict(zip(self.weights, weights)),
            self.told: f"<p>The settings of {plain(Path(file).name)} are back, seed {request.seed}.</p>",
        }  # fmt: skip


def _told_to(progress: gr.Progress) -> Any:
    return lambda step, total: progress((step, total), unit="steps")


def whole_number(what: str, value: Any) -> int | None:
    """A whole number that was typed; None where nothing was."""
    text = str(value if value is not None else "").strip()
    try:
        return int(text) if text else None
    except ValueError:
        raise ConfigError(f"{what} is {text[:40]!a}; it must be a whole number, or empty") from None


def _typed(value: int | None) -> str:
    return "" if value is None else str(value)


def _said(drawn: Any) -> str:
    count = len(drawn.paths)
    seeds = f"seed {drawn.seed}" if count == 1 else f"seeds {drawn.seed} to {drawn.seed + count - 1}"
    ended = "; stopped before the rest" if drawn.stopped else ""
    return f"<p>{count} picture{'' if count == 1 else 's'}, {seeds}{ended}.</p>{notes_in(drawn.notes)}"
