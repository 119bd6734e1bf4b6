"""Which weights should LoRA adapt, and with which rank? The LoRA paper's tables 5 and 6 on pocket-bert.

python examples/lecture/weights_and_ranks.py              trains what is missing, then writes table and picture
python examples/lecture/weights_and_ranks.py --share 1/2  the half of the sweep that one of two processes trains
python examples/lecture/weights_and_ranks.py --table      only the table and the picture, of what is there
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from methods import HEAD_RATE, LORA, MODEL, rate_of
from plots import Point, scatter
from runs import RESULTS, Interval, Results, classify, head_parameters, labels_of, put_into_readme, share_of

TASK = "topic"
LENGTH = 40  # steps, few, for after 100 steps nearly every choice has learned the task
SEEDS = 4
Q, K, V, O = "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"  # noqa: E741
MLP = "intermediate.dense,output.dense"  # of which the second fits W_o too


@dataclass(frozen=True)
class Choice:
    """part: "weights" (of one budget) or "ranks"."""

    part: str
    name: str
    targets: str
    rank: int


WEIGHTS = (
    Choice("weights", "W_q", Q, 8),
    Choice("weights", "W_k", K, 8),
    Choice("weights", "W_v", V, 8),
    Choice("weights", "W_o", O, 8),
    Choice("weights", "W_q, W_v", f"{Q},{V}", 4),
    Choice("weights", "W_q, W_k, W_v, W_o", f"{Q},{K},{V},{O}", 2),
    Choice("weights", "all, with the MLP", f"{Q},{K},{V},{MLP}", 1),
)
RANKS = tuple(Choice("ranks", "W_q, W_v", f"{Q},{V}", rank) for rank in (1, 2, 4, 8, 64))


def settings_of(choice: Choice, rate: float, seed: int) -> dict[str, Any]:
    """Scaled by 1 at every rank (alpha = r)."""
    return {
        "method": "lora", "target_modules": choice.targets, "rank": choice.rank, "learning_rate": rate,
        "head_learning_rate": HEAD_RATE, "seed": seed, "max_train_steps": LENGTH,
    }  # fmt: skip


def rate() -> float:
    """The one that the comparison of methods chose for LoRA of rank 8 on W_q and W_v."""
    found = rate_of(LORA, TASK, Results(RESULTS / "methods.json", MODEL))
    if found is None:
        raise SystemExit(f"LoRA's learning rate on {TASK} is not chosen yet for these weights: run methods.py first")
    return found


def sweep(results: Results, share: str) -> None:
    """Train what is missing, seed by seed. W_q and W_v with rank 4 are in both tables and trained once."""
    chosen = rate()
    choices = [choice for choice in (*WEIGHTS, *RANKS) if choice.part == "weights" or choice.rank != 4]
    for seed in range(SEEDS):
        for choice in share_of(share, choices):
            settings = settings_of(choice, chosen, seed)
            if results.find(settings) is None:
                figures = classify(results.model, TASK, settings)
                results.add(settings, figures)
                print(choice.name, choice.rank, seed, figures, flush=True)


@dataclass(frozen=True)
class Line:
    """own: learned parameters without the head."""

    choice: Choice
    own: int
    accuracy: Interval


def lines(results: Results, choices: Sequence[Choice]) -> Iterator[Line]:
    chosen = rate()
    for choice in choices:
        runs = [results.find(settings_of(choice, chosen, seed)) for seed in range(SEEDS)]
        done = [run for run in runs if run is not None]
        if done:
            own = done[0]["learned"] - head_parameters(results.model, labels_of(TASK))
            yield Line(choice, own, Interval.of([run["test"] for run in done]))


def table(found: Sequence[Line]) -> str:
    """Markdown."""
    rows = ["| weights | rank | learned | accuracy | seeds |", "|---|--:|--:|--:|--:|"]
    for line in found:
        accuracy = line.accuracy
        cells = [line.choice.name, line.choice.rank, f"{line.own:,}", accuracy.percent(), accuracy.seeds]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def write(results: Results) -> None:
    weights, ranks = list(lines(results, WEIGHTS)), list(lines(results, RANKS))
    text = f"**Which weights, at one budget**\n\n{table(weights)}\n\n**Which rank**\n\n{table(ranks)}\n"
    (RESULTS / "weights_and_ranks.md").write_text(text, encoding="utf-8")
    points = [
        Point(f"{line.choice.name}, r = {line.choice.rank}", line.choice.part, line.own, 100 * line.accuracy.mean,
              100 * (line.accuracy.half or 0))
        for line in (*weights, *ranks)
    ]  # fmt: skip
    under = f"{results.model} on {TASK}, {LENGTH} steps; bars: 95 % t interval over {SEEDS} seeds; without the head"
    scatter(
        "LoRA: which weights, which rank", under, points, x="learned parameters", y="accuracy on test rows, %"
    ).save(RESULTS / "weights_and_ranks.png", optimize=True)
    put_into_readme("weights_and_ranks.py", text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", default="1/1")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    results = Results(RESULTS / "weights_and_ranks.json", MODEL)
    if not args.table:
        sweep(results, args.share)
    write(results)


if __name__ == "__main__":
    main()
