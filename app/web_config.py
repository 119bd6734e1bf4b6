"""The settings of the web app. Imports neither torch nor gradio."""

from __future__ import annotations

from dataclasses import dataclass

from lora_diffusion.errors import ConfigError
from train.config import check, setting


@dataclass(frozen=True)
class AppConfig:
    """Where the page is served and where its things are kept; see `lora-diffusion app --help`."""

    model: str = setting(
        "pocket", "base model that the page begins with: a folder, a hub id, or 'pocket', which is shipped along",
        group="app", aliases=("pretrained_model_name_or_path",), metavar="MODEL",
    )  # fmt: skip
    text_model: str = setting(
        "pocket-gpt", "the same for text: a folder, a hub id, 'pocket-gpt' or 'pocket-bert'", group="app",
        metavar="MODEL",
    )  # fmt: skip
    root: str = setting(
        "lora-diffusion-app", "folder for runs, adapters, pictures and uploads", group="app", metavar="DIR"
    )
    host: str = setting(
        "127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in, which sets the limits of a public page",
        group="server", metavar="ADDRESS",
    )  # fmt: skip
    port: int = setting(7860, "port to listen on; the next free one is taken", group="server", minimum=1, maximum=65535)
    share: bool = setting(
        False, "a public address through Gradio's servers, which sets the limits of a public page", group="server"
    )
    open: bool = setting(False, "open the page in a browser", group="server")


def validate(config: AppConfig) -> None:
    """Check all that can be checked at once. Raises ConfigError."""
    check(config)
    for name in ("model", "text_model", "root", "host"):
        if not getattr(config, name).strip():
            raise ConfigError(f"--{name} is empty; leave it out for {AppConfig.__dataclass_fields__[name].default}")
