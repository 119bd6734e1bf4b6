"""What would make a text run fit: settings to change, those first that cost the least in time and in the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from train.plan import RunPlan
from train.plan_advice import Advice, Change
from train.text_config import TextConfig, methods_of
from train.text_methods import EXISTING

Config = TypeVar("Config", bound=TextConfig)
_RANK = 4
_SHORT = 64


def advise_text(config: Config, plan_for: Callable[[Config], RunPlan], room: int) -> Advice | None:
    """The first single change that makes a run fit; else the first changes that do together, less those that can be
    taken back again; else those that come nearest. None if it fits as it is.

    Args:
        config: resolved, see `train.text_plan`.
        room: bytes that there are.
    """

    known: dict[Config, RunPlan] = {}

    def plan(changes: Sequence[Change]) -> RunPlan:
        one = _with(config, changes)
        if one not in known:
            known[one] = plan_for(one)
        return known[one]

    if plan([]).needed <= room:
        return None
    options = list(_options(config))
    ends = [_final([one for one in options if "fsdp" not in one.settings]), _final(options)]
    smallest = min((end for end in ends if end), key=lambda end: plan(end).needed, default=())
    if not smallest or plan(smallest).needed > room:
        return Advice(tuple(smallest), plan(smallest), False)
    for option in options:
        if (made := plan([option])).needed <= room:
            return Advice((option,), made, True)
    count = next((n for n in range(2, len(options)) if plan(_final(options[:n])).needed <= room), None)
    taken = list(smallest if count is None else _final(options[:count]))
    for one in reversed(list(taken)):
        without = [other for other in taken if other is not one]
        if without and plan(without).needed <= room:
            taken = without
    return Advice(tuple(taken), plan(taken), True)


def _final(changes: Sequence[Change]) -> list[Change]:
    """Without those that a later one takes the place of. A base in main memory is not quantised."""
    kept: list[Change] = []
    for change in changes:
        names = {*change.settings, *(("quantize",) if "fsdp" in change.settings else ())}
        kept = [*(one for one in kept if not names & set(one.settings)), change]
    return kept


def _options(config: TextConfig) -> Iterator[Change]:
    """What can be changed, the least costly first."""
    if not config.gradient_checkpointing:
        yield Change("recompute activations: the same result, about 30 % slower", {"gradient_checkpointing": True})
    if config.train_batch_size > 1:
        count = config.train_batch_size * config.gradient_accumulation_steps
        smaller: dict[str, Any] = {"train_batch_size": 1, "gradient_accumulation_steps": count}
        if config.validation_batch_size is not None:
            smaller["validation_batch_size"] = 1
        yield Change("smaller batches, as many accumulated: the same result, slower", smaller)
    if config.mixed_precision == "no":
        yield Change("the frozen base in half precision", {"mixed_precision": "bf16"})
    if config.optimizer in ("adamw", "prodigy", "schedule-free-adamw"):
        yield Change("an optimizer with a smaller state", {"optimizer": "adamw8bit"})
    if config.max_length is not None and config.max_length > _SHORT:
        yield Change("shorter rows, longer ones cut", {"max_length": config.max_length // 2, "too_long": "truncate"})
    learns_base = any(method in EXISTING for method in methods_of(config))
    if "lora" in methods_of(config) and config.rank > _RANK:
        yield Change("a smaller adapter", {"rank": _RANK})
    if learns_base:
        yield Change("an adapter in place of the base's own weights", {"method": "lora"})
    if config.quantize is None and not config.fsdp:
        yield Change("the frozen base in 8 bits", {"quantize": "int8"})
    if config.quantize != "nf4" and not config.fsdp:
        yield Change("the frozen base in 4 bits", {"quantize": "nf4"})
    if not config.fsdp and config.quantize is None and not learns_base:
        offload = {"fsdp": True, "fsdp_cpu_offload": True}
        yield Change("the base in main memory, a block on the card at a time: slow; start it with torchrun", offload)


def _with(config: Config, changes: Sequence[Change]) -> Config:
    settings = {name: value for change in changes for name, value in change.settings.items()}
    if settings.get("rank") is not None and config.lora_alpha == float(config.rank):
        settings["lora_alpha"] = float(settings["rank"])
    names = {one.name for one in fields(config)}
    return replace(config, **{name: value for name, value in settings.items() if name in names})
