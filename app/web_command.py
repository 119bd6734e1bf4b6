"""`lora-diffusion app`: the page, until Ctrl-C."""

from __future__ import annotations

import importlib.util
import os

from app.web_config import AppConfig, validate
from lora_diffusion.errors import ConfigError


def app(config: AppConfig, debug: bool) -> int:
    """`lora-diffusion app`. Trainings go on when the page is closed or stopped."""
    validate(config)
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page needs gradio: pip install 'lora-diffusion[app]'")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is told to anybody
    from app.web.main import serve

    return serve(config, debug=debug)
