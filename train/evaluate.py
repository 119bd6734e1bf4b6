"""Judge adapters: are they like the subject, do they follow prompts, what else did they change?

    lora-diffusion evaluate --model pocket --adapter runs/dog/adapter.safetensors --instance_data_dir photos \\
        --instance_prompt "a photo of sks dog" --class_prompt "a photo of a dog"

Every adapter draws the same prompts at the same seeds as the base model. `train.evaluate_figures` says what each figure
means, `train.metrics` how it is computed, `train.encoders` who judges.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import lora_diffusion as ld
from train import environment, evaluate_report, metrics
from train.encoders import Encoders, find_encoders
from train.evaluate_config import EvaluateConfig, validate
from train.evaluate_figures import Found, Reference, copies, figures, look, refer
from train.evaluate_plan import Pictures, Plan, Stopped, draw, guidance_of, make_plan
from train.images import list_images, read_images
from train.models import load_pipeline, resolve_device, resolve_precision
from train.record import OnEvent
from train.sample import parse_adapter
from train.saving import model_label

_NAME = "evaluated"


@dataclass(frozen=True)
class Judged:
    """An adapter to judge. `name` is different for each."""

    name: str
    file: str
    weight: float
    adapter: Any

    @property
    def record(self) -> dict[str, Any]:
        return {"name": self.name, "file": Path(self.file).name, "weight": self.weight}


@dataclass(frozen=True)
class Bench:
    """All that judging needs, loaded and checked."""

    config: EvaluateConfig
    plan: Plan
    photos: list[Image.Image]
    adapters: list[Judged]
    encoders: Encoders
    pipe: Any
    on_event: OnEvent
    should_stop: Callable[[], bool]

    def drawn(self, what: str, groups: dict[str, tuple[str, ...]]) -> Pictures:
        """Pictures of the pipeline as it is. Raises Stopped."""

        def progress(done: int, total: int) -> None:
            self.on_event({"event": "prepare", "what": f"drawing, {what}", "done": done, "total": total})

        return draw(self.pipe, self.config, groups, self.plan.seeds, progress, self.should_stop)


def evaluate(
    config: EvaluateConfig, *, on_event: OnEvent | None = None, should_stop: Callable[[], bool] | None = None
) -> dict[str, Any] | None:
    """Draw, judge, and write `report.json`, `report.md`, `comparison.png` and all pictures.

    Args:
        on_event: told of progress and warnings.
        should_stop: asked between batches.

    Returns:
        The report; None if it was stopped.

    Raises:
        ConfigError, DatasetError, AdapterFormatError, AdapterMismatchError, ModelNotFoundError: what was asked for
            cannot be used; found out before anything is drawn.
    """
    started = time.perf_counter()
    bench = set_up(config, on_event or (lambda event: None), should_stop or (lambda: False))
    folder, plan = Path(config.output_dir), bench.plan
    evaluate_report.make_room(folder)
    try:
        base = bench.drawn("base model", plan.groups(base=True))
        evaluate_report.save_pictures(folder / "pictures" / "base", config, plan, base, [])
        reference = refer(bench.encoders, plan, bench.photos, base)
        report = _head(bench, reference)
        drawn = [("base model", base)]
        for number, one in enumerate(bench.adapters, 1):
            ld.load_adapter(bench.pipe, one.adapter, name=_NAME, weight=one.weight)
            try:
                pictures = bench.drawn(one.name, plan.groups(base=False))
            finally:
                ld.delete_adapter(bench.pipe, _NAME)
            evaluate_report.save_pictures(folder / "pictures" / f"{number}", config, plan, pictures, [one.record])
            report["adapters"].append(_verdict(one, look(bench.encoders, plan, pictures), reference))
            drawn.append((one.name, pictures))
    except Stopped:
        return None
    evaluate_report.overview(bench.photos, plan, drawn).save(folder / "comparison.png")
    report |= {"seconds": round(time.perf_counter() - started, 1), "versions": environment.versions(),
               "machine": environment.machine()}  # fmt: skip
    evaluate_report.write(folder, report, evaluate_report.table(report))
    return report


def set_up(config: EvaluateConfig, on_event: OnEvent, should_stop: Callable[[], bool]) -> Bench:
    """Check everything, cheapest first, and load it; the errors are those of `evaluate`."""
    validate(config)
    plan = make_plan(config)
    evaluate_report.check_room(Path(config.output_dir))
    photos = read_images(list_images(config.instance_data_dir))
    adapters = _read_adapters(config)
    device = resolve_device(config.device)
    encoders = find_encoders(config.image_encoder, config.text_encoder, config.model, device)
    pipe = load_pipeline(
        config.model,
        precision=resolve_precision(config.mixed_precision, device),
        device=device,
        revision=config.revision,
        variant=config.variant,
    )
    for one in adapters:  # one that does not fit shows itself before an hour of drawing
        ld.load_adapter(pipe, one.file, name=_NAME)
        ld.delete_adapter(pipe, _NAME)
    if len(photos) < 2:
        on_event({"event": "warning", "message": "one photo cannot be compared with another: there is no ceiling"})
    if len(plan.seeds) < metrics.FEWEST:
        few = f"--seeds {len(plan.seeds)} is too few for intervals; {metrics.FEWEST} and more give them"
        on_event({"event": "warning", "message": few})
    return Bench(config, plan, photos, adapters, encoders, pipe, on_event, should_stop)


def settings_record(bench: Bench) -> dict[str, Any]:
    """What decides the figures, for the report."""
    config, plan = bench.config, bench.plan
    return {
        "model": model_label(config.model),
        "instance_prompt": config.instance_prompt,
        "class_prompt": config.class_prompt,
        "prompts": list(plan.subject),
        "unrelated_prompts": list(plan.unrelated),
        "seeds": list(plan.seeds),
        "steps": config.num_inference_steps,
        "guidance": guidance_of(config),
        "resolution": config.resolution,
        "photo_count": len(bench.photos),
        "encoders": bench.encoders.names,
    }


def _head(bench: Bench, reference: Reference) -> dict[str, Any]:
    real = reference.photos
    limit = metrics.copy_limit(real)
    among = metrics.likeness_among(real)
    at_base = figures(reference.base, reference)
    return {
        **settings_record(bench),
        "pictures_of_the_subject": len(bench.plan.subject) * len(bench.plan.seeds),
        "copy_limit": None if limit is None else round(limit, 4),
        "photos": {
            "likeness": _rounded(among),
            "diversity": None if among is None else _rounded(1 - among),
            "nearest_photo": _rounded(metrics.nearest_among(real)),
        },
        "base": {name: figure and figure.rounded() for name, figure in at_base.items()},
        "adapters": [],
    }


def _verdict(one: Judged, found: Found, reference: Reference) -> dict[str, Any]:
    measured = figures(found, reference)
    like, follow = measured["likeness"], measured["prompt_following"]
    kept = follow.mean / follow.ceiling if follow is not None and follow.ceiling else None
    copied = copies(found, reference.photos)
    return {
        **one.record,
        "figures": {name: figure and figure.rounded() for name, figure in measured.items()},
        "likeness_gap_closed": None if like is None else _rounded(metrics.gap_closed(like)),
        "prompt_following_kept": _rounded(kept),
        "memorised": bool(copied),
        "copies": copied,
    }


def _read_adapters(config: EvaluateConfig) -> list[Judged]:
    found: list[Judged] = []
    for text in config.adapter:
        wanted = parse_adapter(text)
        label = wanted.label if wanted.weight == 1 else f"{wanted.label}:{wanted.weight:g}"
        taken = {one.name for one in found}
        names = [label, *(f"{label} ({n})" for n in range(2, len(config.adapter) + 1))]
        name = next(name for name in names if name not in taken)
        found.append(Judged(name, wanted.file, wanted.weight, ld.read_adapter(wanted.file)))
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
