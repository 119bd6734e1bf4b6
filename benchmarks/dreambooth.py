"""DreamBooth with LoRA: ours against diffusers' `train_dreambooth_lora.py`.

    python benchmarks/dreambooth.py --script PATH --scratch FOLDER --out benchmarks/dreambooth.json
    python benchmarks/dreambooth.py --script PATH --quick            # does it work? pocket, a few steps

The script comes from a checkout of diffusers (examples/dreambooth) that fits the installed version; it is run as it is.
Both get the same model folder, photos and settings and train in processes of their own, which take turns. Theirs runs
a second time with its --pre_compute_text_embeddings where it allows that. The memory table is ours: planned and, on a
CUDA device, measured. Prints tables in Markdown and writes every figure as JSON; exit status 1 says that somewhere the
two did not do the same work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dreambooth_memory
import torch
from dreambooth_cases import Case, Material, material, speed_cases
from dreambooth_contestants import Measured, Setting, disagreement, ours, run, theirs
from engine_common import markdown, notes

from train import environment

GIB = 2**30
TIMES = ("steps_per_second", "steps_per_cpu_second", "first_step", "total")
OURS, THEIRS, PRECOMPUTED = "ours", "theirs", "theirs, text precomputed"


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        setting = Setting(args.script.resolve(), args.scratch or Path(temporary), args.device, args.threads, args.limit)
        setting.scratch.mkdir(parents=True, exist_ok=True)
        precision = args.precision or ("fp16" if args.device == "cuda" else "no")
        facts: dict = {"measured_on": measured_on(setting, args.repetitions), "command": sys.argv[1:], "rows": []}
        print(headline(facts["measured_on"]) + "\n", flush=True)
        cases = speed_cases(args.device, precision, quick=args.quick, only=args.only)
        if args.steps:
            cases = [replace(case, steps=args.steps) for case in cases]
        for case in cases:
            row = measure(case, material(case, setting.scratch), setting, args.repetitions)
            facts["rows"].append(row)
            print(f"- {case.name}: {one_line(row)}", flush=True)
            write(args.out, facts)
        print("\n" + speed_table(facts["rows"]) + "\n\n" + memory_columns(facts["rows"]))
        if not args.quick and args.only is None:
            facts["memory"] = dreambooth_memory.measure(setting, "fp16" if precision == "no" else precision)
            print("\n" + dreambooth_memory.report(facts["memory"]))
            write(args.out, facts)
        print("\n" + notes(facts["rows"]))
    if any("disagrees" in row for row in facts["rows"]):
        sys.exit("somewhere the two did not do the same work")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", type=Path, required=True, help="diffusers' train_dreambooth_lora.py")
    parser.add_argument("--scratch", type=Path, help="folder for the full-size model (4.3 GB) and the runs; kept")
    parser.add_argument("--quick", action="store_true", help="pocket alone, a few steps")
    parser.add_argument("--only", metavar="TEXT", help="only cases whose name holds this: 'pocket', 'batch 4'")
    parser.add_argument("--steps", type=int, help="of each training (default: by model and device)")
    parser.add_argument("--repetitions", type=int, default=3, help="trainings of each contestant (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1, least disturbed by other load)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--precision", choices=("no", "fp16", "bf16"), help="default: fp16 on CUDA, no (fp32) on the CPU"
    )
    parser.add_argument("--limit", type=float, default=1800, help="seconds after which a training is given up")
    parser.add_argument("--out", type=Path, help="file for all figures")
    args = parser.parse_args()
    if not args.script.is_file():
        parser.error(f"there is no file {args.script}; see the head of this file for where the script comes from")
    return args


def write(path: Path | None, facts: dict) -> None:
    """After each row: what is measured is not lost to an error in the next."""
    if path:
        path.write_text(json.dumps(facts, indent=1, default=str) + "\n")


def measure(case: Case, at: Material, setting: Setting, repetitions: int) -> dict[str, Any]:
    """One row: the contestants in turns, each time another one first."""
    where = setting.scratch / "runs"
    commands: dict[str, Callable[[Path], list[str]]] = {
        THEIRS: lambda output: theirs(case, at, output, setting),
        OURS: lambda output: ours(case, at, output, setting),
    }
    if not case.text_encoder:
        commands[PRECOMPUTED] = lambda output: theirs(case, at, output, setting, precomputed=True)
    runs: dict[str, list[Measured]] = {name: [] for name in commands}
    names = list(commands)
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            output = where / name.replace(", ", "-").replace(" ", "-")
            measured = run(commands[name](output), case, output, setting)
            if measured.failed:
                return {"name": case.name, "case": asdict(case), "skipped": f"{name}: {measured.failed}"}
            runs[name].append(measured)
    row = {"name": case.name, "case": asdict(case)}
    for name in names[1:]:
        first, second = (OURS, THEIRS) if name == OURS else (OURS, PRECOMPUTED)
        wrong = disagreement(runs[first][-1], runs[second][-1])
        if wrong:
            row["disagrees"] = wrong
    return row | {
        "contestants": {name: summary(found) for name, found in runs.items()},
        "ratios": ratios(runs, "steps_per_second"),
        "cpu_ratios": ratios(runs, "steps_per_cpu_second"),
    }


def summary(runs: list[Measured]) -> dict[str, Any]:
    """Medians, and what each repetition gave."""
    last = runs[-1]
    return {
        **{key: median(getattr(one, key) for one in runs) for key in TIMES},
        **{key: int(median(getattr(one, key) for one in runs)) for key in ("peak", "peak_whole", "reserved")},
        "file_bytes": last.file_bytes,
        "parameters": last.parameters,
        "loss_mean": statistics.mean(last.losses),
        "each_steps_per_second": [round(one.steps_per_second, 4) for one in runs],
        "each_steps_per_cpu_second": [round(one.steps_per_cpu_second, 4) for one in runs],
        "load_before": [round(one.load, 2) for one in runs],
        "transforms": last.transforms,
    }


def ratios(runs: dict[str, list[Measured]], key: str) -> dict[str, list[float]]:
    """Speed of ours to another contestant's, repetition by repetition."""
    return {
        name: [round(getattr(our, key) / getattr(other, key), 3) for our, other in zip(runs[OURS], found)]
        for name, found in runs.items()
        if name != OURS
    }


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def one_line(row: dict) -> str:
    if "skipped" in row:
        return f"skipped ({row['skipped']})"
    found = {name: median(values) for name, values in row["ratios"].items()}
    return ", ".join(f"{value:.2f} × the steps per second of {name}" for name, value in found.items())


def speed_table(rows: list[dict]) -> str:
    header = [
        "", "steps/s, theirs", "text precomputed", "ours", "ours / theirs (least … most)", "by processor time",
        "ours / precomputed", "by processor time", "first step after, s: theirs", "ours",
        "in all, s: theirs", "ours", "load",
    ]  # fmt: skip
    lines = []
    for row in measured(rows):
        their, our, third = (row["contestants"].get(name) for name in (THEIRS, OURS, PRECOMPUTED))
        ratio = row["ratios"][THEIRS]
        loads = [load for one in row["contestants"].values() for load in one["load_before"]]
        lines.append(
            [
                row["name"],
                figure(their["steps_per_second"]),
                figure(third["steps_per_second"]) if third else "not allowed",
                figure(our["steps_per_second"]),
                f"**{median(ratio):.2f}** ({min(ratio):.2f} … {max(ratio):.2f})",
                f"{median(row['cpu_ratios'][THEIRS]):.2f}",
                f"{median(row['ratios'][PRECOMPUTED]):.2f}" if third else "–",
                f"{median(row['cpu_ratios'][PRECOMPUTED]):.2f}" if third else "–",
                figure(their["first_step"]),
                figure(our["first_step"]),
                figure(their["total"]),
                figure(our["total"]),
                f"{median(loads):.1f}",
            ]
        )
    return markdown(header, lines)


def memory_columns(rows: list[dict]) -> str:
    """Peaks in the loop and of the whole process, and the files: same rows as the speed table."""
    header = [
        "", "peak when the last step ended, GiB: theirs", "text precomputed", "ours", "whole process: theirs", "ours",
        "trained parameters", "file, kB: theirs", "ours", "mean loss: theirs", "ours",
    ]  # fmt: skip
    lines = []
    for row in measured(rows):
        their, our, third = (row["contestants"].get(name) for name in (THEIRS, OURS, PRECOMPUTED))
        lines.append(
            [
                row["name"],
                f"{their['peak'] / GIB:.2f}",
                f"{third['peak'] / GIB:.2f}" if third else "–",
                f"{our['peak'] / GIB:.2f}",
                f"{their['peak_whole'] / GIB:.2f}",
                f"{our['peak_whole'] / GIB:.2f}",
                f"{our['parameters']:,}",
                round(their["file_bytes"] / 1000),
                round(our["file_bytes"] / 1000),
                figure(their["loss_mean"]),
                figure(our["loss_mean"]),
            ]
        )
    return markdown(header, lines)


def measured(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "skipped" not in row and "disagrees" not in row]


def figure(value: float) -> str:
    """Three digits."""
    if not math.isfinite(value) or value == 0:
        return str(value)
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def measured_on(setting: Setting, repetitions: int) -> dict:
    facts = {
        "machine": environment.machine(),
        "versions": environment.versions() | {"peft": version("peft")},
        "script": their_version(setting.script),
        "device": setting.device,
        "threads": setting.threads,
        "repetitions": repetitions,
        "load_before": [round(value, 2) for value in os.getloadavg()],
    }
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def their_version(script: Path | None) -> dict[str, str]:
    """The release that the script says it needs, and the hash of the file."""
    import hashlib
    import re

    assert script is not None
    content = script.read_bytes()
    needs = re.search(rb'^check_min_version\("([^"]+)"\)', content, re.MULTILINE)
    return {
        "needs": needs.group(1).decode(errors="replace") if needs else "not said",
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def headline(facts: dict) -> str:
    where = facts["gpu"]["name"] if "gpu" in facts else facts["machine"]["processor"]
    names = ("torch", "diffusers", "peft", "transformers", "accelerate")
    packages = ", ".join(f"{name} {facts['versions'][name]}" for name in names)
    return (
        f"{where}, {facts['threads']} CPU thread(s); {packages}; the "
        f"script is that of diffusers {facts['script']['needs']}; medians of {facts['repetitions']} trainings each"
    )


if __name__ == "__main__":
    main()
