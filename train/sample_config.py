"""The settings of a sampling job. Imports neither torch nor diffusers."""

from __future__ import annotations

from dataclasses import dataclass

from lora_diffusion.errors import ConfigError
from train.config import check, setting


@dataclass(frozen=True)
class SampleConfig:
    """What to draw with which model and adapters; see `lora-diffusion sample --help`."""

    model: str = setting(
        help="base model: a folder, a hub id, or 'pocket' for the model that is shipped along",
        group="model",
        aliases=("pretrained_model_name_or_path",),
        metavar="MODEL",
    )
    prompt: tuple[str, ...] = setting(help="what to draw; may be given several times", group="pictures", metavar="TEXT")
    adapter: tuple[str, ...] = setting(
        (),
        "an adapter file and, after a colon, its weight (default 1); may be given several times",
        group="model",
        metavar="FILE[:WEIGHT]",
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub model", group="model")
    variant: str | None = setting(None, "weight files of a variant, such as 'fp16'", group="model")
    device: str = setting(
        "auto",
        "where to draw; auto takes CUDA where there is one",
        group="model",
        choices=("auto", "cpu", "cuda", "mps"),
    )
    mixed_precision: str = setting(
        "auto",
        "precision of the model; auto: bf16 or fp16 on CUDA, no (fp32) on CPU",
        group="model",
        choices=("auto", "no", "fp16", "bf16"),
    )

    negative_prompt: str | None = setting(None, "what to stay away from", group="pictures", metavar="TEXT")
    seed: int = setting(0, "seed of the first picture; the next have the next seeds", group="pictures", minimum=0)
    num_images: int = setting(1, "pictures per prompt", group="pictures", minimum=1)
    num_inference_steps: int = setting(30, "denoising steps", group="pictures", minimum=1, maximum=1000)
    guidance_scale: float = setting(7.5, "classifier-free guidance; 1 is none", group="pictures", minimum=0)
    width: int | None = setting(None, "in pixels (default: the model's own)", group="pictures", minimum=8)
    height: int | None = setting(None, "in pixels (default: the model's own)", group="pictures", minimum=8)
    batch_size: int = setting(4, "pictures drawn at once", group="pictures", minimum=1)
    output_dir: str = setting("runs/samples", "where the pictures go", group="pictures", metavar="DIR")


def validate(config: SampleConfig) -> None:
    """Check all that can be checked without reading a file.

    Raises:
        ConfigError: one sentence that names the setting, its value and what to do.
    """
    check(config)
    if not config.prompt:
        raise ConfigError("--prompt is missing; say what to draw")
