"""The memory table of the DreamBooth benchmark, on a GPU: planned by `lora-diffusion plan`, and measured."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from dreambooth_cases import ROOT, Case, Material, material, memory_cases
from dreambooth_contestants import Setting, ours, run, theirs
from engine_common import markdown

GIB = 2**30
BASES = {None: "fp16", "int8": "int8", "nf4": "NF4 + int8"}


def measure(setting: Setting, precision: str) -> dict[str, Any]:
    """Each cell planned and measured; the script, which knows no quantised base, beside the fp16 cells.

    Without a CUDA device the plans are made all the same, and the other columns stay empty.
    """
    cells = []
    for case in memory_cases(precision):
        at = material(case, setting.scratch)
        cell: dict[str, Any] = {"case": dataclasses.asdict(case), "name": case.name}
        cells.append(cell)
        cell["planned"], cell["not_planned"] = planned(case, at, setting)
        if setting.device != "cuda":
            cell["not_measured"] = "there is no CUDA device here"
            continue
        if case.quantize and not knows_quantize():
            cell["not_measured"] = "this version has no --quantize"
            continue
        output = setting.scratch / "runs" / "memory"
        for name, command in (("measured", ours), *([] if case.quantize else [("theirs", theirs)])):
            found = run(command(case, at, output, setting), case, output, setting)
            peak = found.peak_whole if name == "measured" else found.peak  # theirs loads a second model when it is done
            cell[name], cell[f"not_{name}"] = (None, found.failed) if found.failed else (peak, "")
            cell[f"{name}_reserved"] = found.reserved
    return {"cells": cells}


def knows_quantize() -> bool:
    from train.dreambooth_config import DreamBoothConfig

    return any(field.name == "quantize" for field in dataclasses.fields(DreamBoothConfig))


def planned(case: Case, at: Material, setting: Setting) -> tuple[int | None, str]:
    """Bytes at the peak by `lora-diffusion plan`, or None and why there is no figure."""
    from app.cli import COMMANDS

    if "plan" not in COMMANDS:
        return None, "this version has no plan command"
    if case.quantize and not knows_quantize():
        return None, "this version has no --quantize"
    on_cuda = dataclasses.replace(setting, device="cuda")
    flags = ours(case, at, setting.scratch / "runs" / "memory", on_cuda)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "plan", *flags, "--json"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=setting.limit,
    )  # fmt: skip
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
    return int(json.loads(done.stdout)["peak"]), ""


def report(found: dict[str, Any]) -> str:
    header = [
        "SD 1.5's architecture, 512²", "base", "planned, GiB", "measured, GiB", "planned / measured",
        "diffusers' script, GiB",
    ]  # fmt: skip
    lines, reasons = [], []
    for cell in found["cells"]:
        case = Case(**cell["case"])
        where = dataclasses.replace(case, quantize=None, precision="no").name.split(", ", 1)[1]
        plan, own = cell["planned"], cell.get("measured")
        lines.append(
            [
                where,
                BASES[case.quantize],
                _gib(plan),
                _gib(own),
                f"{plan / own:.2f}" if plan and own else "",
                _gib(cell.get("theirs")),
            ]
        )
        for key in ("not_planned", "not_measured", "not_theirs"):
            if cell.get(key):
                reasons.append(f"- {key.replace('_', ' ')}: {cell[key]}")
    return markdown(header, lines) + "\n\n" + "\n".join(dict.fromkeys(reasons))


def _gib(value: int | None) -> str:
    return "" if value is None else f"{value / GIB:.2f}"
