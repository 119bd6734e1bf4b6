"""A low-rank adapter out of two models: what fine-tuning changed, as far as a given rank can hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..components import canonical_path, choose_components, components_of
from ..errors import AdapterMismatchError
from ..pipeline_folder import ModelFolder
from ..switch import active_adapters
from ..targets import matches, nearest_words, weighted_modules
from .checks import check_dtype, check_rank, check_share
from .dense import fit_dense
from .derived import Derived, Fit, derived
from .difference import brought_modules, differ, difference, own_tensors, why_not


def extract(
    base: Any,
    tuned: Any,
    r: int,
    *,
    components: Iterable[str] | None = None,
    target_modules: str | Iterable[str] = "all",
    energy: float | None = None,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, Any] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Derived:
    """The adapter of at most rank `r` that is nearest to tuned − base, layer by layer (truncated SVD, in fp32).

    base, tuned: nn.Modules, pipelines or `ModelFolder`s of the same architecture; neither is changed. Of folders no
        more than one tensor each is in memory.
    components: of a pipeline; by default all that both have and that can carry adapters.
    target_modules: "all" Linear, Conv2d and Conv1D (transformers') layers, or as in LoraConfig.
    energy: give each layer the smallest rank up to `r` that keeps this share of its squared singular values.
    dtype: of the factors, which are on the CPU.
    on_progress: told (name of a tensor that was compared, done, total).

    Layers that are the same in both are left out. What differs and cannot be in the adapter (biases, norms, embeddings,
    layers that are not targeted) is in the result's `skipped`, with the reason.
    Raises AdapterMismatchError if architectures differ or nothing can be extracted, ConfigError for settings.
    """
    check_rank("r", r)
    check_dtype(dtype)
    if energy is not None:
        check_share("energy", energy)
    pairs, skipped = _pairs(base, tuned, components)
    tensors = {name: (_tensors(base, name, old), _tensors(tuned, name, new)) for name, (old, new) in pairs.items()}
    fits: dict[str, dict[str, Fit]] = {}
    targets = {component: _targets(component, *modules, target_modules) for component, modules in pairs.items()}
    if not any(targets.values()):
        available = [path for _, tuned_module in pairs.values() for path in weighted_modules(tuned_module)]
        raise AdapterMismatchError(
            f"target_modules={target_modules!r} matches no module; {nearest_words(target_modules, available)}"
        )
    said = _counted(on_progress, sum(len({*old, *new}) for old, new in tensors.values()))
    for component, (_, after) in pairs.items():
        fits[component], left = _compared(
            component, after, *tensors[component], targets[component], r, energy, dtype, said
        )
        skipped |= left
    if not any(fits.values()):
        first = next(iter(skipped.items()), None)
        why = f"{first[0]} is left out: {first[1]}" if first else "base and tuned have the same weights"
        raise AdapterMismatchError(f"there is nothing to extract in {', '.join(pairs)}: {why}")
    how = {"extracted": {"r": r} if energy is None else {"r": r, "energy": energy}}
    notes = [*_notes("base", base), *_notes("tuned", tuned), *_dtype_notes(tensors)]
    return derived(fits, {**how, **(metadata or {})}, notes=notes, skipped=skipped)


def _pairs(
    base: Any, tuned: Any, names: Iterable[str] | None
) -> tuple[dict[str, tuple[nn.Module, nn.Module]], dict[str, str]]:
    """{component: (module in base, module in tuned)}, and what only one of them has."""
    skipped: dict[str, str] = {}
    base, tuned = (target.skeleton if isinstance(target, ModelFolder) else target for target in (base, tuned))
    if names is None:
        there, here = components_of(base), components_of(tuned)
        names = [name for name in there if name in here]
        for name in sorted((there.keys() | here.keys()) - set(names)):
            skipped[name] = f"only {'base' if name in there else 'tuned'} has it"
        if not names:
            raise AdapterMismatchError(
                f"base and tuned have no component in common: base has {', '.join(there)}, tuned {', '.join(here)}"
            )
    names = [names] if isinstance(names, str) else list(names)
    before, after = choose_components(base, names), choose_components(tuned, names)
    return {name: (before[name], after[name]) for name in names}, skipped


def _targets(component: str, before: nn.Module, after: nn.Module, names: Any) -> set[str]:
    """The paths of targeted modules. Raises AdapterMismatchError for modules that only one has, or of other shapes."""
    brought = brought_modules(before) | brought_modules(after)
    old, new = (
        {path: module for path, module in weighted_modules(model).items() if id(module) not in brought}
        for model in (before, after)
    )
    lone = next((path for path in [*old, *new] if path not in old or path not in new), None)
    if lone is not None:
        which = "base" if lone in old else "tuned"
        raise AdapterMismatchError(f"{component}.{lone} is in {which} only: the architectures differ")
    for path in old:
        shapes = tuple(old[path].weight.shape), tuple(new[path].weight.shape)
        if shapes[0] != shapes[1]:
            raise AdapterMismatchError(f"{component}.{path} is {shapes[0]} in base and {shapes[1]} in tuned")
    if names == "all-linear":
        return {path for path, module in new.items() if not isinstance(module, nn.Conv2d)}
    return {path for path in new if names == "all" or matches(names, path)}


def _tensors(target: Any, component: str, module: nn.Module) -> Mapping[str, torch.Tensor]:
    return target.components[component].tensors() if isinstance(target, ModelFolder) else own_tensors(module)


def _compared(
    component: str,
    after: nn.Module,
    old: Mapping[str, torch.Tensor],
    new: Mapping[str, torch.Tensor],
    targets: set[str],
    r: int,
    energy: float | None,
    dtype: torch.dtype,
    said: Callable[[str], None],
) -> tuple[dict[str, Fit], dict[str, str]]:
    """The layers of one component, and why what else differs is not among them."""
    layers: dict[str, Fit] = {}
    skipped: dict[str, str] = {}
    seen: set[tuple[int, str]] = set()
    for name in dict.fromkeys([*old, *new]):
        where = f"{component}.{name}"
        said(where)
        if name not in old or name not in new:
            skipped[where] = f"only {'base' if name in old else 'tuned'} has it"
            continue
        first, second = old[name], new[name]
        if not differ(first, second, where):
            continue
        path, _, leaf = name.rpartition(".")
        module = after.get_submodule(path)
        if (id(module), leaf) in seen:  # a module that has two paths
            continue
        seen.add((id(module), leaf))
        reason = why_not(module, leaf, first, second, r)
        if reason is None and path not in targets:
            reason = "it is not among target_modules"
        if reason is not None:
            skipped[where] = reason
            continue
        form, delta = difference(module, first, second)
        if not torch.isfinite(delta).all():
            raise AdapterMismatchError(f"{where} holds NaN or infinity in base or in tuned")
        rank = form.per_group(r, where)
        layers[canonical_path(component, path)] = fit_dense(
            delta, form, rank, where, energy=energy, dtype=dtype, device="cpu"
        )
    return layers, skipped


def _counted(on_progress: Callable[[str, int, int], None] | None, total: int) -> Callable[[str], None]:
    done = 0

    def say(where: str) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(where, done, total)

    return say


def _notes(which: str, target: Any) -> list[str]:
    if isinstance(target, ModelFolder):
        return [f"{which}: {note}" for note in target.notes()]
    active = active_adapters(target)
    names = ", ".join(map(repr, active))
    return [f"{which} has active adapters ({names}) that are not merged: they are not counted"] if active else []


def _dtype_notes(tensors: Mapping[str, tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]]) -> list[str]:
    notes = []
    for component, pair in tensors.items():
        old, new = (next((side[name].dtype for name in side), None) for side in pair)
        if old != new:
            names = [str(dtype).removeprefix("torch.") for dtype in (old, new)]
            notes.append(f"{component} is {names[0]} in base and {names[1]} in tuned: the difference holds rounding")
    return notes
