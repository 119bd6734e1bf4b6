"""From a config class to fields on a page. The config says it all; here it only becomes controls.

The first half reads settings and knows no gradio: how a setting is called in plain words, and what a value that a page
sends means. The second makes components of them, under the headings of their groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from typing import Any

from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable
from train.config import Setting, settings_of

# Words of names that are read otherwise than they are written.
_WORDS = {
    "lr": "learning rate", "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA", "loraplus": "LoRA+", "ema": "EMA",
    "snr": "SNR", "adam": "Adam", "num": "number of", "8bit": "8-bit", "tf32": "TF32", "ti": "new word",
    "frac": "share", "dir": "folder",
    "reso": "size", "max": "most", "min": "least", "lm": "LM", "peft": "PEFT", "vae": "VAE",
}  # fmt: skip
_LABELS = {
    "lr_scheduler": "Course of the learning rate",
    "lr_warmup_steps": "Warm-up steps",
    "max_train_steps": "Steps",
    "max_grad_norm": "Largest gradient",
    "max_length": "Longest row in tokens",
    "max_answer_length": "Longest answer in tokens",
    "max_new_tokens": "New tokens",
    "text_encoder_lr": "Learning rate of the text encoder",
    "text_encoder_2_lr": "Learning rate of the second text encoder",
    "with_prior_preservation": "Keep the class (prior preservation)",
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA",
    "use_ema": "Average over the run (EMA)",
    "pretrained_model_name_or_path": "Base model",
    "instance_data_dir": "Folder with the photos",
    "train_file": "Rows to learn from",
}
_FLAG = re.compile(r"--(no_)?([a-z][a-z0-9_]*)")
_ASIDE = re.compile(r"\s*\([^()]*--no_[^()]*\)")  # how to turn a switch off on a command line
_SHORT = 80  # characters: a longer text gets a box of several lines


def label_of(name: str) -> str:
    """A setting's name in plain words: "lora_alpha" is "LoRA alpha"."""
    if name in _LABELS:
        return _LABELS[name]
    words = " ".join(_WORDS.get(word, word) for word in name.split("_"))
    return words[:1].upper() + words[1:]


def in_labels(text: str) -> str:
    """A sentence that names flags, for one who sees labels: "--rank 0 is too small" is "“Rank” 0 is too small"."""
    return _FLAG.sub(lambda flag: f"“{label_of(flag[2])}”{' off' if flag[1] else ''}", text)


def help_of(item: Setting) -> str:
    """What is said under a control: the setting's help and its range."""
    text = in_labels(_ASIDE.sub("", item.help))
    text = text[:1].upper() + text[1:]
    allowed = _range(item)
    return f"{text} ({allowed})" if allowed else text


def _range(item: Setting) -> str:
    if item.kind is bool or item.kind is str:
        return ""
    low = "" if item.minimum is None else f"{item.minimum:g}"
    if low and item.maximum is not None and item.maximum < 1e15:
        return f"{low} to {item.maximum:g}"
    if item.above is not None:
        return f"above {item.above:g}" + ("" if item.maximum is None else f", {item.maximum:g} at most")
    return f"{low} or more" if low else ""


def value_of(item: Setting, raw: Any) -> Any:
    """What a control sent, as the config has it. Nothing said is the default.

    Raises:
        ConfigError: it is of another kind, by the name that the page gives it.
    """
    if item.repeated:
        lines = raw if isinstance(raw, list | tuple) else str(raw or "").split("\n")
        return tuple(value_of_one(item, line) for line in lines if str(line).strip()) or item.default
    if raw is None or (isinstance(raw, str) and not raw.strip()):
        return None if item.default is MISSING else item.default
    return value_of_one(item, raw)


def value_of_one(item: Setting, raw: Any) -> Any:
    if item.kind is bool and isinstance(raw, bool):
        return raw
    if item.kind is str and isinstance(raw, str):
        return raw
    if item.kind in (int, float) and not isinstance(raw, bool):
        try:
            number = float(raw)
            if item.kind is float and number == number:
                return number
            if item.kind is int and number.is_integer():
                return int(raw) if isinstance(raw, str) else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    wanted = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[item.kind]
    raise ConfigError(f"“{label_of(item.name)}” is {printable(str(raw), 40)!a}; it must be {wanted}")


def shown_value(item: Setting, value: Any) -> Any:
    """A config's value as its control shows it; an empty one is the default."""
    if item.kind is bool:
        return bool(value)
    if item.repeated:
        return "\n".join(map(str, value or ()))
    if value is None or value is MISSING:
        return ""
    return str(value) if item.optional else value


class Form:
    """The controls of a config class's settings, made in the Blocks that are open.

    Args:
        config_class: a dataclass of `train.config.setting` fields.
        leave_out: settings that the page asks for elsewhere, or that the app decides.
        start: values that differ from the config's defaults.
        prefix: of the element ids, so that two forms on a page do not meet.
    """

    def __init__(
        self,
        config_class: type,
        leave_out: Iterable[str] = (),
        start: Mapping[str, Any] | None = None,
        prefix: str = "",
    ) -> None:
        out = set(leave_out)
        self.items = [item for item in settings_of(config_class) if item.name not in out]
        self.components: dict[str, Any] = {}
        self._start, self._prefix = dict(start or {}), prefix

    @property
    def groups(self) -> dict[str, list[Setting]]:
        """The settings under their headings, in the config's order."""
        found: dict[str, list[Setting]] = {}
        for item in self.items:
            found.setdefault(item.group, []).append(item)
        return found

    def draw(self) -> None:
        """Make the controls, a closed drawer for each group."""
        import gradio as gr

        for group, items in self.groups.items():
            title = f"{group[:1].upper()}{group[1:]} ({len(items)})"
            with gr.Accordion(title, open=False), gr.Row(equal_height=False, elem_classes="fields"):
                for item in items:
                    self.components[item.name] = self._control(gr, item)

    def _control(self, gr: Any, item: Setting) -> Any:
        value = shown_value(item, self._start.get(item.name, item.default))
        said: dict[str, Any] = {
            "label": label_of(item.name), "info": help_of(item), "value": value, "interactive": True, "min_width": 260,
            "elem_id": f"{self._prefix}{item.name}",
        }  # fmt: skip
        if item.kind is bool:
            return gr.Checkbox(**said)
        if item.choices is not None:
            choices = [(one, one) for one in item.choices]
            if item.optional:
                return gr.Dropdown([("(default)", ""), *choices], **said)
            return gr.Dropdown(choices, **{**said, "value": value or None})
        if item.kind is not str and not item.optional:
            return gr.Number(precision=0 if item.kind is int else None, **said)
        return gr.Textbox(lines=2 if item.repeated else 1, placeholder="(default)" if item.optional else None, **said)

    def read(self, data: Mapping[Any, Any]) -> dict[str, Any]:
        """The settings that differ from the defaults, out of what an event with a set of inputs gives."""
        return self.read_values({name: data[part] for name, part in self.components.items()})

    def read_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same out of {name: what the control sent}. Raises ConfigError."""
        found = {}
        for item in self.items:
            if item.name in values:
                value = value_of(item, values[item.name])
                if value != item.default:
                    found[item.name] = value
        return found

    def filled(self, values: Mapping[str, Any]) -> dict[Any, Any]:
        """What an event returns to show these settings, and defaults for all others."""
        return {
            self.components[item.name]: shown_value(item, values.get(item.name, item.default))
            for item in self.items
            if item.name in self.components
        }
