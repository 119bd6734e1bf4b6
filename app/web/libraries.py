"""The large libraries, loaded once and by one thread: diffusers and transformers load their parts when they are first
named, and two threads that name one at the same time find half of it."""

from __future__ import annotations

import importlib
import threading

_lock = threading.Lock()
_loaded = False
_NEEDED = {
    "diffusers": ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "UNet2DConditionModel", "AutoencoderKL"),
    "transformers": (
        "AutoConfig", "AutoTokenizer", "CLIPTextModel", "CLIPTokenizer", "AutoModelForCausalLM", "AutoModelForMaskedLM",
        "AutoModelForSequenceClassification",
    ),
}  # fmt: skip


def load_libraries() -> None:
    """Return when all that drawing, writing and planning need is loaded."""
    global _loaded
    if _loaded:
        return
    with _lock:
        if _loaded:
            return
        for library, names in _NEEDED.items():
            module = importlib.import_module(library)
            for name in names:
                getattr(module, name)
        for module_name in ("app.console", "train.plan", "train.plan_models", "train.sampling", "train.text_plan"):
            importlib.import_module(module_name)
        importlib.import_module("app.console").quieten()
        _loaded = True
