"""The cheapest change of settings that makes a run fit: cheapest in what it costs the result and the time."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from train.dreambooth_config import DreamBoothConfig, optimizer_name
from train.plan import RunPlan
from train.plan_models import Blueprint

_RESOLUTION_STEP = 64
_RANK = 4


@dataclass(frozen=True)
class Change:
    """Settings to change together, and what it is in words."""

    what: str
    settings: dict[str, Any]

    def flags(self) -> str:
        words = []
        for name, value in self.settings.items():
            words.append(f"--{'' if value else 'no_'}{name}" if isinstance(value, bool) else f"--{name} {value}")
        return " ".join(words)


@dataclass(frozen=True)
class Advice:
    """What to change, and the plan with it; no changes where nothing helps, and then the smallest plan there is."""

    changes: tuple[Change, ...]
    plan: RunPlan
    fits: bool


def advise(
    config: DreamBoothConfig, model: Blueprint, plan_for: Callable[[DreamBoothConfig], RunPlan], room: int
) -> Advice | None:
    """The first single change that makes a run fit; else the changes up to the one that does, less those that can be
    taken back again. None if it fits as it is.

    Args:
        config: resolved.
        plan_for: the plan of such a config.
        room: bytes that there are.
    """
    known: dict[DreamBoothConfig, RunPlan] = {}

    def plan(changes: Sequence[Change]) -> RunPlan:
        one = _with(config, changes)
        if one not in known:
            known[one] = plan_for(one)
        return known[one]

    def fits(changes: Sequence[Change]) -> bool:
        return plan(changes).needed <= room

    if fits([]):
        return None
    options = list(_options(config, model))
    if not fits(options):
        return Advice(_final(options), plan(options), False)
    for option in options:
        if fits([option]):
            return Advice((option,), plan([option]), True)
    # Each change takes less memory than what was before, so the first that is enough can be searched for.
    count = 1 + bisect.bisect_left(range(1, len(options)), True, key=lambda length: fits(options[:length]))
    taken = list(_final(options[:count]))
    for one in list(taken):
        without = [other for other in taken if other is not one]
        if without and fits(without):
            taken = without
    return Advice(tuple(taken), plan(taken), True)


def _final(changes: Sequence[Change]) -> tuple[Change, ...]:
    """Without those that a later one takes the place of."""
    later: set[str] = set()
    kept = []
    for change in reversed(changes):
        if not later.intersection(change.settings):
            kept.append(change)
        later.update(change.settings)
    return tuple(reversed(kept))


def _options(config: DreamBoothConfig, model: Blueprint) -> Iterator[Change]:
    """What can be changed, the least costly first."""
    if not config.gradient_checkpointing:
        yield Change("recompute activations: the same result, about 30 % slower", {"gradient_checkpointing": True})
    if config.train_batch_size > 1:
        count = config.train_batch_size * config.gradient_accumulation_steps
        yield Change(
            "smaller batches, as many accumulated: the same result, slower",
            {"train_batch_size": 1, "gradient_accumulation_steps": count},
        )
    if config.validation_prompt is not None and config.num_validation_images > 1:
        yield Change("one picture per preview", {"num_validation_images": 1})
    if config.with_prior_preservation and config.prior_mode == "pictures" and config.sample_batch_size > 1:
        yield Change("class pictures drawn one by one", {"sample_batch_size": 1})
    if config.mixed_precision == "no":
        yield Change("the frozen base in half precision", {"mixed_precision": "fp16"})
    if config.train_text_encoder:
        yield Change("an adapter for the denoiser alone", {"train_text_encoder": False})
    side = config.resolution or model.native
    for part in (3, 2):
        smaller = side * part // 4 // _RESOLUTION_STEP * _RESOLUTION_STEP
        if smaller >= 4 * _RESOLUTION_STEP and config.aspect_ratio_buckets is None:
            yield Change("smaller pictures", {"resolution": smaller})
    if config.rank > _RANK:
        yield Change("a smaller adapter", {"rank": _RANK})
    if optimizer_name(config) in ("adamw", "prodigy", "schedule-free-adamw"):
        yield Change("an optimizer with a smaller state", {"optimizer": "adamw8bit"})
    if config.quantize is None:
        yield Change("the frozen base in 8 bits", {"quantize": "int8"})
    if config.quantize != "nf4":
        yield Change("the frozen base in 4 bits, its convolutions in 8", {"quantize": "nf4"})


def _with(config: DreamBoothConfig, changes: Sequence[Change]) -> DreamBoothConfig:
    settings = {name: value for change in changes for name, value in change.settings.items()}
    if settings.get("rank") is not None and config.lora_alpha == float(config.rank):
        settings["lora_alpha"] = float(settings["rank"])
    names = {field.name for field in fields(config)}
    return replace(config, **{name: value for name, value in settings.items() if name in names})
