"""One adapter at several weights and ranks: a table, and a picture with the curves over the drawings.

    lora-diffusion evaluate … --sweep_weights 0,0.25,0.5,0.75,1,1.25 --sweep_ranks 2,4,8

A higher weight or rank is more like the subject, until prompts are no longer followed or the photos come back as they
are. Only the subject's prompts are drawn, at the same seeds for every point.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import lora_diffusion as ld
from lora_diffusion.text import printable
from train import environment, evaluate_report, metrics
from train.evaluate import Bench, set_up, settings_record
from train.evaluate_config import EvaluateConfig, sweep_ranks, sweep_weights
from train.evaluate_figures import TITLES, Reference, copies, figures, look, refer
from train.evaluate_plan import Pictures, Stopped
from train.record import OnEvent

MEASURED = ("likeness", "prompt_following", "diversity", "nearest_photo")
_NAME = "swept"
_SHOWN = 3  # prompts in the picture where there is one rank


@dataclass(frozen=True)
class Point:
    """The adapter at one weight and rank.

    Attributes:
        rank: what it was resized to; None as it is in the file.
        figures: by name, as in `evaluate_figures`, with mean, low, high, floor, ceiling.
        score: see `metrics.score`.
        copied: how many of the pictures are copies of a photo.
        samples: pictures at the first seed, one for each prompt.
    """

    weight: float
    rank: int | None
    figures: dict[str, metrics.Figure | None]
    score: float
    copied: int
    samples: list[Image.Image]


def sweep(
    config: EvaluateConfig, *, on_event: OnEvent | None = None, should_stop: Callable[[], bool] | None = None
) -> dict[str, Any] | None:
    """Draw and judge every point, and write `report.json`, `report.md`, `sweep.png` and all pictures.

    Returns:
        The report; None if it was stopped.

    Raises:
        As `train.evaluate.evaluate`; AdapterMismatchError for an adapter that cannot be resized.
    """
    started = time.perf_counter()
    bench = set_up(config, on_event or (lambda event: None), should_stop or (lambda: False))
    (one,) = bench.adapters
    weights, ranks = sweep_weights(config) or [one.weight], sweep_ranks(config)
    sizes: dict[int | None, Any] = {rank: ld.resize(one.adapter, rank).adapter for rank in ranks}
    sizes = sizes or {None: one.adapter}
    folder = Path(config.output_dir)
    evaluate_report.make_room(folder)
    points: list[Point] = []
    try:
        base = bench.drawn("base model", {"subject": bench.plan.plain})
        evaluate_report.save_pictures(folder / "pictures" / "base", config, bench.plan, base, [])
        reference = refer(bench.encoders, bench.plan, bench.photos, base)
        for rank, adapter in sizes.items():
            ld.load_adapter(bench.pipe, adapter, name=_NAME)
            for weight in weights:
                ld.set_adapters(bench.pipe, [_NAME], [weight])
                where = f"weight-{weight:g}" if rank is None else f"rank-{rank}-weight-{weight:g}"
                pictures = bench.drawn(where.replace("-", " "), {"subject": bench.plan.subject})
                record = {**one.record, "weight": weight}
                evaluate_report.save_pictures(folder / "pictures" / where, config, bench.plan, pictures, [record])
                points.append(_judged(bench, reference, pictures, weight, rank))
            ld.delete_adapter(bench.pipe, _NAME)
    except Stopped:
        return None
    report = _report(bench, reference, points, one.name, time.perf_counter() - started)
    evaluate_report.write(folder, report, table(report))
    _picture(bench, points, one.name).save(folder / "sweep.png")
    return report


def table(report: dict[str, Any]) -> str:
    """A line for each point, in Markdown."""
    with_ranks = any(point["rank"] is not None for point in report["points"])
    names = [name for name in MEASURED if report["base"][name] is not None]
    rows = [[*(["rank"] if with_ranks else []), "weight", *(TITLES[name] for name in names), "copies", "score"]]
    blank = ["–"] if with_ranks else []
    rows.append(["base", *blank, *(f"{report['base'][name]['mean']:.2f}" for name in names), "", ""])
    for point in report["points"]:
        cells = [evaluate_report.cell(point["figures"][name]) for name in names]
        best = " ←" if point is report["points"][report["best"]] else ""
        first = [str(point["rank"] or "as it is")] if with_ranks else []
        rows.append([*first, f"{point['weight']:g}", *cells, str(point["copied"]), f"{point['score']:.2f}{best}"])
    return evaluate_report.markdown(rows)


def in_words(report: dict[str, Any]) -> list[str]:
    best = report["points"][report["best"]]
    rank = "" if best["rank"] is None else f" at rank {best['rank']}"
    return [f"{printable(report['adapter'])} does best with weight {best['weight']:g}{rank} (the arrow in the table)."]


def _judged(bench: Bench, reference: Reference, pictures: Pictures, weight: float, rank: int | None) -> Point:
    found = look(bench.encoders, bench.plan, pictures)
    measured = figures(found, reference)
    copied, like = len(copies(found, reference.photos)), measured["likeness"]
    assert like is not None
    score = metrics.score(like, measured["prompt_following"], copied / len(pictures["subject"]))
    chosen = {name: measured[name] for name in MEASURED}
    return Point(weight, rank, chosen, score, copied, pictures["subject"][:: len(bench.plan.seeds)])


def _report(bench: Bench, reference: Reference, points: list[Point], name: str, seconds: float) -> dict[str, Any]:
    at_base = figures(reference.base, reference)
    return {
        **settings_record(bench),
        "adapter": name,
        "base": {one: (figure := at_base[one]) and figure.rounded() for one in MEASURED},
        "points": [
            {
                "weight": point.weight,
                "rank": point.rank,
                "figures": {one: figure and figure.rounded() for one, figure in point.figures.items()},
                "copied": point.copied,
                "score": round(point.score, 4),
            }
            for point in points
        ],
        "best": best_of(points),
        "seconds": round(seconds, 1),
        "versions": environment.versions(),
        "machine": environment.machine(),
    }


def best_of(points: list[Point]) -> int:
    """The position of the point with the highest score; the first where several have it."""
    return max(range(len(points)), key=lambda k: (points[k].score, -k))


def _picture(bench: Bench, points: list[Point], name: str) -> Image.Image:
    from train.sweep_picture import Column, Curve, compose

    weights, ranks = list(dict.fromkeys(p.weight for p in points)), list(dict.fromkeys(p.rank for p in points))
    over_weights = len(weights) > 1 or len(ranks) == 1
    steps: list[Any] = weights if over_weights else ranks
    lines: list[Any] = ranks if over_weights else weights
    best = best_of(points)

    def at(line: Any, step: Any) -> Point:
        wanted = (step, line) if over_weights else (line, step)
        return next(p for p in points if (p.weight, p.rank) == wanted)

    def title(rank: int | None) -> str:
        return "as it is" if rank is None else f"rank {rank}"

    def curves(figure: str) -> list[Curve]:
        return [
            Curve(title(line) if len(lines) > 1 else "", [at(line, step).figures[figure] for step in steps])
            for line in lines
        ]

    shown = min(_SHOWN, len(bench.plan.subject)) if len(lines) == 1 else 1
    first = 1 if len(bench.plan.subject) > 1 and shown == 1 else 0
    rows = [
        (title(line) if len(lines) > 1 else bench.plan.subject[k], [at(line, step).samples[k] for step in steps])
        for line in lines
        for k in range(first, first + shown)
    ]
    heads = [Column(f"weight {s:g}" if over_weights else title(s)) for s in steps]
    marked = next(
        (row, steps.index(points[best].weight if over_weights else points[best].rank))
        for row, line in enumerate(lines)
        if line == (points[best].rank if over_weights else points[best].weight)
    )
    asked, seeds = len(bench.plan.subject), len(bench.plan.seeds)
    under = f"{asked} prompts at {seeds} seeds, judged by {bench.encoders.image.name}"
    if bench.encoders.text is not None and bench.encoders.text is not bench.encoders.image:
        under += f" and {bench.encoders.text.name}"
    if len(lines) > 1:
        under += f"; drawn: {bench.plan.subject[first]}"
    panels = [("Likeness to the photos", curves("likeness"), ("base model", "photos among themselves"))]
    if points[0].figures["prompt_following"] is not None:
        panels.append(("Prompt following", curves("prompt_following"), ("another prompt", "base model")))
    by = " and ".join(word for word, some in (("weight", weights), ("rank", ranks)) if len(some) > 1) or "weight"
    return compose(f"{printable(name)}, by {by}", under, heads, panels, rows, best=marked)
