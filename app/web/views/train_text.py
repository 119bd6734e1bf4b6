"""Train on text: paste rows or add a file, pick task and method, see the rows as the model will, check, start."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.web.context import Context
from app.web.forms import Form
from app.web.job_checks import OURS, OUTWARD, checked
from app.web.rows import EXAMPLES, as_seen, example_text, keep_rows, rows_file
from app.web.run_check import check_run, in_lines
from app.web.views.common import HEAVY, PRESSED, card, guarded, notes_in, plain
from lora_diffusion.errors import LoraDiffusionError
from train.text_config import METHODS, TextConfig
from train.text_task_names import TASK_TYPES

ASKED = (
    "pretrained_model_name_or_path", "task", "method", "train_file", "validation_file", "test_file", "dataset",
    "dataset_config", "dataset_split", "validation_split", "test_split", "template", "prompt_template", "label_words",
    "learning_rate", "num_train_epochs", "max_train_steps",
)  # fmt: skip
_NO_CARD = "<p>Add rows first: then this says what the run will take, before it starts.</p>"
_NO_ROWS = "<p>No rows yet. Paste JSON lines or a table, or add a file: each row is one example to learn from.</p>"
_TASKS = {
    "causal-lm": "write on from a prompt", "seq2seq-lm": "write an answer (T5)", "masked-lm": "fill in a word",
    "sequence-classification": "a label for a text", "token-classification": "a tag for each word",
    "question-answering": "find the answer in a text",
}  # fmt: skip


class TrainText:
    """The view; `button` starts a run with `start_run` on `inputs`, which gives the name of the run."""

    def __init__(self, context: Context, visitor: gr.BrowserState) -> None:
        self.context, self.visitor = context, visitor
        self.upload = gr.State("")
        self._rows_part()
        self._task_part()
        self._start_part()
        self._wire()

    def _rows_part(self) -> None:
        gr.Markdown("## 1. Rows", elem_classes="note")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.pasted = gr.Textbox(
                    "", label="Rows", lines=7, max_lines=14, elem_id="rows",
                    info="JSON lines, CSV with a header, or plain lines",
                    placeholder='{"text": "what a good day", "label": "good"}',
                )  # fmt: skip
            with gr.Column(scale=1, min_width=280):
                self.file = gr.File(
                    label="Or a file", file_types=[".jsonl", ".json", ".csv", ".tsv", ".txt"], height=150,
                    elem_id="rows-file",
                )  # fmt: skip
                self.example = gr.Dropdown(
                    [("(choose)", ""), *((one.title, name) for name, one in EXAMPLES.items())], value="",
                    label="Or example rows", info="With the model and the task that suit them", elem_id="example-rows",
                )  # fmt: skip

    def _task_part(self) -> None:
        gr.Markdown("## 2. Task and method", elem_classes="note")
        with gr.Row(elem_classes="fields"):
            self.model = gr.Dropdown(
                self.context.text_models, value=self.context.text_model, label="Base model",
                allow_custom_value=self.context.limits.models is None,
            )  # fmt: skip
            self.task = gr.Dropdown(
                [(f"{name}: {_TASKS[name]}", name) for name in TASK_TYPES], value="causal-lm", label="Task",
                elem_id="task",
            )  # fmt: skip
            self.method = gr.Dropdown(
                list(METHODS), value="lora", label="Method", info="Several joined with +: lora+p-tuning",
                allow_custom_value=True, elem_id="method",
            )  # fmt: skip
            self.name = gr.Textbox("", label="Name of the run", info="Letters, digits, - and _ (empty: chosen for you)")
        with gr.Row(elem_classes="fields"):
            self.template = gr.Textbox(
                "", label="Template", info="Columns in braces: {question} Answer: {answer} (empty: from the columns)"
            )
            self.prompt_template = gr.Textbox("", label="Template of P-tuning", info="{P:3} {x} {P:3} {mask}")
            self.words = gr.Textbox("", label="Words for labels", info="Fill in a word: good=great,bad=awful")
        with gr.Row(elem_classes="fields"):
            self.rate = gr.Textbox("", label="Learning rate", info="Empty: the method's own")
            self.epochs = gr.Number(3, label="Rounds", precision=0, info="How often each row is seen")
            self.steps = gr.Textbox("", label="Steps", info="In the place of rounds")
        hidden = (*ASKED, *OURS, *(OUTWARD if self.context.limits.own_files_only else ()))
        with gr.Accordion("Advanced settings", open=False):
            self.form = Form(TextConfig, hidden, prefix="text-")
            self.form.draw()
        self.look = gr.Button("Show the rows as the model will see them", elem_id="show-rows")
        self.seen = gr.HTML(_NO_ROWS, elem_classes="note", elem_id="rows-seen", container=True)

    def _start_part(self) -> None:
        gr.Markdown("## 3. Start", elem_classes="note")
        self.card = gr.HTML(_NO_CARD, elem_classes="card", elem_id="text-card", container=True)
        with gr.Row(elem_classes="buttons", equal_height=True):
            self.check = gr.Button("Check again")
            self.button = gr.Button("Start training", variant="primary", elem_id="start-text")

    def _wire(self) -> None:
        asked = [
            self.upload, self.visitor, self.pasted, self.file, self.model, self.task, self.method, self.name,
            self.template, self.prompt_template, self.words, self.rate, self.epochs, self.steps,
        ]  # fmt: skip
        self.inputs = {*asked, *self.form.components.values()}
        shown = [self.upload, self.seen, self.card]
        fill = [
            self.pasted,
            self.file,
            self.model,
            self.task,
            self.method,
            self.template,
            self.prompt_template,
            self.words,
        ]
        filled = self.example.input(self.take_example, self.example, fill, **PRESSED)
        filled.then(self.take_rows, self.inputs, shown, **HEAVY)
        self.file.upload(self.take_rows, self.inputs, shown, **HEAVY)
        self.pasted.blur(self.take_rows, self.inputs, shown, **HEAVY)
        gr.on([self.look.click, self.check.click], self.take_rows, self.inputs, shown, **HEAVY)

    @guarded
    def take_example(self, name: str) -> dict[Any, Any]:
        if not name:
            return {self.file: None}
        one = EXAMPLES[name]
        return {
            self.pasted: example_text(name), self.file: None, self.model: one.model, self.task: one.task,
            self.method: one.settings.get("method", "lora"), self.template: one.settings.get("template", ""),
            self.prompt_template: one.settings.get("prompt_template", ""), self.words: "",
        }  # fmt: skip

    @guarded
    def take_rows(self, data: dict[Any, Any]) -> tuple[str, str, str]:
        """Keep the rows, show them, and the card; what is wrong with them is said in their place."""
        if not data[self.file] and not (data[self.pasted] or "").strip():
            return "", _NO_ROWS, _NO_CARD
        upload = ""
        try:
            upload = keep_rows(data[self.pasted], data[self.file], self.context.workspace, self.context.limits)
            data = {**data, self.upload: upload}
            settings = self.settings(data)
            values = checked("text", settings, self.context.workspace, self.context.limits)
            said, rows = as_seen(values)
        except LoraDiffusionError as problem:
            return upload, f"<p>Not ready yet:</p>{notes_in([self._without_paths(str(problem))])}", _NO_CARD
        views = self.context.jobs.jobs(self.context.owner(data[self.visitor]))
        check = check_run(
            "text", settings, data[self.name] or "text", self.context.workspace, self.context.limits, views
        )
        seen = "".join(f"<pre>{plain(row, 1500)}</pre>" for row in rows)
        return upload, f"<p>{plain(said)}</p>{seen}", card(in_lines(check), "Before the start", check.warnings)

    @guarded
    def start_run(self, data: dict[Any, Any]) -> str:
        """Queue the run; returns its name."""
        upload = keep_rows(data[self.pasted], data[self.file], self.context.workspace, self.context.limits)
        settings = self.settings({**data, self.upload: upload})
        name = (data[self.name] or "").strip() or "text"
        return self.context.jobs.submit("text", settings, name, self.context.owner(data[self.visitor]))

    def settings(self, data: dict[Any, Any]) -> dict[str, Any]:
        """The settings that the page says. Raises ConfigError."""
        typed = {
            "template": data[self.template], "prompt_template": data[self.prompt_template],
            "label_words": data[self.words], "learning_rate": data[self.rate], "max_train_steps": data[self.steps],
            "num_train_epochs": data[self.epochs],
        }  # fmt: skip
        return {
            **self.form.read(data),
            **Form(TextConfig).read_values(typed),
            "pretrained_model_name_or_path": data[self.model],
            "task": data[self.task],
            "method": (data[self.method] or "lora").strip(),
            "train_file": str(rows_file(self.context.workspace, data[self.upload])),
        }

    def _without_paths(self, text: str) -> str:
        """A message about rows without where the server keeps them."""
        uploads = str(self.context.workspace.uploads)
        while uploads in text:
            start = text.index(uploads)
            end = text.find("/rows", start)
            text = text[:start] + (text[end + 1 :] if end > 0 else "")
        return text
