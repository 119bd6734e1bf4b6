"""Whether a job may be done: its settings against the recipe's own checks and against the app's limits.

A page may send anything, and so may a client without a page. Nothing here loads torch, unless photos are counted.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.web.limits import Limits
from app.web.places import Workspace, is_inside
from lora_diffusion.errors import ConfigError, DatasetError, ModelNotFoundError
from lora_diffusion.text import printable
from train.config import Setting, from_dict, nearest, settings_of, to_dict

# recipe -> its config, its checks, what runs it
RECIPES = {
    "dreambooth": (
        "train.dreambooth_config:DreamBoothConfig", "train.dreambooth_checks:validate", "train.dreambooth:train"
    ),
    "text": ("train.text_config:TextConfig", "train.text_checks:validate", "train.text:train"),
}  # fmt: skip

# What the app decides itself: places, and whether a run starts or goes on; a job has one process.
OURS = ("output_dir", "overwrite", "resume_from_checkpoint", "logging_dir", "fsdp", "fsdp_cpu_offload")
# What reaches out of the app: not for strangers.
OUTWARD = ("push_to_hub", "hub_model_id", "report_to", "dataset", "revision", "variant", "attn_implementation")
_FOLDERS = ("instance_data_dir", "class_data_dir", "mask_dir")
_FILES = ("train_file", "validation_file", "test_file", "allowed_words_file", "caption_template_file")
_ENCODERS = ("validation_image_encoder", "validation_text_encoder")
_PATTERNS = ("target_modules", "modules_to_save")
_PLAIN_PATTERN = re.compile(r"[A-Za-z0-9_.,-]{0,500}")  # no regex of a stranger's: one can take for ever

# setting -> the limit it is under
_UNDER = {
    "max_train_steps": "steps",
    "num_train_epochs": "steps",
    "rank": "rank",
    "bottleneck_size": "width",
    "encoder_hidden_size": "width",
    "num_virtual_tokens": "tokens",
    "resolution": "side",
    "max_bucket_reso": "side",
    "train_batch_size": "batch",
    "gradient_accumulation_steps": "batch",
    "sample_batch_size": "batch",
    "validation_batch_size": "batch",
    "dataloader_num_workers": "batch",
    "num_class_images": "class_images",
    "num_validation_images": "count",
    "validation_inference_steps": "inference_steps",
    "prior_generation_steps": "inference_steps",
    "max_new_tokens": "new_tokens",
    "max_length": "tokens",
    "max_answer_length": "tokens",
    "checkpoints_total_limit": "count",
    "multires_noise_iterations": "count",
}  # fmt: skip
CHECKPOINTS = 10  # in a run, where the settings do not say how many steps lie between two


def named(path: str) -> Any:
    """What 'module:name' names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def checked(recipe: str, settings: Mapping[str, Any], workspace: Workspace, limits: Limits) -> dict[str, Any]:
    """The settings of a job, ready to be kept: paths in full, few checkpoints where nothing was said of them.

    Raises:
        ConfigError, DatasetError: one sentence that names the setting, its value and what to do.
    """
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ConfigError(f"there is no recipe {printable(str(recipe), 40)!a}; take {' or '.join(RECIPES)}")
    config_class, validate = (named(path) for path in RECIPES[recipe][:2])
    items = {item.name: item for item in settings_of(config_class)}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"settings are a {type(settings).__name__}; give names and values")
    values = {}
    for name, value in settings.items():
        if name not in items:
            raise ConfigError(f"there is no setting {printable(str(name), 60)!a}{nearest(str(name)[:60], items)}")
        values[name] = _usable(items[name], value, limits)
    for name in OURS:
        if name in values and values[name] not in (items[name].default, "", None, False) and name != "output_dir":
            raise ConfigError(f"{name} is not to be set here: the app takes care of it")
        values.pop(name, None)
    for name in (*_FOLDERS, *_FILES):
        if values.get(name):
            values[name] = _path(name, str(values[name]), workspace, limits)
    config = from_dict(config_class, values)
    _check_limits(to_dict(config), limits)
    if limits.own_files_only:
        _check_stranger(values, items)
    validate(config)
    _check_model(str(values["pretrained_model_name_or_path"]), limits)
    _check_data(values, limits)
    steps = values.get("max_train_steps") or 500
    if "checkpointing_steps" not in values:
        values["checkpointing_steps"] = max(1, -(-steps // CHECKPOINTS))
    if recipe == "text" and values.get("checkpoints_total_limit") is None:
        values["checkpoints_total_limit"] = 2  # a head or a whole model may be in each
    return values


def _usable(item: Setting, value: Any, limits: Limits) -> Any:
    """A value as JSON has it: finite, of bounded length; 20.0 is a whole number."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{item.name} is {value}; it must be a number")
    if isinstance(value, float) and item.kind is int and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**63:
        raise ConfigError(f"{item.name} is a number of {value.bit_length()} bits; it must be smaller")
    for text in value if isinstance(value, list | tuple) else (value,):
        if isinstance(text, str) and ("\0" in text or len(text) > limits.prompt):
            what = f"has {len(text):,} characters; at most {limits.prompt:,} are allowed"
            raise ConfigError(f"{item.name} {what if len(text) > limits.prompt else 'has a NUL character in it'}")
    return value


def _check_limits(values: Mapping[str, Any], limits: Limits) -> None:
    for name, limit in _UNDER.items():
        most, value = getattr(limits, limit), values.get(name)
        if value is not None and value > most:
            raise ConfigError(f"{name} is {value:,}, and {most:,} is the most that is allowed here")
    if values.get("max_train_steps") is None and (values.get("num_train_epochs") or 0) > limits.steps:
        raise ConfigError(f"num_train_epochs is more than the {limits.steps:,} steps that are allowed here")


def _path(name: str, text: str, workspace: Workspace, limits: Limits) -> str:
    """Raises ConfigError, which for a stranger does not say whether something is there."""
    path = Path(text).expanduser().absolute()
    if limits.own_files_only and not any(is_inside(root, path) for root in _open_to_all(workspace)):
        raise ConfigError(f"{name} is not among the uploads; upload the files, and use what was made of them")
    return str(path)


def _open_to_all(workspace: Workspace) -> list[Path]:
    from train import pocket, pocket_text

    found = [workspace.uploads]
    for place in (pocket.subjects_dir, pocket_text.data_dir):
        try:
            found.append(place())
        except ModelNotFoundError:  # this copy of the project was made without them
            continue
    return found


def _check_stranger(values: Mapping[str, Any], items: Mapping[str, Setting]) -> None:
    """Raises ConfigError for what only the owner of a machine may ask of it."""
    for name in OUTWARD:
        if name in values and values[name] not in (items[name].default, "", None, False, "none"):
            raise ConfigError(f"{name} is not to be used here: it reaches out of this app")
    for name in _ENCODERS:
        if values.get(name) not in (None, "auto", "pocket", "none"):
            raise ConfigError(f"{name} is auto, pocket or none here")
    for name in _PATTERNS:
        if values.get(name) is not None and not _PLAIN_PATTERN.fullmatch(str(values[name])):
            raise ConfigError(f"{name} is a preset or names separated by commas here")


def _check_model(name: str, limits: Limits) -> None:
    if limits.models is not None and name not in limits.models:
        raise ConfigError(f"the model {printable(name, 60)!a} is not offered here; take {' or '.join(limits.models)}")


def _check_data(values: Mapping[str, Any], limits: Limits) -> None:
    """Raises ConfigError or DatasetError where photos or rows are not there, or are too many."""
    if values.get("instance_data_dir"):
        from train.images import list_images

        photos = list_images(values["instance_data_dir"])
        if len(photos) > limits.images:
            raise DatasetError(f"there are {len(photos):,} photos, and {limits.images:,} are the most allowed here")
    for name in _FILES:
        if not values.get(name):
            continue
        path = Path(values[name])
        if not path.is_file():
            raise DatasetError(f"{name}: there is no file {printable(str(path))}; give one that is there")
        if (size := path.stat().st_size) > limits.text_bytes:
            raise DatasetError(
                f"{name} has {size / 2**20:,.0f} MiB, and {limits.text_bytes / 2**20:,.0f} are the most allowed here"
            )
