"""Previews while training: the same prompt at the same seeds each time, so that progress can be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lora_diffusion as ld
from train.families import family_of
from train.pictures import save_png
from train.sampling import generate
from train.shards import is_sharded


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
        self, pipe: Any, folder: Path | None, step: int, device: torch.device,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[tuple[Path, int]]:  # fmt: skip
        """Draw the pictures of a step into `folder`; without one they are drawn and forgotten.

        Returns:
            (path, seed) of each.
        """
        seeds = [self.seed + number for number in range(self.images)]
        made = []

        def keep(index: int, image: Any) -> None:
            if folder is None:
                return
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

        self._generate(pipe, self.prompt, device, should_stop, keep)
        return made

    def base(
        self, pipe: Any, prompt: str, device: torch.device, should_stop: Callable[[], bool] | None = None
    ) -> list[Any]:
        """The base model's pictures of a prompt at the same seeds, in memory; fewer if it was stopped."""
        with ld.disable_adapters(pipe):
            return self._generate(pipe, prompt, device, should_stop)

    def _generate(
        self, pipe: Any, prompt: str, device: torch.device, should_stop: Callable[[], bool] | None,
        on_image: Callable[[int, Any], None] | None = None,
    ) -> list[Any]:  # fmt: skip
        seeds = [self.seed + number for number in range(self.images)]
        at_once = self.images if device.type == "cpu" else 1
        with taking_turns(pipe, device):
            return generate(
                pipe, prompt, seeds, steps=self.steps, guidance=7.5, batch_size=at_once, on_image=on_image,
                width=self.resolution, height=self.resolution, should_stop=should_stop,
            )  # fmt: skip


@contextmanager
def taking_turns(pipe: Any, device: torch.device) -> Iterator[None]:
    """While pictures are drawn on a GPU: the text encoders beside the denoiser while they read, then the denoiser
    alone, then the autoencoder alone, picture by picture, so that drawing takes no more memory than training.
    Afterwards everything is where it was. On the CPU nothing is moved."""
    if device.type == "cpu":
        yield
        return
    family = family_of(pipe)
    denoiser, encoders, vae = family.denoiser_of(pipe), [*family.encoders_of(pipe).values()], pipe.vae
    before = [(module, module.device) for module in (denoiser, *encoders, vae)]
    decode, sliced = vae.decode, vae.use_slicing

    def decode_alone(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        _move([denoiser, *encoders], "cpu")
        _move([vae], device)
        try:
            return decode(latents.to(device), *args, **kwargs)
        finally:
            _move([vae], "cpu")
            _move([denoiser, *encoders], device)

    _move([vae], "cpu")
    _move([denoiser, *encoders], device)
    hook = denoiser.register_forward_pre_hook(lambda *_: _move(encoders, "cpu"))
    vae.decode, vae.use_slicing = decode_alone, True
    try:
        yield
    finally:
        hook.remove()
        del vae.decode
        vae.use_slicing = sliced
        for module, place in before:
            _move([module], place)


@contextmanager
def encoder_alone(pipe: Any, device: torch.device) -> Iterator[None]:
    """While pictures are encoded on a GPU: the autoencoder alone, picture by picture. On the CPU nothing is moved."""
    if device.type == "cpu":
        yield
        return
    family, sliced = family_of(pipe), pipe.vae.use_slicing
    others = [family.denoiser_of(pipe), *family.encoders_of(pipe).values()]
    pipe.vae.use_slicing = True
    _move(others, "cpu")
    try:
        yield
    finally:
        pipe.vae.use_slicing = sliced
        _move(others, device)


def _move(modules: list[Any], place: torch.device | str) -> None:
    """Move modules that are elsewhere, but for those in shards; what they leave is given back to the GPU."""
    moving = [one for one in modules if one.device.type != torch.device(place).type and not is_sharded(one)]
    for module in moving:
        module.to(place)
    if moving and torch.cuda.is_available():
        torch.cuda.empty_cache()
