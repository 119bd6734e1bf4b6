"""Drawing pictures: each from its own seed, so that neither the batch nor its neighbours change it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from lora_diffusion.errors import ConfigError, TrainingError
from train.families import family_of


def generate(
    pipe: Any,
    prompts: str | Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 30,
    guidance: float = 7.5,
    batch_size: int = 4,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    on_image: Callable[[int, Image.Image], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Image.Image]:
    """Draw one picture for each seed.

    Picture i is what `pipe(prompts[i], generator=torch.Generator().manual_seed(seeds[i]))` draws: noise comes from a
    CPU generator of its own, also where a scheduler asks for more of it.

    Args:
        pipe: a pipeline of a known family, with or without adapters; its modules are put into eval mode.
        prompts: one for each seed, or one for all.
        seeds: one for each picture.
        steps: denoising steps.
        guidance: classifier-free guidance scale (Ho & Salimans, 2022); 1 is none.
        batch_size: pictures drawn at once; changes speed and memory, pictures only by rounding.
        width, height: in pixels (default: the model's own).
        on_image: called with (index, picture) as soon as each is there.
        should_stop: asked between batches; True ends early.

    Returns:
        RGB pictures in the order of the seeds (fewer if stopped).

    Raises:
        ConfigError: prompts and seeds differ in number, or the size is not a multiple of 8.
        TrainingError: the model produced NaN instead of a picture.
    """
    asked = [prompts] * len(seeds) if isinstance(prompts, str) else list(prompts)
    if len(asked) != len(seeds):
        raise ConfigError(f"{len(asked)} prompts for {len(seeds)} seeds; give one for each, or a single prompt")
    family = family_of(pipe)
    modules = (family.denoiser_of(pipe), pipe.vae, *family.encoders_of(pipe).values())
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    pictures: list[Image.Image] = []
    try:
        for start in range(0, len(asked), batch_size):
            if should_stop is not None and should_stop():
                break
            chunk = slice(start, start + batch_size)
            for picture in _draw(pipe, asked[chunk], seeds[chunk], steps, guidance, negative_prompt, width, height):
                pictures.append(picture)
                if on_image is not None:
                    on_image(len(pictures) - 1, picture)
    finally:
        for module, mode in zip(modules, modes):
            module.train(mode)
    return pictures


@torch.no_grad()
def _draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    negative_prompt: str | None,
    width: int | None,
    height: int | None,
) -> list[Image.Image]:
    try:
        with warnings.catch_warnings():
            # Where fp16 would overflow, SDXL's pipeline decodes in fp32, by a method of its own that it calls outdated.
            warnings.filterwarnings("ignore", message="`upcast_vae`", category=FutureWarning)
            arrays = pipe(
                list(prompts),
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
                num_inference_steps=steps,
                guidance_scale=guidance,
                width=width,
                height=height,
                generator=[torch.Generator(device="cpu").manual_seed(seed) for seed in seeds],
                output_type="np",
            ).images
    except ValueError as problem:
        raise ConfigError(f"the pipeline refuses these settings: {' '.join(str(problem).split())}") from problem
    if not bool((arrays == arrays).all()):
        raise TrainingError(
            "the model produced NaN instead of a picture; in fp16 use another precision, else the adapter has diverged"
        )
    return pipe.image_processor.numpy_to_pil(arrays)
