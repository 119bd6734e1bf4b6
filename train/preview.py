"""Previews while training: the same prompt at the same seeds each time, so that progress can be seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.pictures import save_png
from train.sampling import generate


@dataclass(frozen=True)
class Preview:
    """What to draw, and when.

    Pictures are drawn by the training pipeline as it is: nothing is cast or copied, so a preview cannot change the run.
    """

    prompt: str
    images: int
    every: int
    steps: int
    seed: int
    resolution: int
    model: str

    def due(self, step: int, last_step: int) -> bool:
        return step % self.every == 0 or step == last_step

    def draw(
        self, pipe: Any, folder: Path, step: int, device: torch.device, should_stop: Callable[[], bool] | None = None
    ) -> list[tuple[Path, int]]:
        """Draw the pictures of a step into `folder`.

        Returns:
            (path, seed) of each.
        """
        resting = [module for module in (pipe.vae, pipe.text_encoder) if module.device.type != device.type]
        for module in resting:
            module.to(device)
        seeds = [self.seed + number for number in range(self.images)]
        made = []

        def keep(index: int, image: Any) -> None:
            settings = {
                "prompt": self.prompt,
                "seed": seeds[index],
                "steps": self.steps,
                "guidance": 7.5,
                "model": self.model,
                "training_step": step,
            }
            path = save_png(image, folder / f"step-{step:06d}-{index}.png", settings)
            made.append((path, seeds[index]))

        try:
            generate(
                pipe, self.prompt, seeds, steps=self.steps, guidance=7.5, batch_size=self.images, on_image=keep,
                width=self.resolution, height=self.resolution, should_stop=should_stop,
            )  # fmt: skip
        finally:
            for module in resting:
                module.to("cpu")
        return made
