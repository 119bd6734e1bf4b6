"""Draw pictures with a base model and any number of adapters.

    lora-diffusion sample --model pocket --adapter runs/dog/adapter.safetensors:0.8 --prompt "sks dog on a beach" --seed
    7

Each PNG carries how it was made: prompt, seed, adapters and weights, steps, guidance, model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_diffusion as ld
from lora_diffusion.errors import ConfigError
from train.models import load_pipeline, resolve_device, resolve_precision
from train.objective import with_zero_snr
from train.pictures import read_settings, readable_name, save_png
from train.record import OnEvent
from train.sample_config import SampleConfig, validate
from train.sampling import generate
from train.text_states import token_count, token_limit

_GENERIC = ("adapter", "pytorch_lora_weights", "adapter_model")  # file names that say nothing; the folder's does


@dataclass(frozen=True)
class Wanted:
    """An adapter file and the weight it is to be used with."""

    file: str
    weight: float

    @property
    def label(self) -> str:
        path = Path(self.file)
        return path.resolve().parent.name if path.stem in _GENERIC else path.stem


def parse_adapter(text: str, flag: str = "--adapter ") -> Wanted:
    """`FILE` or `FILE:WEIGHT`; a colon that belongs to the name (`C:\\dog.safetensors`) stays with it.

    Raises:
        ConfigError: the weight is not a finite number.
    """
    file, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Wanted(text, 1.0)
    try:
        weight = float(tail)
    except ValueError:
        if "/" in tail or "\\" in tail or "." in tail:
            return Wanted(text, 1.0)
        raise ConfigError(f"{flag}{text}: {tail!r} is not a number; write FILE:WEIGHT, such as {file}:0.8") from None
    if weight - weight != 0:
        raise ConfigError(f"{flag}{text}: the weight must be finite")
    return Wanted(file, weight)


def sample(
    config: SampleConfig,
    *,
    on_event: OnEvent | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Path]:
    """Draw `num_images` pictures for each prompt.

    Args:
        on_event: told of `start`, of every `sample` (with its path) and of the `end`.
        should_stop: asked between batches.

    Returns:
        The files, by prompt and then by seed.

    Raises:
        ConfigError, AdapterFormatError, AdapterMismatchError, ModelNotFoundError: what was asked for cannot be used.
    """
    emit = on_event or (lambda event: None)
    validate(config)
    wanted = [parse_adapter(text) for text in config.adapter]
    for one in wanted:
        ld.read_adapter(one.file)  # a wrong file shows itself before the model is loaded
    device = resolve_device(config.device)
    pipe = load_pipeline(
        config.model,
        precision=resolve_precision(config.mixed_precision, device),
        device=device,
        revision=config.revision,
        variant=config.variant,
    )
    load_adapters(pipe, wanted)
    if any(_wants_zero_snr(one) for one in wanted):
        pipe.scheduler = with_zero_snr(pipe.scheduler)
    jobs = [(prompt, config.seed + number) for prompt in config.prompt for number in range(config.num_images)]
    emit({"event": "start", "recipe": "sample", "model": config.model, "pictures": len(jobs), "device": str(device)})
    limit = token_limit(pipe)
    for prompt in config.prompt:
        count = token_count(pipe, prompt)
        if count > limit:
            message = (
                f"the prompt {prompt!r} has {count} tokens; the model reads the first {limit}, the rest is cut off"
            )
            emit({"event": "warning", "message": message})
    paths: list[Path] = []

    def keep(index: int, picture: Any) -> None:
        prompt, seed = jobs[index]
        settings = _settings(config, wanted, prompt, seed, picture.size)
        paths.append(save_png(picture, _free_path(config, wanted, settings), settings))
        emit({"event": "sample", "path": str(paths[-1]), "prompt": prompt, "seed": seed, "of": len(jobs)})

    generate(
        pipe,
        [prompt for prompt, _ in jobs],
        [seed for _, seed in jobs],
        steps=config.num_inference_steps,
        guidance=config.guidance_scale,
        batch_size=config.batch_size,
        negative_prompt=config.negative_prompt,
        width=config.width,
        height=config.height,
        on_image=keep,
        should_stop=should_stop,
    )
    emit(
        {"event": "end", "recipe": "sample", "paths": [str(path) for path in paths], "stopped": len(paths) < len(jobs)}
    )
    return paths


def _wants_zero_snr(wanted: Wanted) -> bool:
    """Whether an adapter was trained on the schedule that ends in pure noise; pictures are to be drawn on the same."""
    settings = ld.read_adapter(wanted.file).metadata.get("settings")
    return isinstance(settings, dict) and settings.get("rescale_betas_zero_snr") is True


def load_adapters(pipe: Any, wanted: list[Wanted]) -> None:
    """Load several adapters into a pipeline and switch them all on, each with its weight."""
    names = []
    for number, one in enumerate(wanted):
        names.append(f"adapter_{number}")
        ld.load_adapter(pipe, one.file, name=names[-1])
    if names:
        ld.set_adapters(pipe, names, [one.weight for one in wanted])


def _settings(
    config: SampleConfig, wanted: list[Wanted], prompt: str, seed: int, size: tuple[int, int]
) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "negative_prompt": config.negative_prompt,
        "seed": seed,
        "steps": config.num_inference_steps,
        "guidance": config.guidance_scale,
        "width": size[0],
        "height": size[1],
        "model": config.model,
        "adapters": [{"name": one.label, "file": one.file, "weight": one.weight} for one in wanted],
    }


def _free_path(config: SampleConfig, wanted: list[Wanted], settings: dict[str, Any]) -> Path:
    """A readable name; a picture made with other settings is not overwritten."""
    stem = readable_name(settings["prompt"], settings["seed"], [(one.label, one.weight) for one in wanted])
    path, number = Path(config.output_dir) / f"{stem}.png", 1
    while path.exists() and read_settings(path) != settings:
        number += 1
        path = path.with_name(f"{stem}_{number}.png")
    return path
