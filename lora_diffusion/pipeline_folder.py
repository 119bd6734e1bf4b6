"""A model folder as diffusers and transformers save it, opened without its weights.

The modules are built on the meta device from the folder's configs, which says what each tensor belongs to; the tensors
stay in their files until they are asked for, one by one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .components import PIPELINE_COMPONENTS, components_of
from .errors import LoraDiffusionError, ModelNotFoundError
from .weight_file import WeightFile

INDEX = "model_index.json"
_WEIGHTS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers call the file
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")
_CLIP_PREFIX = "text_model."


class ModelFolder:
    """A pipeline (a folder with model_index.json) or a single model of diffusers or transformers.

    skeleton: what `components_of` takes: the modules that may carry adapters, on the meta device.
    components: {component: ComponentFolder}.
    variant: the weights' variant ("fp16" reads diffusion_pytorch_model.fp16.safetensors).
    Raises ModelNotFoundError, one line.
    """

    def __init__(self, path: str | os.PathLike[str], variant: str | None = None) -> None:
        self.path, self.variant = Path(path), variant
        if not self.path.is_dir():
            raise ModelNotFoundError(f"there is no model folder {self.path}")
        self.is_pipeline = (self.path / INDEX).is_file()
        self.skeleton: Any
        if self.is_pipeline:
            parts = _parts(self.path)
            modules = {name: _build(self.path / name, *where) for name, where in parts.items()}
            folders = {name: self.path / name for name in modules}
            self.skeleton = SimpleNamespace(**modules)
        else:
            self.skeleton = _build(self.path)
            modules = components_of(self.skeleton)
            folders = dict.fromkeys(modules, self.path)
        self.components = {name: ComponentFolder(name, module, folders[name], variant) for name, module in
                           modules.items()}  # fmt: skip

    def notes(self) -> list[str]:
        """What the files hold that the modules have no place for, in words."""
        return [
            f"{component} has {len(part.unknown)} tensors that its model has no place for, such as {part.unknown[0]}"
            for component, part in self.components.items()
            if part.unknown
        ]


class ComponentFolder:
    """One model: its module on the meta device and where its tensors lie.

    places: {the module's name of a tensor: (file, the file's name of it)}, with all names of a shared tensor.
    unknown: tensors in the files that the module has no place for.
    """

    def __init__(self, component: str, module: nn.Module, path: Path, variant: str | None = None) -> None:
        self.component, self.module, self.path = component, module, path
        self.files = [WeightFile(file) for file in _weight_files(path, variant)]
        self.unknown: list[str] = []
        self.places: dict[str, tuple[WeightFile, str]] = {}
        own = dict(module.state_dict())
        for file in self.files:
            for name in file.tensors:
                self._place(file, name, own)
        for names in self.ties():
            known = next((name for name in names if name in self.places), None)
            self.places.update(dict.fromkeys(names, self.places[known]) if known is not None else {})

    def ties(self) -> list[list[str]]:
        """The names of each parameter that has several."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return [several for several in names.values() if len(several) > 1]

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The floating-point tensors by the module's names, each read when it is asked for and not kept."""
        return _Tensors(self)

    def _place(self, file: WeightFile, name: str, own: Mapping[str, torch.Tensor]) -> None:
        base = f"{getattr(self.module, 'base_model_prefix', '')}."
        spellings = (name, name.removeprefix(_CLIP_PREFIX), _CLIP_PREFIX + name, name.removeprefix(base), base + name)
        known = next((spelling for spelling in spellings if spelling in own), None)
        if known is None:
            self.unknown.append(name)
            return
        if known in self.places:
            raise file.error(f"has {name} a second time, as {self.places[known][1]}")
        if file.tensors[name].is_float and file.tensors[name].shape != tuple(own[known].shape):
            wanted, given = list(own[known].shape), list(file.tensors[name].shape)
            raise file.error(f"has {name} of shape {given}; by the folder's config.json it is {wanted}")
        self.places[known] = (file, name)


class _Tensors(Mapping[str, torch.Tensor]):
    def __init__(self, folder: ComponentFolder) -> None:
        order = dict.fromkeys([*folder.module.state_dict(), *folder.places])
        self._places = {name: folder.places[name] for name in order if name in folder.places}
        self._places = {n: (file, own) for n, (file, own) in self._places.items() if file.tensors[own].is_float}

    def __getitem__(self, name: str) -> torch.Tensor:
        file, own = self._places[name]
        return file.read(own)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def is_weights(path: Path) -> bool:
    """Whether a file of a model folder holds weights, or is the table of where they lie, by its name."""
    name = path.name.removesuffix(".index.json").lower()
    return name.endswith((".safetensors", *_OTHER_WEIGHTS))


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files with one model's weights, the shards of a table included."""
    middle = f".{variant}" if variant else ""
    for stem in _WEIGHTS:
        whole = folder / f"{stem}{middle}.safetensors"
        if whole.is_file():
            return [whole]
        for table in (folder / f"{stem}.safetensors.index{middle}.json", folder / f"{whole.name}.index.json"):
            if table.is_file():
                return _shards(folder, table)
    others = sorted(file.name for file in folder.glob("*") if file.is_file() and is_weights(file))
    if any(name.endswith(_OTHER_WEIGHTS) for name in others) and not any(".safetensors" in name for name in others):
        raise ModelNotFoundError(
            f"{folder} has its weights as {others[0]}, which only running its author's code can open: "
            "save the model again with safe_serialization=True, which writes .safetensors"
        )
    there = f"there is {', '.join(others[:3])}; name its variant if it has one (fp16, say)" if others else "it is empty"
    raise ModelNotFoundError(f"{folder} has no {_WEIGHTS[0]}{middle}.safetensors nor {_WEIGHTS[1]}{middle}.safetensors"
                             f" ({there})")  # fmt: skip


def _shards(folder: Path, table: Path) -> list[Path]:
    places = _json(table).get("weight_map")
    names = sorted(set(places.values())) if isinstance(places, dict) and all(map(_is_text, places.values())) else []
    if not names or any(Path(name).name != name for name in names):
        raise ModelNotFoundError(f"{table} is damaged: it does not name files of its own folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelNotFoundError(f"{folder} is incomplete: {missing[0]!a} is missing")
    return [folder / name for name in names]


def _parts(folder: Path) -> dict[str, tuple[str, str]]:
    """{component: (library, class)} of what may carry adapters in a pipeline."""
    index = _json(folder / INDEX)
    found = {}
    for name in PIPELINE_COMPONENTS:
        entry = index.get(name)
        if isinstance(entry, list) and len(entry) == 2 and all(map(_is_text, entry)):
            found[name] = (entry[0], entry[1])
    if not found:
        raise ModelNotFoundError(f"{folder / INDEX} names no {', '.join(PIPELINE_COMPONENTS[:3])}: nothing to adapt")
    return found


def _build(folder: Path, library: str | None = None, name: str | None = None) -> nn.Module:
    """The model of a folder on the meta device: its modules and shapes, without values."""
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{folder} is no model folder: it has neither {INDEX} nor config.json")
    config = _json(folder / "config.json")
    if library is None:
        names = config.get("architectures")
        listed = names[0] if isinstance(names, list) and names else None
        library, name = ("diffusers", config["_class_name"]) if "_class_name" in config else ("transformers", listed)
    kind = _class(folder, library, name)
    try:
        with torch.device("meta"):
            if library == "diffusers":
                return kind.from_config(config).eval().requires_grad_(False)
            return kind(kind.config_class.from_pretrained(folder)).eval().requires_grad_(False)
    except LoraDiffusionError:
        raise
    except Exception as problem:  # the libraries raise whatever a config makes them stumble over
        what = " ".join(str(problem).split())[:200]
        raise ModelNotFoundError(f"{folder / 'config.json'} does not describe a {name}: {what}") from problem


def _class(folder: Path, library: str, name: Any) -> Any:
    """A model class that the library itself has; a folder's own code is not run."""
    if library == "diffusers":
        import diffusers as package
        from diffusers import ModelMixin as parent
    elif library == "transformers":
        import transformers as package
        from transformers import PreTrainedModel as parent
    else:
        raise ModelNotFoundError(f"{folder} is a model of {library!a}; those of diffusers and transformers are known")
    kind = getattr(package, name, None) if _is_text(name) and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, parent)):
        raise ModelNotFoundError(f"{folder} is a {str(name)[:80]!a}, which the installed {library} does not know")
    return kind


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelNotFoundError(f"{path} cannot be read: {' '.join(str(problem).split())[:200]}") from None
    if not isinstance(value, dict):
        raise ModelNotFoundError(f"{path} is damaged: it holds no table")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
