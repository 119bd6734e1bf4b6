"""What this is, where its things are, what is allowed here, and how programs use it."""

from __future__ import annotations

import gradio as gr

from app.web.api import documentation
from app.web.context import Context
from app.web.views.common import card

_WHAT = """## How it goes

1. **Train on photos** teaches a picture model your subject; **Train on text** teaches a language model from rows.
2. **Runs** shows the run as it learns. It goes on when you close the page, and is there again when you come back.
3. **Draw** and **Write** use what was learned; **Library** keeps it in order, and takes in files from elsewhere.

An adapter is a small file beside a model that stays as it is. Its pictures carry their settings: drop one back in to
get them again. Use only photos and texts that you have the right to use, and ask the people who are in them.
"""
_USE = """## For programs

```python
from gradio_client import Client, handle_file

client = Client(ADDRESS)
job = client.predict(
    "dreambooth",
    {"pretrained_model_name_or_path": "pocket", "instance_prompt": "a photo of sks dog", "max_train_steps": 100},
    photos=[handle_file("1.jpg"), handle_file("2.jpg"), handle_file("3.jpg")], api_name="/train",
)
client.predict(job["id"], api_name="/job")
client.predict("a photo of sks dog", {"runs/" + job["id"]: 1.0}, api_name="/sample")
```
"""


def about(context: Context) -> None:
    """Make the part."""
    with gr.Column(elem_classes="note"):
        gr.Markdown(_WHAT)
        gr.HTML(_facts(context), elem_classes="card", container=True)
        gr.Markdown(_USE)
        if context.limits.private_runs:
            gr.Markdown("Runs are private here: give `key=`, any secret of 16 characters or more that is yours alone.")
        gr.Markdown(documentation())


def _facts(context: Context) -> str:
    limits = context.limits
    rows = [
        ("Training", "allowed" if context.place.training_allowed else f"off: {context.place.reason}"),
        ("Base models", ", ".join(limits.models) if limits.models else "any: a folder, or a name on the hub"),
        ("A run has at most", f"{limits.steps:,} steps, rank {limits.rank}, {limits.images:,} photos, "
                              f"{limits.wall_seconds / 3600:g} hours"),
        ("A picture has at most", f"{limits.side:,} pixels a side, {limits.inference_steps} steps"),
        ("A request draws at most", f"{limits.count} pictures, a grid {limits.grid}"),
    ]  # fmt: skip
    if not context.place.public:
        rows.append(("Everything is kept in", str(context.workspace.root)))
    return card(rows, "What is allowed here")
