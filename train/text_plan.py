"""How much memory a text run will take, before anything of it is allocated.

    lora-diffusion plan text --model bloomz-7b1 --task causal-lm --quantize nf4 --max_length 512 --gpu rtx3070

The phases of the run are gone through with fake tensors (`train.text_plan_phases`); the largest of them is what the run
takes. A run does the same when it starts, with its own loss and its own longest rows, and compares in its last event.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from lora_diffusion.errors import ConfigError
from lora_diffusion.planning.workspace import CUBLAS, CUBLAS_HOPPER
from train.memory import MemoryMeter
from train.models import PRECISIONS
from train.plan import GROWTH, PROCESS, RunPlan
from train.plan_cards import CONTEXT, Card
from train.text_config import TextConfig, methods_of
from train.text_learn import head_modules
from train.text_methods import EXISTING, configs_of
from train.text_models import new_modules
from train.text_plan_batches import example_batch, loss_of
from train.text_plan_phases import Batch, Loss, TextJob, phases_of_text
from train.text_task_names import TASK_TYPES

Config = TypeVar("Config", bound=TextConfig)

DEFAULT_LENGTH = 512
_CLOZE_ANSWER = 1


def resolved_text(config: Config, model: Any, *, device: str, card: Card | None = None) -> Config:
    """The config with the precision and the length of rows that the run would choose on that device or card.

    Raises:
        ConfigError: rows longer than the model takes.
    """
    precision, limit = config.mixed_precision, _limit(model)
    if precision == "auto":
        precision = "no" if device == "cpu" else "bf16" if card is None or card.bf16 else "fp16"
    if limit is not None and (config.max_length or 0) > limit:
        raise ConfigError(f"--max_length {config.max_length} is more than the model takes, {limit}")
    length = config.max_length or min(limit or DEFAULT_LENGTH, DEFAULT_LENGTH)
    return replace(config, mixed_precision=precision, max_length=length)


def plan_text(
    config: TextConfig,
    model: nn.Module,
    *,
    device: str = "cuda",
    card: Card | None = None,
    answer_length: int | None = None,
    processes: int = 1,
) -> RunPlan:
    """The plan of a run with this config, without its data: rows are as long as they may be.

    Args:
        config: as `resolved_text` gives it.
        model: see `train.text_plan_models.text_model`.
        card: the card it is for, where it is known.
        answer_length: tokens of a row that the loss counts (default: all of a causal model's, the decoder's longest
            row, the one word of a cloze).
        processes: of a run with `--fsdp`.
    """
    job = text_job(config, model, answer_length=answer_length, processes=processes)
    cublas = CUBLAS_HOPPER if card is not None and card.hopper else CUBLAS
    phases = phases_of_text(model, job, device=device, cublas=cublas)
    return RunPlan(tuple(phases), device, CONTEXT if device == "cuda" else PROCESS)


def text_job(config: TextConfig, model: nn.Module, *, answer_length: int | None = None, processes: int = 1) -> TextJob:
    """What such a run does with the model: see `plan_text`."""
    heads = head_modules(config, new_modules(model, []))
    drawn = replace(config, init_lora_weights="kaiming", prompt_init="RANDOM", prompt_init_text=None)
    length, answer = config.max_length or 1, answer_length or _answer(config)
    rows, judged = config.train_batch_size, config.validation_batch_size or config.train_batch_size
    validated = config.validation_file is not None or config.validation_split is not None
    return _job(
        config,
        partial(loss_of, config.task),
        example_batch(config.task, rows, length, answer),
        example_batch(config.task, judged, length, answer) if validated else None,
        configs_of(drawn, TASK_TYPES[config.task], heads),
        processes,
    )


def plan_of_text_run(
    config: TextConfig,
    model: nn.Module,
    device: torch.device,
    meter: MemoryMeter,
    *,
    loss: Loss,
    batch: Batch,
    validation: Batch | None = None,
) -> RunPlan:
    """The plan of a run whose model is loaded and has its adapter.

    Args:
        meter: on the CPU it says what the process takes as it is, base weights included; the plan goes on from there.
        loss: the run's own, (model, batch) → scalar.
        batch, validation: the largest ones, see `longest`.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    kind = "cuda" if device.type == "cuda" else "cpu"
    job = _job(config, loss, batch, validation, None, 1)
    phases = phases_of_text(model, job, device=kind, cublas=CUBLAS_HOPPER if hopper else CUBLAS)
    aside = CONTEXT if kind == "cuda" else max(0, meter.now() - phases[0].plan.peak) + GROWTH
    return RunPlan(tuple(phases), kind, aside, meter.peak())


def longest(examples: Sequence[Any], count: int) -> list[Any]:
    """The `count` longest examples or packs: the largest batch that there can be."""
    return sorted(examples, key=lambda one: (one.length, one.counted), reverse=True)[:count]


def _job(
    config: TextConfig, loss: Loss, batch: Batch, validation: Batch | None, configs: Any, processes: int
) -> TextJob:
    half = PRECISIONS[config.mixed_precision]
    own = any(method in EXISTING for method in methods_of(config))  # learned in fp32, so loaded in it
    return TextJob(
        loss=loss,
        batch=batch,
        validation=validation,
        configs=configs,
        precision=torch.float32 if own else half,
        autocast=None if half == torch.float32 else half,
        quantize=config.quantize,
        optimizer=config.optimizer,
        gradient_checkpointing=config.gradient_checkpointing,
        copies=2 if config.use_ema else 1,
        accumulates=config.gradient_accumulation_steps > 1,
        processes=processes if config.fsdp else 0,
        offload=config.fsdp_cpu_offload,
    )


def _limit(model: Any) -> int | None:
    """Tokens that the model takes in a row; None for T5, whose positions are relative. RoBERTa's begin after the number
    of its padding."""
    config = model.config
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not positions or config.model_type in ("t5", "mt5", "umt5"):
        return None
    first = (config.pad_token_id or 0) + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return int(positions) - first


def _answer(config: TextConfig) -> int:
    length = config.max_length or 1
    if config.task == "causal-lm":
        return length - 1
    return (config.max_answer_length or length) if config.task == "seq2seq-lm" else _CLOZE_ANSWER
