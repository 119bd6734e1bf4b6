"""What a run will take, said before it starts: pictures or rows, steps, memory, minutes, and where the result goes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.web.job_checks import RECIPES, checked, named
from app.web.job_state import JobView
from app.web.libraries import load_libraries
from app.web.limits import Limits
from app.web.places import Workspace, free_name, suggested_name
from lora_diffusion.errors import LoraDiffusionError
from train.config import from_dict

LOADING = 15.0  # seconds until a model is loaded and a process computes
_BACKWARD = 2.5  # a training step in forward passes: one, and the gradients of the activations
_RECOMPUTED = 1.0  # further forward passes with gradient checkpointing
_GUIDED = 2.0  # passes of a denoising step with guidance
_SHARE = 0.25  # of a machine's speed at one large product that a whole model reaches
_LETTERS = 4.0  # of a token, as languages go
_lock = threading.Lock()  # plans trace models with fake tensors, one at a time


@dataclass(frozen=True)
class RunCheck:
    """What is known of a run before it starts.

    Attributes:
        what: "5 photos" or "1,000 rows".
        steps, rounds: optimizer steps; how often each photo or row is seen.
        peak, room: bytes that the run will take at its peak and that there are; None where it cannot be told.
        minutes: estimated; `basis` says from what.
        place: where the result goes.
        warnings: sentences.
    """

    what: str
    steps: int
    rounds: float
    place: str
    peak: int | None = None
    room: int | None = None
    device: str = "cpu"
    minutes: float | None = None
    basis: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.peak is None or self.room is None or self.peak <= self.room


def check_run(
    recipe: str, settings: dict[str, Any], name: str, workspace: Workspace, limits: Limits, past: Sequence[JobView] = ()
) -> RunCheck:
    """Check the settings as a submission does, and plan the run.

    Args:
        past: earlier runs, from which the time is estimated where they had the same model.

    Raises:
        ConfigError, DatasetError: the run would be refused.
    """
    values = checked(recipe, settings, workspace, limits)
    config = from_dict(named(RECIPES[recipe][0]), {**values, "output_dir": "run"})
    count, tokens = (_photos(config), 1.0) if recipe == "dreambooth" else _rows(config)
    steps = _steps(config, count)
    batch = config.train_batch_size * config.gradient_accumulation_steps
    place = workspace.runs / free_name(workspace.runs, suggested_name(name, recipe))
    warnings: list[str] = []
    peak = room = None
    device, load = "cpu", None
    try:
        with _lock:
            load_libraries()
            device, room = _device(config.device)
            peak, load = _planned(config, device)
            load = None if load is None else load * tokens
    except LoraDiffusionError as problem:
        warnings.append(f"the memory could not be planned: {problem}")
    minutes, basis = _minutes(config, recipe, steps, device, load, past)
    if peak is not None and room is not None and peak > room:
        warnings.append(
            "it will not fit: use a smaller batch, a smaller resolution, gradient checkpointing or a quantised base, "
            "under Advanced settings, Speed and memory"
        )
    noun = "photo" if recipe == "dreambooth" else "row"
    return RunCheck(
        f"{count:,} {noun}{'' if count == 1 else 's'}", steps, steps * batch / max(count, 1), str(place), peak, room,
        device, minutes, basis, warnings,
    )  # fmt: skip


def _photos(config: Any) -> int:
    from train.images import list_images

    return len(list_images(config.instance_data_dir))


def _rows(config: Any) -> tuple[int, float]:
    """How many rows there are, and about how many tokens each has."""
    if config.train_file is None:
        return config.max_train_samples or 0, float(config.max_length or 128)
    from train.text_bad_rows import BadRows
    from train.text_rows import read_rows

    columns = None if config.columns is None else [name.strip() for name in config.columns.split(",")]
    rows = read_rows(config.train_file, BadRows("skip"), separator=config.separator, columns=columns)
    letters = sum(len(str(value)) for row in rows for value in row.values())
    tokens = min(letters / len(rows) / _LETTERS + 4, float(config.max_length or 512))
    return min(len(rows), config.max_train_samples or len(rows)), tokens


def _steps(config: Any, count: int) -> int:
    if config.max_train_steps:
        return int(config.max_train_steps)
    batch = config.train_batch_size * config.gradient_accumulation_steps
    if config.num_train_epochs or hasattr(config, "task"):
        return max(1, -(-count // batch)) * (config.num_train_epochs or 3)
    return 500


def _device(asked: str) -> tuple[str, int]:
    """cuda or cpu, and the bytes that are free there."""
    import psutil
    import torch

    if asked in ("auto", "cuda") and torch.cuda.is_available():
        return "cuda", int(torch.cuda.mem_get_info()[0])
    return "cpu", int(psutil.virtual_memory().available)


@lru_cache(maxsize=64)
def _planned(config: Any, device: str) -> tuple[int, float | None]:
    """Peak in bytes, and the arithmetic of a forward pass for a picture or a token; plans are kept."""
    if hasattr(config, "task"):
        return _planned_text(config, device)
    from train.plan import plan_run, resolved
    from train.plan_models import blueprint

    model = blueprint(config.pretrained_model_name_or_path, config.revision)
    settings = resolved(config, model, device=device)
    plan = plan_run(settings, model, device=device)
    peak = plan.needed if device == "cuda" else plan.peak
    return peak, _arithmetic(model, settings.resolution or model.native)


def _planned_text(config: Any, device: str) -> tuple[int, float | None]:
    from train.text_plan import plan_text, resolved_text
    from train.text_plan_models import text_model

    labels = 1 if config.regression else max(2, len((config.labels or "1,2").split(",")))
    model = text_model(config.pretrained_model_name_or_path, config.task, labels=labels, revision=config.revision)
    settings = resolved_text(config, model, device=device)
    plan = plan_text(settings, model, device=device)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return plan.needed if device == "cuda" else plan.peak, 2.0 * weights  # for one token


def _arithmetic(model: Any, resolution: int) -> float | None:
    """Floating-point operations of the denoiser for one picture; None where its inputs are not plain ones."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    net = model.modules[model.family.denoiser]
    side = resolution // model.scale
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
            net(
                torch.empty(1, net.config.in_channels, side, side),
                0,
                torch.empty(1, 77, net.config.cross_attention_dim),
            )
    except Exception:  # SDXL and others ask for more; then the time is left open
        return None
    return float(counter.get_total_flops())


@lru_cache(maxsize=2)
def _speed(device: str) -> float:
    """Floating-point operations a second of one large product, measured."""
    import torch

    side, kind = (4096, torch.float16) if device == "cuda" else (768, torch.float32)
    square = torch.ones(side, side, device=device, dtype=kind)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        product = square @ square
        product[0, 0].item()
        best = max(best, 2.0 * side**3 / (time.perf_counter() - started))
    return best


def _minutes(
    config: Any, recipe: str, steps: int, device: str, load: float | None, past: Sequence[JobView]
) -> tuple[float | None, str]:
    each = _samples(config)
    for view in past:
        known = _seconds_per_sample(view, recipe, config)
        if known is not None:
            return (LOADING + steps * each * known) / 60, f"as long a step as in the run {view.id}"
    if load is None:
        return None, "known after the first steps"
    rate = _speed(device) * _SHARE
    passes = _BACKWARD + (_RECOMPUTED if config.gradient_checkpointing else 0.0)
    seconds = steps * each * passes * load / rate
    if getattr(config, "with_prior_preservation", False) and config.prior_mode == "pictures":
        seconds += config.num_class_images * config.prior_generation_steps * _GUIDED * load / rate
    return (LOADING + seconds) / 60, "a guess from the speed of this machine; the first steps will tell"


def _samples(config: Any) -> int:
    double = 2 if getattr(config, "with_prior_preservation", False) else 1
    return int(config.train_batch_size * config.gradient_accumulation_steps * double)


def _seconds_per_sample(view: JobView, recipe: str, config: Any) -> float | None:
    """What one sample of one step took in an earlier run, where it is comparable."""
    if view.recipe != recipe or any(
        view.settings.get(name) != (getattr(config, name) or None)
        for name in ("pretrained_model_name_or_path", "resolution")
        if hasattr(config, name)
    ):
        return None
    speed = _last_speed(view.folder / "events.jsonl")
    try:
        old = from_dict(named(RECIPES[recipe][0]), {**view.settings, "output_dir": "run"})
    except LoraDiffusionError:
        return None
    return None if speed is None else 1 / (speed * _samples(old))


def _last_speed(file: Path) -> float | None:
    """Steps per second at the end of a run's events."""
    try:
        with file.open("rb") as events:
            events.seek(max(0, events.seek(0, 2) - 65_536))
            lines = events.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            speed = json.loads(line).get("speed")
        except (ValueError, AttributeError):
            continue
        if isinstance(speed, int | float) and speed > 0:
            return float(speed)
    return None


def in_lines(check: RunCheck) -> list[tuple[str, str]]:
    """(what, value) for the card."""
    return [
        ("Learns from", check.what),
        ("Steps", f"{check.steps:,}; each is seen about {check.rounds:,.0f} times"),
        ("Memory at its peak", _memory(check)),
        ("Time", "known after the first steps" if check.minutes is None else f"{_time(check.minutes)} ({check.basis})"),
        ("Result", str(Path(check.place) / "adapter.safetensors")),
    ]


def _memory(check: RunCheck) -> str:
    if check.peak is None:
        return "could not be planned"
    where = "on the GPU" if check.device == "cuda" else "in main memory"
    free = "" if check.room is None else f"; {_size(check.room)} are free {where}"
    return f"{_size(check.peak)}{free}"


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _time(minutes: float) -> str:
    if minutes < 1.5:
        return "about a minute"
    return f"about {minutes:.0f} minutes" if minutes < 90 else f"about {minutes / 60:.1f} hours"
