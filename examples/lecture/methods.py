"""Quality against trainable parameters: every method of the lecture on pocket-bert's classification tasks.

python examples/lecture/methods.py                  trains what is missing, then writes table and picture
python examples/lecture/methods.py --share 1/2      the half of the sweep that one of two processes trains
python examples/lecture/methods.py --table          only the table and the picture, of what is there
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from plots import Point, scatter
from runs import RESULTS, Interval, Results, classify, head_parameters, labels_of, put_into_readme, share_of

MODEL = "pocket-bert"
STEPS = {"topic": 100, "sentiment": 1200}  # of 16 rows; topic is learned much sooner
HEAD_RATE = 2e-3
SEEDS, MORE_SEEDS = 3, 5
ROWS = 600  # test rows of each task


@dataclass(frozen=True)
class Method:
    """name: in the table. settings: of `TextConfig`. rates: to choose from; none:
    those of LoRA with rank 8. family: points of one colour, joined."""

    name: str
    family: str
    rates: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = SEEDS


def _lora(rank: int, seeds: int = SEEDS) -> Method:
    settings = {"method": "lora", "rank": rank, "target_modules": "attention-qv"}
    return Method(f"LoRA, r = {rank} on W_q, W_v", "LoRA", (1e-3, 3e-3, 1e-2) if rank == 8 else (), settings, seeds)


METHODS: tuple[Method, ...] = (
    Method("full fine-tuning", "full", (2e-4, 5e-4, 1e-3), {"method": "full"}, MORE_SEEDS),
    Method("top 2 of 4 blocks", "top blocks", (5e-4, 1e-3), {"method": "top-layers", "top_layers": 2}),
    Method("BitFit", "BitFit", (3e-3, 1e-2), {"method": "bitfit"}),
    Method("head alone", "head", (2e-3, 1e-2), {"method": "head"}),
    Method("Houlsby, r = 16", "adapters", (1e-3, 3e-3), {"method": "houlsby", "bottleneck_size": 16}),
    Method("Pfeiffer, r = 16", "adapters", (1e-3, 3e-3), {"method": "pfeiffer", "bottleneck_size": 16}),
    Method("Lin, r = 16", "adapters", (1e-3, 3e-3), {"method": "lin", "bottleneck_size": 16}),
    Method("AdapterDrop: Pfeiffer, r = 16, none in the first 2 blocks", "adapters", (1e-3, 3e-3),
           {"method": "pfeiffer", "bottleneck_size": 16, "leave_out": 2}),
    _lora(2),
    _lora(8, MORE_SEEDS),
    _lora(32),
    Method("P-tuning v2, 20 tokens in every block", "prefixes and prompts", (3e-3, 1e-2),
           {"method": "prefix-tuning", "num_virtual_tokens": 20}),
    Method("prompt tuning, 20 tokens", "prefixes and prompts", (1e-2, 3e-2),
           {"method": "prompt-tuning", "num_virtual_tokens": 20}),
    Method("P-tuning, 20 tokens (MLP)", "prefixes and prompts", (1e-3, 3e-3),
           {"method": "p-tuning", "num_virtual_tokens": 20, "encoder": "MLP"}),
)  # fmt: skip
FULL, LORA = METHODS[0], METHODS[9]


def settings_of(method: Method, task: str, rate: float, seed: int) -> dict[str, Any]:
    """A run, as the file of results knows it."""
    settings = {**method.settings, "learning_rate": rate, "seed": seed, "max_train_steps": STEPS[task]}
    return settings if method.settings["method"] in ("full", "head") else {**settings, "head_learning_rate": HEAD_RATE}


def rate_of(method: Method, task: str, results: Results) -> float | None:
    """The rate whose run of seed 0 is best on the task's validation rows: by accuracy, of equals by loss. None before
    all were tried."""
    method = method if method.rates else LORA
    tried = [(rate, results.find({"task": task, **settings_of(method, task, rate, 0)})) for rate in method.rates]
    judged = [(run["validation"], -run["validation_loss"], rate) for rate, run in tried if run is not None]
    return max(judged)[2] if len(judged) == len(tried) else None


def sweep(results: Results, share: str) -> None:
    """Train what is missing of one share of the methods: task by task, those with more seeds before the others."""
    chosen = share_of(share, METHODS)
    for task in STEPS:
        for seeds in (MORE_SEEDS, SEEDS):
            methods = [method for method in chosen if method.seeds == seeds]
            for method in methods:
                for rate in method.rates:
                    _train(results, method, task, rate, 0)
            _seeds(results, methods, task, SEEDS)
        _seeds(results, chosen, task, MORE_SEEDS)


def _seeds(results: Results, methods: Sequence[Method], task: str, up_to: int) -> None:
    for seed in range(up_to):
        for method in methods:
            rate = rate_of(method, task, results)
            if rate is not None and seed < method.seeds:
                _train(results, method, task, rate, seed)


def _train(results: Results, method: Method, task: str, rate: float, seed: int) -> None:
    settings = settings_of(method, task, rate, seed)
    if results.find({"task": task, **settings}) is None:
        figures = classify(results.model, task, settings)
        results.add({"task": task, **settings}, figures)
        print(method.name, task, f"{rate:g}", seed, figures, flush=True)


@dataclass(frozen=True)
class Line:
    """A method with what its runs gave, by task. own: learned parameters without the head."""

    method: Method
    own: int
    rates: dict[str, float]
    tasks: dict[str, Interval]


def lines(results: Results, methods: Sequence[Method] = METHODS) -> Iterator[Line]:
    """Methods with at least one finished seed."""
    for method in methods:
        tasks, rates, learned = {}, {}, 0
        for task in STEPS:
            rate = rate_of(method, task, results)
            settings = [settings_of(method, task, rate, seed) for seed in range(method.seeds) if rate is not None]
            runs = [run for one in settings if (run := results.find({"task": task, **one}))]
            if runs and rate is not None:
                tasks[task], rates[task] = Interval.of([run["test"] for run in runs]), rate
                learned = runs[0]["learned"] - head_parameters(results.model, labels_of(task))
        if tasks:
            yield Line(method, learned, rates, tasks)


def table(found: Sequence[Line]) -> str:
    """Markdown."""
    whole = next((line.own for line in found if line.method is FULL), None)
    tasks = [task for task in STEPS if any(task in line.tasks for line in found)]
    titles = ["method", "learned", "of full"]
    titles += [word for task in tasks for word in (f"{task}, {STEPS[task]} steps", "rate", "seeds")]
    rows = [f"| {' | '.join(titles)} |", "|---|" + "--:|" * (len(titles) - 1)]
    for line in found:
        part = "" if not whole else f"{100 * line.own / whole:.2f} %"
        cells = [line.method.name, f"{line.own:,}", part]
        for task in tasks:
            one = line.tasks.get(task)
            cells += ["–"] * 3 if one is None else [one.percent(), f"{line.rates[task]:g}", str(one.seeds)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def verdict(found: Sequence[Line]) -> str:
    """Task by task, whether the means of LoRA lie in full fine-tuning's intervals, over seeds and over test rows."""
    full = next((line for line in found if line.method is FULL), None)
    said = []
    for task, whole in full.tasks.items() if full is not None else ():
        rows = wilson(whole.mean, ROWS)
        beside = []
        for line in found:
            if line.method.family == "LoRA" and task in line.tasks and full is not None:
                mean = line.tasks[task].mean
                half = whole.half or 0.0
                seeds = _where(mean, whole.mean - half, whole.mean + half)
                drawn = _where(mean, *rows)
                part = f"r = {line.method.settings['rank']} ({100 * line.own / full.own:.2f} % of the parameters)"
                beside.append(f"{part} {100 * (mean - whole.mean):+.1f} points, {seeds} and {drawn}")
        low, high = (f"{100 * end:.1f}" for end in rows)
        said.append(
            f"On {task} full fine-tuning has {whole.percent()} (95 % t interval over seeds), and {low} to {high} is "
            f"Wilson's 95 % interval over {ROWS} test rows. LoRA beside the first and the second: {'; '.join(beside)}."
        )
    return "\n\n".join(said)


def _where(mean: float, low: float, high: float) -> str:
    return "below" if mean < low - 1e-9 else "above" if mean > high + 1e-9 else "inside"


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many rows."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, min(1.0, middle + half)


def write(results: Results) -> None:
    found = list(lines(results))
    text = f"{table(found)}\n\n{verdict(found)}\n"
    (RESULTS / "methods.md").write_text(text, encoding="utf-8")
    for task in STEPS:
        points = [_point(line, line.tasks[task]) for line in found if task in line.tasks and line.own]
        alone = [line.tasks[task].percent() for line in found if task in line.tasks and not line.own]
        if points:
            picture = scatter(
                f"Accuracy against learned parameters: {task}",
                f"{results.model}, {STEPS[task]} steps; bars: 95 % t interval over seeds; parameters without the head"
                + (f" (alone: {alone[0]})" if alone else ""),
                points,
                x="learned parameters",
                y="accuracy on test rows, %",
            )
            picture.save(RESULTS / f"methods-{task}.png", optimize=True)
    put_into_readme("methods.py", text)
    print(text)


def _point(line: Line, accuracy: Interval) -> Point:
    method = line.method
    name = method.name.partition(":")[0].partition(",")[0]
    if method.family == "LoRA":
        name += f", r = {method.settings['rank']}"
    return Point(name, method.family, line.own, 100 * accuracy.mean, 100 * (accuracy.half or 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", default="1/1")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    results = Results(RESULTS / "methods.json", MODEL)
    if not args.table:
        sweep(results, args.share)
    write(results)


if __name__ == "__main__":
    main()
