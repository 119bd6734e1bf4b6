"""Step time: forward, and backward to the input and the factors, against PEFT and against the frozen model."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch
from engine_cases import ATTENTION, CASES, Case, built
from engine_common import DTYPES, Setting, markdown, notes, sections
from engine_contestants import (
    Contestant,
    DisagreementError,
    check,
    check_twin,
    frozen,
    random_gradients,
    same_factors,
    with_ours,
    with_peft,
)
from engine_timing import take_turns

import lora_diffusion as ld

DROPOUTS = (0.0, 0.1)
COMPILED = " compiled"


def measure(setting: Setting) -> list[dict]:
    rows = []
    for case in CASES:
        if case.quick or not setting.quick:
            for dtype in DTYPES:
                for dropout in DROPOUTS:
                    rows.append(_row(case, dtype, dropout, setting))
                    if setting.device.type == "cuda":
                        torch.cuda.empty_cache()
    return rows


def _row(case: Case, dtype: str, dropout: float, setting: Setting) -> dict:
    row: dict = {"name": case.name, "group": case.group, "dtype": dtype, "dropout": dropout, "batch": setting.batch}
    base = built(case, setting.device, DTYPES[dtype])
    x, context = case.inputs(setting.batch, setting.device, DTYPES[dtype])
    try:
        contestants = {
            "floor": frozen(base),
            "PEFT": with_peft(base, case.targets, dropout=dropout, transposed=case.transposed),
            "ours": with_ours(base, case.targets, dropout=dropout),
        }
        same_factors(contestants["PEFT"], contestants["ours"])
        gradients = random_gradients(contestants["floor"], x, context)
        row["agreement"] = check(contestants["ours"], contestants["PEFT"], x, context, gradients, dropout)
    except ld.LoraDiffusionError as error:
        return row | {"skipped": str(error)}
    except DisagreementError as error:
        return row | {"disagrees": str(error)}
    runs: dict[str, Callable[[], object]] = {
        name: functools.partial(contestant.step, x, context, gradients) for name, contestant in contestants.items()
    }
    if setting.compiled:
        for name, contestant in contestants.items():
            twin = Contestant(torch.compile(contestant.module), contestant.factors)
            run = functools.partial(twin.step, x, context, gradients)
            try:
                if not dropout:
                    check_twin(twin, contestant, x, context, gradients)
                run()
            except Exception as error:  # whatever the compiler raises: the row goes on without this contestant
                row.setdefault("not_compiled", {})[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                runs[name + COMPILED] = run
    timing = take_turns(runs, setting.device, setting.repetitions)
    torch.compiler.reset()
    ratios = {name: timing.ratio(name, "floor") for name in runs if name != "floor"}
    row["seconds"] = {name: timing.median(name) for name in runs}
    row["to_floor"] = ratios
    row["ours_to_peft"] = timing.ratio("ours", "PEFT")
    return row | {"figures": timing.figures()}


def report(rows: list[dict]) -> str:
    """A table for each group of shapes and dtype, with its medians."""
    parts = []
    for group in dict.fromkeys(row["group"] for row in rows):
        for dtype in DTYPES:
            mine = [row for row in rows if (row["group"], row["dtype"]) == (group, dtype)]
            timed = [row for row in mine if "seconds" in row]
            title = f"### Step time: {group}, {dtype}"
            left_out = [
                {"name": f"{row['name']}, {name}{COMPILED}", "skipped": reason}
                for row in timed
                for name, reason in row.get("not_compiled", {}).items()
            ]
            if mine:
                parts.append(sections(title, _table(timed) if timed else "", notes([*mine, *left_out])))
    return sections(*parts)


def _table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    header = [
        "shape", "dropout", *(f"{name}, ms" for name in names),
        *(f"{name} / floor" for name in names if name != "floor"), "ours / PEFT",
    ]  # fmt: skip
    lines = []
    for row in rows:
        lines.append([
            row["name"], f"{row['dropout']:g}",
            *(f"{row['seconds'][name] * 1e3:.3g}" if name in row["seconds"] else "–" for name in names),
            *(f"{row['to_floor'][name]:.2f}" if name in row["to_floor"] else "–" for name in names if name != "floor"),
            f"{row['ours_to_peft']:.2f}",
        ])  # fmt: skip
    for dropout in DROPOUTS:
        of = [row for row in rows if row["dropout"] == dropout]
        if of:
            lines.append([
                "**median**", f"{dropout:g}", *("" for _ in names),
                *(f"**{_median(of, name):.2f}**" for name in names if name != "floor"),
                f"**{statistics.median(row['ours_to_peft'] for row in of):.2f}**",
            ])  # fmt: skip
    return markdown(header, lines)


def _median(rows: list[dict], name: str) -> float:
    values = [row["to_floor"][name] for row in rows if name in row["to_floor"]]
    return statistics.median(values) if values else float("nan")


def summary(rows: list[dict]) -> dict:
    """Medians over shapes, the worst ratio to PEFT, and the headline."""
    timed = [row for row in rows if "seconds" in row]
    if not timed:
        return {}
    worst = max(timed, key=lambda row: row["ours_to_peft"])
    facts: dict = {
        "shapes_timed": len(timed),
        "median_ours_to_floor": statistics.median(row["to_floor"]["ours"] for row in timed),
        "median_peft_to_floor": statistics.median(row["to_floor"]["PEFT"] for row in timed),
        "median_ours_to_peft": statistics.median(row["ours_to_peft"] for row in timed),
        "worst_ours_to_peft": worst["ours_to_peft"],
        "worst_is": f"{worst['name']}, {worst['dtype']}, dropout {worst['dropout']:g}",
    }
    head = [row for row in timed if (row["group"], row["dtype"], row["dropout"]) == (ATTENTION, "fp32", 0.0)]
    if head:
        facts["headline_ours_to_floor"] = statistics.median(row["to_floor"]["ours"] for row in head)
        facts["headline_peft_to_floor"] = statistics.median(row["to_floor"]["PEFT"] for row in head)
    return facts


def summary_lines(rows: list[dict], device: str) -> str:
    facts = summary(rows)
    if not facts:
        return ""
    line = (
        f"All {facts['shapes_timed']} rows: median ours / floor {facts['median_ours_to_floor']:.2f}, PEFT / floor "
        f"{facts['median_peft_to_floor']:.2f}, ours / PEFT {facts['median_ours_to_peft']:.2f}; worst ours / PEFT "
        f"{facts['worst_ours_to_peft']:.2f} ({facts['worst_is']})."
    )
    if "headline_ours_to_floor" in facts:
        line += (
            f"\n\n**Headline, {ATTENTION}, {device}, fp32, no dropout: median ours / floor "
            f"{facts['headline_ours_to_floor']:.2f}** (PEFT / floor {facts['headline_peft_to_floor']:.2f})."
        )
    return line
