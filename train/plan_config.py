"""The settings of a plan: those of a DreamBooth run, of which no folder is needed, and what it is to fit on.

Imports neither torch nor diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_diffusion.errors import ConfigError
from train import dreambooth_checks
from train.config import setting
from train.dreambooth_config import DreamBoothConfig
from train.plan_cards import CARDS, card_of


@dataclass(frozen=True)
class PlanConfig(DreamBoothConfig):
    """A `dreambooth` command with another first word; see `lora-diffusion plan --help`."""

    pretrained_model_name_or_path: str = setting(
        help="what is to be trained: a folder, a hub id (its config files alone are read), 'pocket', or by name one of "
        "sd15, sd21, sdxl",
        group="model",
        aliases=("model",),
        metavar="MODEL",
    )
    instance_data_dir: str = setting("", "as for dreambooth; not read", group="data", metavar="DIR")
    instance_prompt: str = setting("a photo of sks dog", "as for dreambooth", group="data", metavar="TEXT")
    device: str = setting(
        "cuda", "where it would be trained", group="model", choices=("auto", "cpu", "cuda"), decides=False
    )

    gpu: str | None = setting(
        None, f"the card that it is to fit on: {', '.join(CARDS)}", group="plan", metavar="NAME", decides=False
    )
    memory: str | None = setting(
        None, "the memory that it is to fit in, such as 6GB", group="plan", metavar="SIZE", decides=False
    )
    json: bool = setting(False, "print the plan as JSON, in bytes", group="plan", decides=False)


def validate(config: PlanConfig) -> None:
    """Check all that can be checked without a model. Raises ConfigError."""
    if config.with_prior_preservation and not (config.class_prompt or "").strip():
        raise ConfigError("--with_prior_preservation needs --class_prompt, for example 'a photo of a dog'")
    dreambooth_checks.validate(config)
    card_of(config.gpu, config.memory)
    if config.device == "cpu" and config.gpu is not None:
        raise ConfigError("--gpu is a card and --device cpu is none; --memory says how much memory there is")
