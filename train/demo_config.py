"""The settings of the demo. Imports neither torch nor diffusers."""

from __future__ import annotations

from dataclasses import dataclass

from train.config import setting


@dataclass(frozen=True)
class DemoConfig:
    """Five shipped photos to an adapter and pictures, in minutes; see `lora-diffusion demo --help`."""

    output_dir: str = setting("runs/demo", "where everything goes; an older demo there is replaced", metavar="DIR")
    subject: str = setting("zorp", "which of the shipped subjects to learn", metavar="NAME")
    seed: int = setting(0, "seed of the training; pictures have the seeds 0, 1, 2, …", minimum=0)
    num_seeds: int = setting(5, "pictures of each prompt that are judged", minimum=1, maximum=50)
    max_train_steps: int = setting(600, "optimizer steps", minimum=1)
