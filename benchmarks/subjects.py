"""How well does pocket learn the shipped subjects?

    python benchmarks/subjects.py --seeds 5 --out benchmarks/subjects.json

Each subject is learned with the demo's recipe once per training seed, and every adapter judged on pictures of five
seeds. Prints a table in Markdown and writes every figure as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from train import environment
from train.demo import judge_adapter, recipe
from train.demo_config import DemoConfig
from train.dreambooth import train
from train.subjects import load_subject, subject_names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=subject_names())
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each subject")
    parser.add_argument("--first-seed", type=int, default=0, help="of the first training")
    parser.add_argument("--pictures", type=int, default=5, help="seeds of pictures for each prompt")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="change the recipe, to try things")
    parser.add_argument("--save", type=Path, help="folder for the comparison pictures")
    parser.add_argument("--out", type=Path, help="file for all figures")
    args = parser.parse_args()
    steps = DemoConfig().max_train_steps
    rows = []
    for name in args.subjects:
        subject = load_subject(name)
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                config = recipe(subject, folder, seed=seed, max_train_steps=steps)
                config = replace(config, **{k: json.loads(v) for k, v in (pair.split("=", 1) for pair in args.set)})
                began = time.perf_counter()
                result = train(config)
                assert result.adapter is not None
                judged = judge_adapter(
                    subject, result.adapter, seeds=list(range(args.pictures)), on_event=lambda e: None
                )
                row = {"subject": name, "seed": seed, "seconds_training": round(result.seconds_training, 1),
                       "seconds": round(time.perf_counter() - began, 1), **judged.figures}  # fmt: skip
            if args.save:
                args.save.mkdir(parents=True, exist_ok=True)
                judged.picture.save(args.save / f"{name}-{seed}.png")
            rows.append(row)
            print(json.dumps(row), flush=True)
    print("\n" + table(rows))
    if args.out:
        facts = {
            "recipe_changes": args.set,
            "machine": environment.machine(),
            "versions": environment.versions(),
            "rows": rows,
        }
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


def table(rows: list[dict]) -> str:
    """One line per subject, means over the training seeds."""
    lines = [
        "| subject | likeness base | adapted | photos among themselves | gap closed (least … most) | prompts followed, "
        "base | adapted | ratio | training, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["subject"] for row in rows):
        mine = [row for row in rows if row["subject"] == name]

        def mean(*keys: str, of: list[dict] = mine) -> float:
            values = []
            for row in of:
                value = row
                for key in keys:
                    value = value[key]
                values.append(value)
            return statistics.mean(values)

        gaps = [row["likeness_gap_closed"] for row in mine]
        base, adapted = mean("prompt_following", "base"), mean("prompt_following", "adapted")
        lines.append(
            f"| {name} | {mean('likeness', 'base'):.2f} | {mean('likeness', 'adapted'):.2f} | "
            f"{mean('likeness', 'real'):.2f} | {statistics.mean(gaps):.0%} ({min(gaps):.0%} … {max(gaps):.0%}) | "
            f"{base:.0%} | {adapted:.0%} | {adapted / base:.0%} | {mean('seconds_training'):.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
