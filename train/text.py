"""Adapting a language model: rows of text in, an adapter of a few MB out.

    lora-diffusion text --model pocket-bert --task sequence-classification --train_file train.jsonl \\
        --validation_file validation.jsonl --method lora --output_dir runs/sentiment

The same from Python:

    from train.text import train
    from train.text_config import TextConfig

    result = train(TextConfig("pocket-bert", "sequence-classification", train_file="train.jsonl"))
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from train.config import to_dict
from train.distributed import World, joined
from train.memory import MemoryMeter
from train.models import PRECISIONS, resolve_device, resolve_precision
from train.quantise import check_quantize
from train.record import OnEvent, RunFolder
from train.running import told
from train.saving import check_same_run, deciding
from train.shards import check_sharding
from train.text_checks import validate
from train.text_config import DEFAULT_EPOCHS, TextConfig, learning_rate_of, methods_of
from train.text_learn import add_adapter, check_virtual_ids, head_modules
from train.text_methods import EXISTING
from train.text_models import check_task, load_config, load_text_model, load_tokenizer
from train.text_parts import TextParts, read_parts
from train.text_run import Result, TextRun
from train.text_save import TextSaver
from train.text_tasks import TASKS
from train.trackers import Trackers, check_trackers

__all__ = ["Result", "TextConfig", "resolve", "train"]


def train(
    config: TextConfig,
    *,
    on_event: OnEvent | None = None,
    should_stop: Callable[[], bool] | None = None,
    wishes: Callable[[], set[str]] | None = None,
) -> Result:
    """Run a text training from settings to files.

    Args:
        config: see `TextConfig`. `resume_from_checkpoint=None` with `overwrite=True` always starts afresh.
        on_event: told of every event of `train.record`, as a dict.
        should_stop: asked after every step; True saves a checkpoint and the adapter, then returns.
        wishes: asked after every step: "sample" in its answer validates now, "save" makes a checkpoint now.

    Raises:
        ConfigError, DatasetError, ModelNotFoundError: before anything is written.
        TrainingError: the loss diverged, memory ran out, or a file could not be written; what was learned up to the
            last checkpoint is kept.
    """
    started = time.perf_counter()
    validate(config)
    device = resolve_device(config.device)
    if config.quantize is not None:
        check_quantize(config.quantize, device)
    if config.fsdp:
        check_sharding()
    with joined(device, even_alone=config.fsdp) as world:
        return _train(config, device, world, on_event, should_stop or (lambda: False), wishes, started)


def _train(
    config: TextConfig,
    device: torch.device,
    world: World,
    on_event: OnEvent | None,
    should_stop: Callable[[], bool],
    wishes: Callable[[], set[str]] | None,
    started: float,
) -> Result:
    trackers = check_trackers(config.report_to)
    folder = RunFolder(config.output_dir, on_event, writes=world.main)
    folder.check_usable(resuming=config.resume_from_checkpoint is not None, overwrite=config.overwrite)
    config = replace(config, mixed_precision=resolve_precision(config.mixed_precision, device))
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    meter = MemoryMeter(device)
    task_type, task_class = TASKS[config.task]
    name = config.pretrained_model_name_or_path
    architecture = load_config(name, config.revision)
    check_task(task_class.model_class, architecture, config.task)
    parts = read_parts(config, load_tokenizer(name, config.revision), architecture)
    config = resolve(config, parts, world.size)
    own = any(method in EXISTING for method in methods_of(config))
    model, new = load_text_model(
        name, task_class.model_class, parts.task.model_settings(), seed=config.seed, device=device,
        precision=torch.float32 if own else PRECISIONS[config.mixed_precision], revision=config.revision,
        quantize=config.quantize, attention=config.attn_implementation,
    )  # fmt: skip
    saver = TextSaver(folder, config, model, parts.task, world)
    checkpoint = saver.find_checkpoint()
    if checkpoint is not None:
        check_same_run(checkpoint, config, world.size, saver.units)
    saver.check_data(checkpoint, parts.train.fingerprint)
    add_adapter(config, model, task_type, head_modules(config, new))
    check_virtual_ids(model, parts.virtual_ids)
    resumed = {"the checkpoint": checkpoint and checkpoint.name, "PyTorch's version": str(torch.__version__)}
    world.agree({**{f"--{name}": value for name, value in deciding(config).items()}, "--fsdp": config.fsdp, **resumed})
    folder.open(to_dict(config), fresh=checkpoint is None, overwrite=config.overwrite)
    world.wait()  # what an earlier run left is gone
    run = TextRun(config, model, new, parts, folder, saver, device, meter, should_stop, world)
    run.wishes = wishes
    with told(folder, lambda: _out_of_memory(config, parts)):
        tracking = Trackers(trackers if world.main else [], folder.path / config.logging_dir, to_dict(config))
        try:
            return run.go(checkpoint, tracking, started)
        finally:
            tracking.finish()


def resolve(config: TextConfig, parts: TextParts, processes: int = 1) -> TextConfig:
    """The config with every default filled in from the rows."""
    batch = config.train_batch_size * config.gradient_accumulation_steps * processes
    steps_per_epoch = -(-len(parts.packs or parts.train.examples) // batch)
    steps = config.max_train_steps
    if steps is None:
        steps = (config.num_train_epochs or DEFAULT_EPOCHS) * steps_per_epoch
    first = methods_of(config)[0]
    return replace(
        config,
        max_train_steps=steps,
        learning_rate=learning_rate_of(config, first),
        lora_alpha=float(config.rank)
        if config.lora_alpha is None and "lora" in methods_of(config)
        else config.lora_alpha,
        validation_steps=config.validation_steps or min(steps_per_epoch, steps),
    )


def _out_of_memory(config: TextConfig, parts: TextParts) -> str:
    advice = [] if config.gradient_checkpointing else ["--gradient_checkpointing"]
    if config.train_batch_size > 1:
        advice.append("a smaller --train_batch_size with more --gradient_accumulation_steps")
    if config.quantize is None and not any(method in EXISTING for method in methods_of(config)):
        advice.append("--quantize nf4")
    advice.append(f"a smaller --max_length (the longest row has {parts.train.longest} tokens)")
    return (
        f"out of memory at batch {config.train_batch_size}, {config.mixed_precision}; try {', '.join(advice)}; go on "
        "with --resume_from_checkpoint latest"
    )
