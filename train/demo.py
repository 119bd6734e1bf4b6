"""The demo: five shipped photos, DreamBooth on them, and pictures that show what was learned.

lora-diffusion demo
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_diffusion as ld
from lora_diffusion.errors import ConfigError
from train import environment, likeness
from train.comparison import Row, compose
from train.config import check
from train.demo_config import DemoConfig
from train.dreambooth import train
from train.dreambooth_config import DreamBoothConfig
from train.judge import pocket_judge
from train.models import load_pipeline
from train.record import OnEvent
from train.sampling import generate
from train.subjects import Ask, Subject, load_subject

STEPS, GUIDANCE, BATCH = 20, 3.0, 25  # of every picture that is judged
MARKER = "report.json"  # a folder with this in it is an older demo and may be replaced


def recipe(subject: Subject, output_dir: str, *, seed: int, max_train_steps: int) -> DreamBoothConfig:
    """The DreamBooth settings that suit pocket: found by trying, see `benchmarks/README.md`."""
    return DreamBoothConfig(
        "pocket",
        str(subject.photos_dir),
        subject.instance_prompt,
        class_prompt=subject.class_prompt,
        with_prior_preservation=True,
        num_class_images=32,
        sample_batch_size=16,
        prior_generation_steps=STEPS,
        train_text_encoder=True,
        # Attention alone is not enough here: pocket's attention is at 8×8 and 4×4, and a face is drawn at 16×16.
        target_modules="to_q,to_k,to_v,to_out.0,q_proj,k_proj,v_proj,out_proj,conv1,conv2",
        rank=16,
        learning_rate=2e-3,
        text_encoder_lr=3e-4,  # more, and the backgrounds of the photos come along
        lr_scheduler="cosine",
        lr_warmup_steps=min(10, max_train_steps),
        train_batch_size=5,
        max_train_steps=max_train_steps,
        checkpointing_steps=max_train_steps,
        checkpoints_total_limit=1,
        mixed_precision="no",
        seed=seed,
        output_dir=output_dir,
        overwrite=True,
    )


def run_demo(
    config: DemoConfig, on_event: OnEvent, *, should_stop: Callable[[], bool] | None = None
) -> dict[str, Any] | None:
    """Train, draw, judge, and write `comparison.png` and `report.json`.

    Args:
        config: see `DemoConfig`.
        on_event: told of every event, as by `train.dreambooth.train`.
        should_stop: asked after every step; True keeps the adapter as it is and ends the demo.

    Returns:
        The report; None if it was stopped.

    Raises:
        ConfigError: an unknown subject, or an output folder that holds something else.
    """
    check(config)
    started = time.perf_counter()
    subject = load_subject(config.subject)
    folder = Path(config.output_dir)
    _make_room(folder)
    on_event(
        {"event": "note", "message": f"five photos of {subject.name}, a {subject.class_word} that pocket never saw"}
    )
    settings = recipe(subject, str(folder), seed=config.seed, max_train_steps=config.max_train_steps)
    run = train(settings, on_event=on_event, should_stop=should_stop)
    if run.stopped or run.adapter is None:
        on_event({"event": "note", "message": f"stopped after {run.steps} steps; what was learned is in {folder}"})
        return None
    result = judge_adapter(subject, run.adapter, seeds=list(range(config.num_seeds)), on_event=on_event)
    result.picture.save(folder / "comparison.png")
    seconds = {"train": run.seconds_training, "total": time.perf_counter() - started}
    report = {
        "subject": subject.name,
        **result.figures,
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "peak_memory_bytes": run.peak_memory_bytes,
        "adapter_bytes": run.adapter.stat().st_size,
        "seeds": {"train": config.seed, "pictures": list(range(config.num_seeds))},
        "versions": environment.versions(),
        "machine": environment.machine(),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for line in _in_words(report, folder):
        on_event({"event": "note", "message": line})
    return report


class Judged:
    """What `judge_adapter` found: `figures` for the report, `picture` to look at."""

    def __init__(self, figures: dict[str, Any], picture: Any) -> None:
        self.figures, self.picture = figures, picture


def judge_adapter(subject: Subject, adapter: Path, *, seeds: list[int], on_event: OnEvent) -> Judged:
    """Draw the subject's prompts with and without `adapter` at the same seeds, and judge both."""
    pipe = load_pipeline("pocket")
    judge = pocket_judge()
    ld.load_adapter(pipe, adapter, name="subject")
    plan = [(ask, seed) for ask in (*subject.places, *subject.company) for seed in seeds]
    alone = len(subject.places) * len(seeds)
    asks = [ask for ask, _ in plan]
    class_asks = [Ask(subject.class_prompt, {})] * len(seeds)

    def draw(wanted: list[Ask], numbers: list[int]) -> list[Any]:
        done = 0

        def tell(_index: int, _image: Any) -> None:
            nonlocal done
            done += 1
            on_event({"event": "prepare", "what": "drawing", "done": done, "total": len(wanted)})

        prompts = [ask.prompt for ask in wanted]
        return generate(pipe, prompts, numbers, steps=STEPS, guidance=GUIDANCE, batch_size=BATCH, on_image=tell)

    everything, numbers = [*asks, *class_asks], [*(seed for _, seed in plan), *seeds]
    adapted = draw(everything, numbers)
    with ld.disable_adapters(pipe):
        base = draw(everything, numbers)
    photos = subject.photos()
    real = judge.likeness_among(photos)
    found = {name: judge.likeness(images[:alone], photos) for name, images in (("base", base), ("adapted", adapted))}
    follow = {
        name: likeness.following(judge, images[: len(asks)], asks)
        for name, images in (("base", base), ("adapted", adapted))
    }
    ends = len(asks)
    figures = {
        "likeness": {**{k: round(v, 4) for k, v in found.items()}, "real": round(real, 4)},
        "likeness_gap_closed": round(likeness.gap_closed(found["base"], found["adapted"], real), 4),
        "likeness_scale": {k: round(v, 4) for k, v in likeness.scale(judge, subject, pipe).items()},
        "prompt_following": {k: round(v, 4) for k, v in follow.items()},
        "class_likeness": {  # of pictures of the class: should not move towards the subject
            "base": round(judge.likeness(base[ends:], photos), 4),
            "adapted": round(judge.likeness(adapted[ends:], photos), 4),
        },
    }
    return Judged(figures, _picture(subject, photos, plan, base, adapted, len(seeds)))


def _picture(
    subject: Subject, photos: list[Any], plan: list[tuple[Ask, int]], base: list[Any], adapted: list[Any], seeds: int
) -> Any:
    first = [k * seeds for k in range(len(subject.places))]
    beside = [len(first) * seeds + k * seeds + s for s in range(min(2, seeds)) for k in range(len(subject.company))]
    more = [k + 1 for k in first] if seeds > 1 else []
    words = [plan[k][0].prompt.removeprefix("a photo of ") for k in first]
    rows = [
        Row(photos, title="The five photos that it learned from"),
        Row([base[k] for k in first], title="The same prompt and seed, without and with the adapter", side="base"),
        Row([adapted[k] for k in first], side="adapted", captions=words),
    ]
    if more:
        rows.append(Row([adapted[k] for k in more], side="adapted,\nseed 1"))
    rows.append(
        Row(
            [adapted[k] for k in beside],
            title="In company that the photos do not show",
            side="adapted",
            captions=[plan[k][0].prompt.removeprefix("a photo of ") for k in beside],
        )
    )
    return compose(f"{subject.name}: a {subject.class_word} learned from five photos", rows)


def _make_room(folder: Path) -> None:
    """An older demo is replaced; a folder with anything else in it is left alone."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / MARKER).is_file() and not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds something that is not a demo; name another --output_dir")
    for leftover in ("comparison.png", MARKER):
        (folder / leftover).unlink(missing_ok=True)
    shutil.rmtree(folder / "samples", ignore_errors=True)


def _in_words(report: dict[str, Any], folder: Path) -> list[str]:
    like, follow, seconds = report["likeness"], report["prompt_following"], report["seconds"]
    known = report["likeness_scale"]
    return [
        "",
        f"Learned {report['subject']} in {seconds['train']:.0f} s of training, {seconds['total']:.0f} s in all; "
        f"the adapter has {report['adapter_bytes'] / 1e6:.2f} MB.",
        f"Likeness to the photos: {like['base']:.2f} without, {like['adapted']:.2f} with the adapter; the photos among "
        f"themselves {like['real']:.2f} ({report['likeness_gap_closed']:.0%} of the gap closed).",
        "  the judge's scale: " + ", ".join(f"{name} {value:.2f}" for name, value in known.items()),
        f"Of what the prompts ask, the pictures show {follow['base']:.0%} without and {follow['adapted']:.0%} with it.",
        f"Look at   {folder / 'comparison.png'}",
        f"Figures   {folder / 'report.json'}",
        f"Adapter   {folder / 'adapter.safetensors'}  (also for diffusers: pipe.load_lora_weights)",
        "Try next  lora-diffusion sample --model pocket --guidance_scale 3 --adapter "
        f'{folder / "adapter.safetensors"} --prompt "{load_subject(report["subject"]).instance_prompt} at sunset"',
    ]
