"""Adapters into the weights of a model folder, shard by shard and tensor by tensor: the model is never in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from .adapter import Adapter
from .errors import AdapterMismatchError, ConfigError, LoraDiffusionError
from .fit import Layer, fitted
from .folder_match import check_complete, match_folder
from .layers import LoraFactors, attach, detach, layer_kind
from .merge_layer import MergeAccount, MergeReport, merged_weight
from .pipeline_folder import ComponentFolder, ModelFolder, is_weights
from .weight_file import WeightFile

OnProgress = Callable[[str, int, int], None]


@dataclass
class FolderMerge:
    """What `merge_folder` did. merged: the figures of `merge_adapters`. left_out: files that were not copied, because
    they hold the weights once more, unmerged. notes: what else to know."""

    output: str
    merged: MergeReport
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Planned:
    """One weight to rewrite: its module and the layers to add, {adapter: (layer, weight)}."""

    component: str
    path: str
    module: nn.Module
    layers: dict[str, tuple[Layer, float]] = field(default_factory=dict)


@torch.no_grad()
def merge_folder(
    folder: ModelFolder,
    adapters: Mapping[str, tuple[Adapter, float]],
    output: str | os.PathLike[str],
    on_progress: OnProgress | None = None,
) -> FolderMerge:
    """Write a copy of the folder whose weights are W + Σ weight · ΔW, each computed in fp32 and rounded once to the
    dtype of the file: bit for bit what `merge_adapters` makes of the loaded model (with DoRA up to the last bit of its
    norms in fp32, which depends on how a weight lies in memory).

    adapters: {name: (adapter, weight)}. on_progress: told (name of the weight, done, total).
    The output appears whole or not at all. Everything that is no weight of an adaptable model is copied as it is.
    Raises ConfigError for an output that exists or lies in the folder, AdapterMismatchError for an adapter that does
    not fit or cannot be merged, LoraDiffusionError where the output cannot be written (the disk is full, say).
    """
    target = _checked_output(folder, Path(output))
    plan, notes = _plan(folder, adapters)
    total = sum(map(len, plan.values()))
    accounts: dict[str, MergeAccount] = {}
    done = 0

    def merged_into(jobs: Mapping[str, _Planned], name: str, base: torch.Tensor) -> torch.Tensor:
        nonlocal done
        planned = jobs[name]
        result = _merged(planned, base, accounts.setdefault(planned.component, MergeAccount()))
        done += 1
        if on_progress is not None:
            on_progress(f"{planned.component}.{planned.path}", done, total)
        return result

    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
        left_out = _copy_rest(folder, temporary)
        for part in folder.components.values():
            place = temporary / part.path.relative_to(folder.path)
            for file in part.files:
                jobs = plan.get(file.path, {})
                file.rewrite(place / file.path.name, jobs, partial(merged_into, jobs))
        temporary.chmod(0o777 & ~_umask())
        temporary.replace(target)
    except OSError as problem:
        raise LoraDiffusionError(f"{target} could not be written: {problem.strerror or problem}") from problem
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return FolderMerge(str(target), _report(adapters, plan, accounts), left_out, [*folder.notes(), *notes])


def _plan(
    folder: ModelFolder, adapters: Mapping[str, tuple[Adapter, float]]
) -> tuple[dict[Path, dict[str, _Planned]], list[str]]:
    """{file: {tensor in the file: what to add}}, all checks done."""
    plan: dict[Path, dict[str, _Planned]] = {}
    notes: list[str] = []
    for name, (adapter, weight) in adapters.items():
        copied = next((f"{c}.{path}" for c, modules in adapter.copies.items() for path in modules), None)
        if copied is not None:
            raise AdapterMismatchError(f"{name} brings a whole module of its own for {copied}, which cannot be merged")
        if adapter.prompts:
            raise AdapterMismatchError(f"{name} holds virtual tokens, which cannot be merged")
        report, matched = match_folder(adapter, folder)
        check_complete(name, report, folder)
        notes += [f"{name}: {note}" for note in adapter.notes]
        notes += [f"{name}: the word {word!a} is no part of the merged model" for word in adapter.tokens]
        for component, layers in matched.items():
            part = folder.components[component]
            for path, (module, layer) in layers.items():
                file, tensor = _place(part, path)
                planned = plan.setdefault(file.path, {}).setdefault(tensor, _Planned(component, path, module))
                planned.layers[name] = (layer, weight)
    return plan, notes


def _place(part: ComponentFolder, path: str) -> tuple[WeightFile, str]:
    name, where = f"{path}.weight", f"{part.component}.{path}"
    if name not in part.places:
        raise AdapterMismatchError(f"{where} has no weight in {part.path}")
    tied = next((other for names in part.ties() if name in names for other in names if other != name), None)
    if tied is not None:
        raise AdapterMismatchError(
            f"{where} shares its weight with {tied}: in a folder the adapter would change both; load it unmerged"
        )
    file, tensor = part.places[name]
    if not file.tensors[tensor].is_float:
        dtype = file.tensors[tensor].dtype
        raise AdapterMismatchError(f"{where} is stored as {dtype}, which nothing can be added to: save the base as a "
                                   "floating dtype")  # fmt: skip
    return file, tensor


def _merged(planned: _Planned, base: torch.Tensor, account: MergeAccount) -> torch.Tensor:
    """The merged weight as the file stores it."""
    module = planned.module
    kind = layer_kind(module)
    assert kind is not None, "match_folder() has asked"
    parts = {name: _factors(module, layer) for name, (layer, _) in planned.layers.items()}
    attach(module, kind)
    try:
        for name, part in parts.items():
            module.add_part(name, part)
        weights = {name: weight for name, (_, weight) in planned.layers.items()}
        return merged_weight(planned.component, planned.path, module, base, weights, account)[0]
    finally:
        for name in list(module.part_names()):
            module.remove_part(name)
        detach(module)


def _factors(module: nn.Module, layer: Layer) -> LoraFactors:
    low_rank, _ = fitted(module, layer)
    magnitude = None if low_rank.magnitude is None else low_rank.magnitude.float()
    return LoraFactors(low_rank.a.float(), low_rank.b.float(), low_rank.scale, magnitude=magnitude)


def _report(
    adapters: Mapping[str, tuple[Adapter, float]],
    plan: Mapping[Path, Mapping[str, _Planned]],
    accounts: Mapping[str, MergeAccount],
) -> MergeReport:
    report = MergeReport()
    names: dict[str, set[str]] = {}
    for planned in (planned for jobs in plan.values() for planned in jobs.values()):
        names.setdefault(planned.component, set()).update(planned.layers)
    for component, account in accounts.items():
        report.adapters[component] = {n: weight for n, (_, weight) in adapters.items() if n in names[component]}
        account.write(report, component)
    return report


def _checked_output(folder: ModelFolder, output: Path) -> Path:
    target, source = output.expanduser().resolve(), folder.path.expanduser().resolve()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigError(f"{output} exists already and is not empty: give the name of a new folder")
    if target == source or source in target.parents:
        raise ConfigError(f"{output} lies in the model folder {folder.path}: give a place beside it")
    return target


def _copy_rest(folder: ModelFolder, target: Path) -> list[str]:
    """Copy everything but weights of the models that are rewritten; returns what was left out, with its path."""
    rewritten = {part.path for part in folder.components.values()}
    read = {file.path for part in folder.components.values() for file in part.files}
    left_out: list[str] = []
    for root, folders, files in os.walk(folder.path, followlinks=True):
        here = Path(root)
        folders[:] = [name for name in folders if not name.startswith(".")]
        place = target / here.relative_to(folder.path)
        place.mkdir(parents=True, exist_ok=True)
        whole = here in rewritten or here == folder.path  # a single-file checkpoint beside the pipeline's folders
        for file in (here / name for name in files if not name.startswith(".")):
            if whole and is_weights(file) and not _is_table(file, read):
                if file not in read:
                    left_out.append(str(file.relative_to(folder.path)))
            else:
                shutil.copyfile(file, place / file.name)
    return sorted(left_out)


def _is_table(file: Path, read: set[Path]) -> bool:
    """Whether this is the table of shards that were read."""
    return file.name.endswith(".json") and any(
        one.parent == file.parent and one.name.startswith(file.name.partition(".")[0] + "-") for one in read
    )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
