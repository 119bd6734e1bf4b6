"""What does an adapter cost: ours, PEFT's, and none?

    python benchmarks/engine.py --out benchmarks/engine.json
    python benchmarks/engine.py --quick --only step,bytes     # does it work? seconds, smallest shapes

Sections, one file each: step (`engine_step.py`), bytes, host, switch, mixed. Contestants take turns in one process, and
before anything is timed, ours and PEFT have to give the same outputs and gradients from the same factors; exit status 1
says that somewhere they did not. Runs on the GPU if there is one, and then times torch.compile's versions too. Prints
tables in Markdown and writes every figure as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import engine_bytes
import engine_host
import engine_mixed
import engine_step
import engine_switch
import torch
from engine_common import Setting

from train import environment

SECTIONS = {
    "step": engine_step,
    "bytes": engine_bytes,
    "host": engine_host,
    "switch": engine_switch,
    "mixed": engine_mixed,
}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    setting = Setting(device, args.repetitions or (3 if args.quick else 15), args.quick, compiled)
    facts: dict = {"measured_on": measured_on(setting), "command": sys.argv[1:], "sections": {}}
    print(headline(facts["measured_on"], setting), flush=True)
    wrong = []
    for name in args.only:
        began = time.perf_counter()
        rows = SECTIONS[name].measure(setting)
        print("\n" + SECTIONS[name].report(rows), flush=True)
        facts["sections"][name] = {"seconds": round(time.perf_counter() - began, 1), "rows": rows}
        if name == "step":
            facts["sections"][name]["summary"] = engine_step.summary(rows)
        wrong += [row for row in rows if "disagrees" in row]
        if args.out:  # after each section: what is measured is not lost to an error in the next
            args.out.write_text(json.dumps(facts, indent=1) + "\n")
    if "step" in args.only:
        print("\n" + engine_step.summary_lines(facts["sections"]["step"]["rows"], device.type.upper()))
    if wrong:
        sys.exit(f"{len(wrong)} rows were not timed: results differ from PEFT's")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=section_names, default=list(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="few repetitions of the smallest shapes")
    parser.add_argument("--repetitions", type=int, help="figures of each contestant (default: 15, quick: 3)")
    parser.add_argument(
        "--threads", type=int, default=1,
        help="of the CPU (default: 1, which other load disturbs least and which any machine has)",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="also time torch.compile (default: on a GPU)"
    )
    parser.add_argument("--out", type=Path, help="file for all figures")
    return parser.parse_args()


def section_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    return names


def measured_on(setting: Setting) -> dict:
    facts = {
        "machine": environment.machine(),
        "versions": environment.versions() | {"peft": version("peft")},
        "device": setting.device.type,
        "threads": torch.get_num_threads(),
        "repetitions": setting.repetitions,
        "batch": setting.batch,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "load_before": [round(value, 2) for value in os.getloadavg()],
    }
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        facts["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return facts


def headline(facts: dict, setting: Setting) -> str:
    where = facts["gpu"]["name"] if "gpu" in facts else facts["machine"]["processor"]
    packages = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "peft", "diffusers", "transformers"))
    return (
        f"{where}, {facts['threads']} CPU thread(s), load {facts['load_before'][0]:.1f} before the start; {packages}; "
        f"medians of {setting.repetitions} repetitions, ratios of what was measured side by side"
    )


if __name__ == "__main__":
    main()
