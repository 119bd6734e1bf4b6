"""Models to plan for: the modules of a pipeline without their weights, from its config files or from a name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lora_diffusion.errors import ConfigError, ModelNotFoundError
from train.families import FAMILIES, Family, family_of, supported
from train.models import resolve_model
from train.plan_architectures import ARCHITECTURES

INDEX = "model_index.json"


@dataclass(frozen=True)
class Blueprint:
    """A pipeline's modules; what they are made of, and not what they hold.

    Attributes:
        name: as it was asked for.
        family: see `train.families`.
        modules: the denoiser, the VAE and the text encoders by name, on the meta device or real.
        index: what the pipeline's own config says.
    """

    name: str
    family: Family
    modules: dict[str, nn.Module]
    index: dict[str, Any]

    @property
    def scale(self) -> int:
        """Pixels per side of a latent."""
        return int(2 ** (len(self.modules["vae"].config.block_out_channels) - 1))

    @property
    def native(self) -> int:
        """The side in pixels of what the model was made for."""
        size = self.modules[self.family.denoiser].config.sample_size
        return int((size if isinstance(size, int) else min(size)) * self.scale)

    def pipe(self, modules: dict[str, nn.Module]) -> Any:
        """Something with the attributes of the pipeline that `train.families` and `lora_diffusion` look at."""
        kind = type(self.family.pipeline, (SimpleNamespace,), {})
        return kind(config=SimpleNamespace(**self.index), vae_scale_factor=self.scale, **modules)


def of_pipeline(pipe: Any, name: str) -> Blueprint:
    """The blueprint of a pipeline that is loaded; its modules are not copied."""
    family = family_of(pipe)
    names = [family.denoiser, "vae", *(one.component for one in family.text_encoders)]
    return Blueprint(name, family, {part: getattr(pipe, part) for part in names}, dict(pipe.config))


def blueprint(name: str, revision: str | None = None) -> Blueprint:
    """The blueprint that a name stands for: a folder, a hub id, `pocket`, or an architecture (`sd15`, `sd21`, `sdxl`).

    Raises:
        ModelNotFoundError: there is no such model, or its config files are damaged or out of reach.
        ConfigError: it is of no family that is known.
    """
    if name in ARCHITECTURES and not Path(name).exists():
        kind, components, index = ARCHITECTURES[name]
        return _assembled(name, kind, components, index)
    if "/" not in name and "\\" not in name and name != "pocket" and not Path(name).exists():
        known = ", ".join(ARCHITECTURES)
        raise ModelNotFoundError(f"there is no model {name}; give a folder, a hub id (owner/name), 'pocket' or {known}")
    place = resolve_model(name)
    index = _config(place, INDEX, revision)
    said = index.get("_class_name")
    if not isinstance(said, str) or said not in FAMILIES:
        raise ConfigError(f"{name} is a {said!a}; {supported()} are supported")
    family = FAMILIES[said]
    components = {}
    for part in (family.denoiser, "vae", *(one.component for one in family.text_encoders)):
        entry = index.get(part)
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
            raise ModelNotFoundError(f"the {INDEX} of {name} names no {part}")
        components[part] = (entry[0], entry[1], _config(place, f"{part}/config.json", revision))
    return _assembled(name, said, components, index)


def _assembled(name: str, kind: str, components: dict[str, Any], index: dict[str, Any]) -> Blueprint:
    modules = {part: _build(name, part, *entry) for part, entry in components.items()}
    return Blueprint(name, FAMILIES[kind], modules, {"force_zeros_for_empty_prompt": False, **index})


def _build(name: str, part: str, library: str, kind: str, config: dict[str, Any]) -> nn.Module:
    """A module on the meta device. Classes are those of the libraries: a model's own code is not run."""
    if library == "diffusers":
        import diffusers as package
        from diffusers import ModelMixin as parent
    elif library == "transformers":
        import transformers as package
        from transformers import PreTrainedModel as parent
    else:
        raise ModelNotFoundError(f"the {part} of {name} is a model of {library!a}, which is not known")
    model: Any = getattr(package, kind, None) if kind.isidentifier() else None
    if not isinstance(model, type) or not issubclass(model, parent):
        raise ModelNotFoundError(f"the {part} of {name} is a {kind!a}, which the installed {library} does not know")
    made_by: Any = model
    try:
        with torch.device("meta"):
            made = (
                made_by.from_config(config)
                if library == "diffusers"
                else made_by(made_by.config_class.from_dict(config))
            )
    except Exception as problem:  # the libraries raise whatever a config makes them stumble over
        what = " ".join(str(problem).split())[:200]
        raise ModelNotFoundError(f"the config of the {part} of {name} does not describe a {kind}: {what}") from problem
    return made.eval().requires_grad_(False)


def _config(place: str, file: str, revision: str | None) -> dict[str, Any]:
    path = Path(place) / file if Path(place).is_dir() else _hub_file(place, file, revision)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelNotFoundError(f"{path} cannot be read: {' '.join(str(problem).split())[:200]}") from None
    if not isinstance(value, dict):
        raise ModelNotFoundError(f"{path} is damaged: it holds no table")
    return value


def _hub_file(place: str, file: str, revision: str | None) -> Path:
    """A small file of a hub model; one that is here already is used without asking the network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(place, file, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        pass
    try:
        return Path(hf_hub_download(place, file, revision=revision))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as problem:
        what = " ".join(str(problem).split())[:120]
        raise ModelNotFoundError(
            f"{file} of {place} is not in the local cache and cannot be fetched from the hub "
            f"({type(problem).__name__}: {what}); a plan needs no weights: {', '.join(ARCHITECTURES)} are known by name"
        ) from problem
