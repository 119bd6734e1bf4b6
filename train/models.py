"""Base models: from a name to a Stable Diffusion pipeline in one precision on one device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.errors import ConfigError, ModelNotFoundError
from train.families import FAMILIES, Family, supported
from train.packed import suit_cpu
from train.pocket import pocket_dir
from train.quantise import check_quantize, quantise

PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_model(name: str) -> str:
    """The folder or hub id that a model name stands for: `pocket` is the embedded model, all else is itself.

    Raises:
        ModelNotFoundError: the name is a path and there is no pipeline there.
    """
    if name == "pocket":
        return str(pocket_dir())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelNotFoundError(f"the folder {name} is no diffusers pipeline: it has no model_index.json")
        return str(path)
    if path.is_file():
        raise ModelNotFoundError(
            f"{name} is a single file; a folder in diffusers' layout is needed "
            "(StableDiffusionPipeline.from_single_file(...).save_pretrained(...) makes one)"
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelNotFoundError(f"there is no model folder {name}; give a folder, a hub id (owner/name), or 'pocket'")
    return name


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `mps` names.

    Raises:
        ConfigError: the machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no CUDA device here; leave --device out to train on the CPU")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: PyTorch sees no Apple GPU here; leave --device out to train on the CPU")
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` made definite: on CUDA bf16, or fp16 where the card has no bf16 (a T4); elsewhere `no`, which is fp32."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"


def load_pipeline(
    name: str,
    *,
    precision: str = "no",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    quantize: str | None = None,
    quantize_text_encoders: bool = False,
) -> Any:
    """Load a pipeline of one of the known families (see `train.families`) for training or sampling.

    Args:
        name: a folder, a hub id (files that are already here are used without asking the network), or `pocket`.
        precision: a key of `PRECISIONS`; every component is loaded in it, whatever precision the files have.
        device: where to put it.
        quantize: how the denoiser's weights are stored (see `train.quantise`; default: in `precision`). That is done
            layer by layer on the way to the device, which never holds the denoiser in full.
        quantize_text_encoders: likewise the text encoders'; worth it where they stay on the device.

    Returns:
        The pipeline in eval mode without safety checker, watermark and progress bar.

    Raises:
        ModelNotFoundError: there is no such model, it has no safetensors weights, or it cannot be reached.
        ConfigError: it is another kind of pipeline, or this machine cannot quantise so.
    """
    import diffusers

    if quantize is not None:
        check_quantize(quantize, device)
    place = resolve_model(name)
    family = _family(name, place, revision)
    pipeline_class = getattr(diffusers, family.pipeline)
    options: dict[str, Any] = {
        "dtype": PRECISIONS[precision],  # said openly: transformers would keep the precision of the file
        "use_safetensors": True,
        "revision": revision,
        "variant": variant,
        **family.options,
    }
    try:
        pipeline = pipeline_class.from_pretrained(place, local_files_only=True, **options)
    except (OSError, ValueError) as problem:
        if Path(place).is_dir():
            raise ModelNotFoundError(f"the model in {place} cannot be loaded: {_one_line(problem)}") from problem
        pipeline = _download(pipeline_class.from_pretrained, place, options)
    except (KeyError, TypeError, AttributeError, RuntimeError) as problem:
        raise ModelNotFoundError(f"the model {name} cannot be loaded: {_one_line(problem)}") from problem
    pipeline.set_progress_bar_config(disable=True)
    encoders = family.encoders_of(pipeline)
    for part in (*encoders, *(one.tokenizer for one in family.text_encoders)):
        if getattr(pipeline, part) is None:
            raise ConfigError(f"the model {name} has no {part}, which a {family.pipeline} needs here")
    for component in (family.denoiser_of(pipeline), pipeline.vae, *encoders.values()):
        component.eval().requires_grad_(False)
    for part in family.trained(text_encoders=quantize_text_encoders) if quantize is not None else ():
        quantise(getattr(pipeline, part), str(quantize), precision=PRECISIONS[precision], device=device)
    if torch.device(device).type == "cpu":  # convolutions on CPU are a good deal faster this way
        pipeline.vae.to(memory_format=torch.channels_last)
        suit_cpu(family.denoiser_of(pipeline))
    return pipeline.to(device)


def _download(load: Any, place: str, options: dict[str, Any]) -> Any:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return load(place, **options)
    except (OSError, ValueError, HfHubHTTPError) as problem:
        raise ModelNotFoundError(
            f"the model {place} is neither a folder nor in the local cache, and it cannot be fetched from the hub; "
            f"are name and network all right? ({type(problem).__name__}: {_one_line(problem, 120)})"
        ) from problem


def _family(name: str, place: str, revision: str | None) -> Family:
    """The family that the model's index names; a model on the hub is asked for that file alone."""
    from diffusers import DiffusionPipeline

    index = Path(place) / "model_index.json"
    try:
        if index.is_file():
            kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        else:
            kind = _hub_index(DiffusionPipeline.load_config, place, revision).get("_class_name")
    except (ValueError, AttributeError) as problem:
        raise ModelNotFoundError(f"{index} is damaged: {problem}") from problem
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(f"{name} is a {kind!a}; {supported()} are supported")
    return FAMILIES[kind]


def _hub_index(load: Any, place: str, revision: str | None) -> Any:
    try:
        return load(place, local_files_only=True, revision=revision)
    except (OSError, ValueError):
        return _download(load, place, {"revision": revision})


def _one_line(problem: BaseException, limit: int = 300) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
