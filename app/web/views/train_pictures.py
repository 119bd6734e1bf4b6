"""Train on photos: drop them, see them as the model will, name the subject, check, start."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.web.context import Context
from app.web.forms import Form
from app.web.job_checks import OURS, OUTWARD
from app.web.presets import PRESETS, prompts_of, settings_of_preset
from app.web.run_check import check_run, in_lines
from app.web.views.common import HEAVY, PRESSED, card, guarded, notes_in, plain, shown
from lora_diffusion.errors import ConfigError
from train.dreambooth_config import DreamBoothConfig

# What the page asks for outside the drawer.
ASKED = ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "class_prompt", "validation_prompt")
_NO_CARD = "<p>Add photos first: then this says what the run will take, before it starts.</p>"
_NO_PHOTOS = "<p>No photos yet. Add 3 to 20 of your subject, from several sides and in several places.</p>"


class TrainPictures:
    """The view; `button` starts a run with `start_run` on `inputs`, which gives the name of the run."""

    def __init__(self, context: Context, visitor: gr.BrowserState) -> None:
        self.context, self.visitor = context, visitor
        self.upload = gr.State("")
        self._photos_part()
        self._subject_part()
        self._ways_part()
        self._start_part()
        self._wire()

    def _photos_part(self) -> None:
        gr.Markdown("## 1. Photos", elem_classes="note")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                self.files = gr.File(
                    label="Photos of your subject", file_count="multiple", file_types=["image", ".txt"], height=170,
                    elem_id="photos",
                )  # fmt: skip
                gr.Markdown("JPEG, PNG or WebP; a .txt file of the same name is a caption.", elem_classes="note")
                self.examples = gr.Button("Try it with five example photos", visible=self.context.model == "pocket")
            with gr.Column(scale=2, min_width=300):
                self.previews = gr.Gallery(
                    label="As the model will see them", columns=5, height="auto", format="png", object_fit="contain",
                    buttons=["fullscreen"], elem_id="previews", interactive=False, visible=False,
                )  # fmt: skip
                self.remarks = gr.HTML(_NO_PHOTOS, elem_classes="note", elem_id="photo-remarks")

    def _subject_part(self) -> None:
        gr.Markdown("## 2. Subject", elem_classes="note")
        with gr.Row(elem_classes="fields"):
            self.model = gr.Dropdown(
                self.context.models, value=self.context.model, label="Base model",
                info="A model of the list" + ("" if self.context.limits.models else ", a folder, or a name on the hub"),
                allow_custom_value=self.context.limits.models is None, min_width=260,
            )  # fmt: skip
            self.word = gr.Textbox("sks", label="Subject word", info="A rare word that will stand for your subject")
            self.kind = gr.Textbox("", label="Class", info="What kind of thing it is: dog, person, cup")
            self.name = gr.Textbox("", label="Name of the run", info="Letters, digits, - and _ (empty: chosen for you)")
        with gr.Row(elem_classes="fields"):
            self.prompt = gr.Textbox("a photo of sks", label="What the photos show", info="Made from word and class")
            self.class_prompt = gr.Textbox("", label="What the class looks like", info="For keeping the class")
            self.preview_prompt = gr.Textbox(
                "", label="Preview", info="A prompt that is drawn on the way (empty: what the photos show)"
            )
        with gr.Accordion("Captions of the photos", open=False):
            gr.Markdown("A caption takes the place of the prompt for its photo. Leave all empty to use the prompt.")
            self.captions = gr.Dataframe(
                headers=["Photo", "Caption"], datatype="str", type="array", column_count=2, row_count=1,
                static_columns=[0], interactive=True, label="Captions", wrap=True, elem_id="captions",
            )  # fmt: skip

    def _ways_part(self) -> None:
        gr.Markdown("## 3. How", elem_classes="note")
        choices = [(f"{preset.title}: {preset.help}", name) for name, preset in PRESETS.items()]
        self.preset = gr.Radio(choices, value="quick", label="Preset", elem_id="preset")
        hidden = (*ASKED, *OURS, *(OUTWARD if self.context.limits.own_files_only else ()))
        start = settings_of_preset("quick", self.context.model)
        with gr.Accordion("Advanced settings", open=False, elem_id="advanced"):
            self.form = Form(DreamBoothConfig, hidden, start, prefix="pictures-")
            self.form.draw()

    def _start_part(self) -> None:
        gr.Markdown("## 4. Start", elem_classes="note")
        self.card = gr.HTML(_NO_CARD, elem_classes="card", elem_id="check-card", container=True)
        with gr.Row():
            self.check = gr.Button("Check again")
            self.button = gr.Button("Start training", variant="primary", elem_id="start-pictures")

    def _wire(self) -> None:
        fields = list(self.form.components.values())
        everything = {
            self.upload, self.visitor, self.model, self.word, self.kind, self.name, self.prompt, self.class_prompt,
            self.preview_prompt, self.captions, self.preset, *fields,
        }  # fmt: skip
        shown_photos = [self.upload, self.previews, self.remarks, self.captions]
        taken = self.files.change(self.take_photos, [self.files, self.model], shown_photos, **HEAVY)
        retaken = self.model.change(self.retake_photos, [self.files, self.model], shown_photos, **HEAVY)
        filled = self.examples.click(self.take_examples, None, [*shown_photos, self.word, self.kind], **HEAVY)
        filled = filled.then(
            self.say_prompts, [self.word, self.kind, self.preset], [self.prompt, self.class_prompt], **PRESSED
        )
        for words in (self.word, self.kind):
            words.change(
                self.say_prompts, [self.word, self.kind, self.preset], [self.prompt, self.class_prompt], **PRESSED
            )
        chosen = gr.on(
            [self.preset.input, self.model.change], self.apply_preset, [self.preset, self.model, self.word, self.kind],
            [self.prompt, self.class_prompt, *fields], **PRESSED,
        )  # fmt: skip
        for event in (taken, retaken, filled, chosen):
            event.then(self.look, everything, self.card, **HEAVY)
        self.check.click(self.check_now, everything, self.card, **HEAVY)
        self.inputs = everything

    @guarded
    def take_photos(self, files: list[str] | None, model: str) -> tuple[Any, ...]:
        from app.web.uploads import check_photos

        if not files:
            return "", gr.update(value=[], visible=False), _NO_PHOTOS, [["", ""]]
        report = check_photos(files, self.context.side(model), self.context.limits, self.context.workspace)
        pictures = [(shown(photo.preview), photo.name) for photo in report.kept]
        table = [[photo.path.name, photo.caption] for photo in report.kept] or [["", ""]]
        upload = report.folder.name if report.folder else ""
        return upload, gr.update(value=pictures, visible=bool(pictures)), _remarks(report), table

    @guarded
    def retake_photos(self, files: list[str] | None, model: str) -> tuple[Any, ...]:
        """The same photos for another model, which may see them at another size."""
        return self.take_photos(files, model) if files else (gr.skip(),) * 4

    @guarded
    def take_examples(self) -> tuple[Any, ...]:
        from train.images import list_images
        from train.subjects import load_subject

        subject = load_subject("zorp")
        return (
            *self.take_photos([str(path) for path in list_images(subject.photos_dir)], "pocket"),
            "sks",
            subject.class_word,
        )

    @guarded
    def say_prompts(self, word: str, kind: str, preset: str) -> tuple[str, str]:
        prompts = prompts_of(word or "", kind or "", style=preset == "style")
        return prompts["instance_prompt"] or "", prompts["class_prompt"] or ""

    @guarded
    def apply_preset(self, preset: str, model: str, word: str, kind: str) -> dict[Any, Any]:
        instance, of_class = self.say_prompts(word, kind, preset)
        values = self.form.filled(settings_of_preset(preset, model))
        return {self.prompt: instance, self.class_prompt: of_class, **values}

    @guarded
    def look(self, data: dict[Any, Any]) -> str:
        """The card after a change: nothing to say before there are photos."""
        if not data[self.upload]:
            return _NO_CARD
        try:
            return self._card(data)
        except ConfigError as problem:
            return f"<p>Not ready yet: {plain(problem)}</p>"

    @guarded
    def check_now(self, data: dict[Any, Any]) -> str:
        return self._card(data)

    @guarded
    def start_run(self, data: dict[Any, Any]) -> str:
        """Queue the run; returns its name."""
        from app.web.uploads import upload_folder, write_captions

        settings = self.settings(data)
        rows = {row[0]: row[1] or "" for row in data[self.captions] if row and row[0]}
        write_captions(upload_folder(self.context.workspace, data[self.upload]), rows)
        return self.context.jobs.submit(
            "dreambooth", settings, self._name(data[self.name], data[self.kind]), self.context.owner(data[self.visitor])
        )

    def settings(self, data: dict[Any, Any]) -> dict[str, Any]:
        """The settings that the page says. Raises ConfigError."""
        from app.web.uploads import upload_folder

        if not data[self.upload]:
            raise ConfigError("there are no photos yet: add 3 to 20 of your subject under 1")
        prompt = (data[self.prompt] or "").strip()
        return {
            "caption_fallback": True,  # a photo without a caption has the prompt, as the page says
            **(prompts_of(data[self.word] or "", "", style=True) if data[self.preset] == "style" else {}),
            **self.form.read(data),
            "pretrained_model_name_or_path": data[self.model],
            "instance_data_dir": str(upload_folder(self.context.workspace, data[self.upload])),
            "instance_prompt": prompt,
            "class_prompt": (data[self.class_prompt] or "").strip() or None,
            "validation_prompt": (data[self.preview_prompt] or "").strip() or prompt,
        }

    @staticmethod
    def _name(name: str, kind: str) -> str:
        return (name or "").strip() or (kind or "").strip() or "photos"

    def _card(self, data: dict[Any, Any]) -> str:
        views = self.context.jobs.jobs(self.context.owner(data[self.visitor]))
        check = check_run(
            "dreambooth",
            self.settings(data),
            self._name(data[self.name], data[self.kind]),
            self.context.workspace,
            self.context.limits,
            views,
        )
        return card(in_lines(check), "Before the start", check.warnings)


def _remarks(report: Any) -> str:
    """What is to be said of the photos."""
    notes = [f"{name} is not used: {reason}" for name, reason in report.refused]
    notes += [f"{photo.name}: {warning}" for photo in report.kept for warning in photo.warnings]
    count = len(report.kept)
    head = f"<p>{count} photo{'' if count == 1 else 's'} will be used.</p>"
    return head + notes_in([*report.warnings, *notes])
