"""Three ways to train on photos, and what each means for the model that is chosen. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

POCKET = "pocket"
PREVIEWS = 5  # times in a run that previews are drawn


@dataclass(frozen=True)
class Preset:
    """A preset: its title, what it is for, and its settings for a model."""

    title: str
    help: str
    settings: Callable[[str], dict[str, Any]]


def prompts_of(word: str, class_word: str, *, style: bool = False) -> dict[str, str | None]:
    """`instance_prompt` and `class_prompt` of a subject: the rare word, and what kind of thing it is. Texts about a
    style also need the `subject_token`, which stands in them."""
    word, kind = " ".join(word.split()), " ".join(class_word.split())
    if style:
        return {"instance_prompt": f"a picture in the style of {word}", "class_prompt": None, "subject_token": word}
    return {"instance_prompt": f"a photo of {word} {kind}".rstrip(), "class_prompt": class_prompt_of(kind)}


def class_prompt_of(kind: str) -> str | None:
    if not kind:
        return None
    return f"a photo of {'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def settings_of_preset(name: str, model: str) -> dict[str, Any]:
    """The settings of a preset for a model, with a few previews on the way. Raises KeyError for an unknown name."""
    settings = PRESETS[name].settings(model)
    steps = settings["max_train_steps"]
    return {
        "validation_steps": max(1, steps // PREVIEWS),
        "num_validation_images": 2 if model == POCKET else 1,
        "validation_inference_steps": 20 if model == POCKET else 25,
        "checkpointing_steps": max(1, steps // PREVIEWS),
        "checkpoints_total_limit": 5,
        **settings,
    }


def _for_pocket(steps: int, **more: Any) -> dict[str, Any]:
    """What suits pocket: see `train.demo.recipe`. Its attention is at 8×8 and 4×4, and a face is drawn at 16×16."""
    return {
        "max_train_steps": steps,
        "train_text_encoder": True,
        "target_modules": "to_q,to_k,to_v,to_out.0,q_proj,k_proj,v_proj,out_proj,conv1,conv2",
        "rank": 16,
        "learning_rate": 2e-3,
        "text_encoder_lr": 3e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": min(10, steps),
        "train_batch_size": 5,
        "sample_batch_size": 16,
        "prior_generation_steps": 20,
        "mixed_precision": "no",
        **more,
    }


def _quick(model: str) -> dict[str, Any]:
    if model == POCKET:
        return _for_pocket(100, train_batch_size=2)
    return {"max_train_steps": 300, "rank": 8, "learning_rate": 2e-4, "gradient_checkpointing": True}


def _object(model: str) -> dict[str, Any]:
    if model == POCKET:
        return _for_pocket(600, with_prior_preservation=True, num_class_images=32)
    return {
        "max_train_steps": 800,
        "rank": 16,
        "learning_rate": 1e-4,
        "train_text_encoder": True,
        "text_encoder_lr": 1e-5,
        "with_prior_preservation": True,
        "num_class_images": 100,
        "gradient_checkpointing": True,
    }


def _style(model: str) -> dict[str, Any]:
    shared = {"caption_template": "style", "random_flip": True}
    if model == POCKET:
        return _for_pocket(400, **shared)
    return {
        "max_train_steps": 1200, "rank": 32, "learning_rate": 1e-4, "lr_scheduler": "cosine",
        "gradient_checkpointing": True, **shared,
    }  # fmt: skip


PRESETS = {
    "quick": Preset("Quick", "a first look in the shortest time", _quick),
    "object": Preset("Object", "one animal, person or thing; its class is kept", _object),
    "style": Preset("Style", "how pictures look, not what they show", _style),
}
