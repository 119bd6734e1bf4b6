"""The settings of an evaluation. Imports neither torch nor diffusers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_diffusion.errors import ConfigError
from train.config import check, setting

# What a subject is drawn in when no prompts are given, and what has nothing to do with it. `{}` is the instance prompt.
SUBJECT_PROMPTS = ("{}", "{} on a beach", "{} in a forest", "{} in the snow", "{} at night", "{} in a city")
UNRELATED_PROMPTS = (
    "a photo of a red car in a city", "a photo of a blue house in the snow", "a photo of a yellow flower in a meadow",
    "a photo of an orange fish under water", "a photo of a green tree on a beach",
    "a photo of a red mushroom in a forest", "a photo of a white cup on a blue background",
    "a photo of a yellow star at night",
)  # fmt: skip
MAX_POINTS = 200  # of a sweep


@dataclass(frozen=True)
class EvaluateConfig:
    """What to judge, on what, by whom; see `lora-diffusion evaluate --help`."""

    model: str = setting(
        help="base model: a folder, a hub id, or 'pocket' for the model that is shipped along",
        group="model",
        aliases=("pretrained_model_name_or_path",),
        metavar="MODEL",
    )
    adapter: tuple[str, ...] = setting(
        help="an adapter file and, after a colon, its weight (default 1); several are judged one after the other",
        group="model",
        metavar="FILE[:WEIGHT]",
    )
    instance_data_dir: str = setting(help="folder with the photos of the subject", group="subject", metavar="DIR")
    instance_prompt: str = setting(
        help="what the photos show, as in training: 'a photo of sks dog'", group="subject", metavar="TEXT"
    )
    class_prompt: str | None = setting(
        None, "the same without the subject: 'a photo of a dog'; the base model is asked for it, and judged on it",
        group="subject", metavar="TEXT",
    )  # fmt: skip
    revision: str | None = setting(None, "branch, tag or commit of a hub model", group="model")
    variant: str | None = setting(None, "weight files of a variant, such as 'fp16'", group="model")
    device: str = setting(
        "auto",
        "where to draw and judge; auto takes CUDA where there is one",
        group="model",
        choices=("auto", "cpu", "cuda", "mps"),
    )
    mixed_precision: str = setting(
        "auto",
        "precision of the model; auto: bf16 or fp16 on CUDA, no (fp32) on CPU",
        group="model",
        choices=("auto", "no", "fp16", "bf16"),
    )

    prompts: str | None = setting(
        None, "file with a prompt on each line, in which {} stands for the instance prompt (default: six places)",
        group="pictures", metavar="FILE",
    )  # fmt: skip
    unrelated_prompts: str | None = setting(
        None, "file with prompts that have nothing to do with the subject (default: eight things)", group="pictures",
        metavar="FILE",
    )  # fmt: skip
    seeds: int = setting(4, "pictures of each prompt, every one from a seed of its own", group="pictures", minimum=1)
    seed: int = setting(0, "the first seed", group="pictures", minimum=0)
    num_inference_steps: int = setting(30, "denoising steps", group="pictures", minimum=1, maximum=1000)
    guidance_scale: float | None = setting(
        None, "classifier-free guidance (default: 7.5; 3 for pocket)", group="pictures", minimum=0
    )
    resolution: int | None = setting(
        None, "side of the pictures in pixels (default: the model's own)", group="pictures", minimum=8
    )
    batch_size: int = setting(8, "pictures drawn at once", group="pictures", minimum=1)

    image_encoder: str = setting(
        "auto", "judges likeness: dino, dinov2, clip, pocket, a folder or a hub id; auto: pocket's own for pocket, "
        "else dino", group="judges",
    )  # fmt: skip
    text_encoder: str = setting(
        "auto", "judges prompt following: clip, pocket, none, a folder or a hub id; auto: pocket's own for pocket, "
        "else clip", group="judges",
    )  # fmt: skip

    sweep_weights: str | None = setting(
        None, "judge one adapter at these weights, such as 0,0.25,0.5,0.75,1,1.25, and plot them", group="sweep",
        metavar="NUMBERS",
    )  # fmt: skip
    sweep_ranks: str | None = setting(
        None, "… and brought to these ranks, such as 2,4,8", group="sweep", metavar="NUMBERS"
    )

    output_dir: str = setting(
        "runs/evaluation", "where report, pictures and plot go; an older evaluation there is replaced", group="output",
        metavar="DIR",
    )  # fmt: skip
    json: bool = setting(False, "print one JSON object and nothing else", group="output")


def validate(config: EvaluateConfig) -> None:
    """Check all that can be checked without reading a file.

    Raises:
        ConfigError: one sentence that names the setting, its value and what to do.
    """
    check(config)
    if not config.adapter:
        raise ConfigError("--adapter is missing; say which adapter to judge")
    if not config.instance_prompt.strip():
        raise ConfigError("--instance_prompt is empty; say what the photos show, for example 'a photo of sks dog'")
    if is_sweep(config):
        if len(config.adapter) > 1:
            raise ConfigError(f"a sweep takes one --adapter, {len(config.adapter)} are given")
        points = len(sweep_weights(config) or [1.0]) * len(sweep_ranks(config) or [0])
        if points > MAX_POINTS:
            raise ConfigError(f"the sweep has {points} points; {MAX_POINTS} is the limit, give fewer weights or ranks")


def is_sweep(config: EvaluateConfig) -> bool:
    return config.sweep_weights is not None or config.sweep_ranks is not None


def sweep_weights(config: EvaluateConfig) -> list[float]:
    """Ascending, each once; empty where none are given. Raises ConfigError."""
    return _numbers(config.sweep_weights, "--sweep_weights", float)


def sweep_ranks(config: EvaluateConfig) -> list[int]:
    """Ascending, each once; empty where none are given. Raises ConfigError."""
    ranks = _numbers(config.sweep_ranks, "--sweep_ranks", int)
    if ranks and ranks[0] < 1:
        raise ConfigError(f"--sweep_ranks {config.sweep_ranks}: a rank is at least 1")
    return ranks


def _numbers(text: str | None, flag: str, kind: type) -> list:
    if text is None:
        return []
    try:
        found = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{flag} {text!r}: give {what} with commas between them") from None
    if not all(math.isfinite(number) for number in found):
        raise ConfigError(f"{flag} {text!r}: every number must be finite")
    return found
