"""Write: a language model goes on from a prompt, or judges it, with an adapter and without, side by side."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.web.context import Context
from app.web.views.common import HEAVY, LIGHT, choice, guarded, notes_in, plain, stop_of
from app.web.views.sample import whole_number

_NOTHING = "<p>Nothing written yet. Choose an adapter if you have one, write a prompt, and press Write.</p>"
ROWS = 2  # adapters


class Write:
    """The view."""

    def __init__(self, context: Context, visitor: gr.BrowserState) -> None:
        self.context, self.visitor = context, visitor
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self._request_part()
            with gr.Column(scale=3, min_width=300):
                with gr.Row(elem_classes="buttons", equal_height=True):
                    self.write = gr.Button("Write", variant="primary", elem_id="write")
                    self.compare = gr.Button("Compare with the base", elem_id="compare-text")
                    self.stop = gr.Button("Stop")
                self.told = gr.HTML(_NOTHING, elem_classes="note", elem_id="written-told")
                with gr.Row(elem_classes="fields"):
                    self.base = gr.Textbox(
                        label="The base model", lines=8, interactive=False, visible=False,
                        elem_id="base-text",
                    )  # fmt: skip
                    self.adapted = gr.Textbox(
                        label="With the adapter", lines=8, interactive=False, elem_id="adapted-text"
                    )  # fmt: skip
        self._wire()

    def _request_part(self) -> None:
        limits = self.context.limits
        self.prompt = gr.Textbox(
            "", label="Prompt", lines=5, info="A text to go on from, to judge, or with {mask} to fill",
            elem_id="text-prompt",
        )  # fmt: skip
        self.adapters: list[gr.Dropdown] = []
        self.weights: list[gr.Slider] = []
        for number in range(1, ROWS + 1):
            with gr.Row(elem_classes="fields"):
                label = f"Text adapter {number}"
                self.adapters.append(
                    choice([("(none)", "")], value="", label=label, min_width=150, elem_id=f"text-adapter-{number}")
                )
                self.weights.append(
                    gr.Slider(-1, 2, value=1, step=0.05, label=f"Weight {number}", min_width=150, buttons=[])
                )
        self.model = gr.Dropdown(
            self.context.text_models, value=self.context.text_model, label="Base model", elem_id="text-model",
            info="An adapter brings its own model along", allow_custom_value=limits.models is None,
        )  # fmt: skip
        with gr.Row(elem_classes="fields"):
            self.tokens = gr.Slider(
                1, limits.new_tokens, value=64, step=1, label="New tokens", min_width=150, buttons=[]
            )
            self.temperature = gr.Slider(
                0, 2, value=0, step=0.05, label="Temperature", info="0: the likeliest", min_width=150, buttons=[]
            )
        with gr.Row(elem_classes="fields"):
            self.top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top p", min_width=150, buttons=[])
            self.seed = gr.Textbox("", label="Seed", info="Empty: chosen, and told", min_width=150)
        with gr.Row(elem_classes="fields"):
            self.template = gr.Checkbox(True, label="As in training", info="The prompt where the texts stood")
            self.chat = gr.Checkbox(False, label="Chat format", info="Of models that were made for it")

    def _wire(self) -> None:
        asked = {
            self.visitor, self.prompt, self.model, self.tokens, self.temperature, self.top_p, self.seed, self.template,
            self.chat, *self.adapters, *self.weights,
        }  # fmt: skip
        shown = [self.base, self.adapted, self.told]
        self.write.click(self.on_write, asked, shown, **HEAVY)
        self.compare.click(self.on_compare, asked, shown, **HEAVY)
        self.adapters[0].input(self.on_adapter, [self.adapters[0], self.visitor], self.model, **LIGHT)
        self.stop.click(self.on_stop, None, None, **LIGHT)

    @guarded
    def refresh(self, visitor: str | None) -> dict[Any, Any]:
        """The adapters that there are now."""
        records = [one for one in self.context.library.records(self.context.owner(visitor)) if one.kind == "text"]
        choices = [("(none)", ""), *((one.name, one.id) for one in records if one.problem is None)]
        return {part: gr.update(choices=choices) for part in self.adapters}

    @guarded
    def on_adapter(self, chosen: str, visitor: str | None) -> Any:
        """The model that an adapter was made for, where it is one that is offered."""
        base = self.context.library.record(chosen, self.context.owner(visitor)).base if chosen else None
        offered = base in self.context.text_models or self.context.limits.models is None
        return gr.update(value=base) if base and offered else gr.skip()

    def request(self, data: dict[Any, Any]) -> Any:
        from app.web.texts import TextRequest

        chosen = [(data[a], float(data[w])) for a, w in zip(self.adapters, self.weights) if data[a]]
        drawn = data[self.temperature] > 0 and data[self.top_p] < 1
        return TextRequest(
            data[self.model], data[self.prompt] or "", chosen, template=bool(data[self.template]),
            chat=bool(data[self.chat]), max_new_tokens=int(data[self.tokens]),
            temperature=float(data[self.temperature]),
            top_p=float(data[self.top_p]) if drawn else None, seed=whole_number("the seed", data[self.seed]),
        )  # fmt: skip

    @guarded
    def on_write(self, data: dict[Any, Any], request: gr.Request) -> tuple[Any, str, str]:
        said = self.context.compute(
            "texts",
            "ask",
            self.request(data),
            self.context.owner(data[self.visitor]),
            should_stop=stop_of(self.context, request),
        )
        label = "With the adapter" if any(data[one] for one in self.adapters) else "The base model"
        return gr.update(visible=False), gr.update(value=said.text, label=label), _told(said)

    @guarded
    def on_compare(self, data: dict[Any, Any], request: gr.Request) -> tuple[Any, Any, str]:
        base, adapted = self.context.compute(
            "texts",
            "compare",
            self.request(data),
            self.context.owner(data[self.visitor]),
            should_stop=stop_of(self.context, request),
        )
        shown = gr.update(value=adapted, label="With the adapter")
        return gr.update(value=base, visible=True), shown, "<p>Both from the same prompt and seed.</p>"

    @guarded
    def on_stop(self, request: gr.Request) -> None:
        self.context.stopped.add(str(request.session_hash))
        gr.Info("Stopping after this word.")


def _told(said: Any) -> str:
    scores = said.found.get("scores") or {}
    listed = ", ".join(f"{name} {value:.0%}" for name, value in scores.items()) if isinstance(scores, dict) else ""
    return f"<p>{plain(said.task)}, seed {said.seed}{f'; {plain(listed)}' if listed else ''}.</p>{notes_in(said.notes)}"
