"""Host time of one adapted call: a Linear so small that only the Python around it counts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
from engine_common import Setting, markdown, notes, sections
from engine_contestants import (
    FP32_TOLERANCE,
    DisagreementError,
    peft_activate,
    same_factors,
    with_ours,
    with_peft,
)
from engine_timing import take_turns
from peft.tuners.lora import LoraLayer
from torch import nn

import lora_diffusion as ld

WIDTH = 64
NAMES = ("dog", "cup")


def measure(setting: Setting) -> list[dict]:
    """Rows: one active adapter, two, none (both are there, disabled); and q, k, v called in turn on one x."""
    rows = []
    for targets in (("q_proj",), ("q_proj", "k_proj", "v_proj")):
        torch.manual_seed(0)
        base = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in targets}).to(setting.device).eval()
        peers = with_peft(base, targets, names=NAMES)
        try:
            ours = with_ours(base, targets, names=NAMES)
            same_factors(peers, ours)
            modules = {"Linear": base, "PEFT": peers.module, "ours": ours.module}
            for state, active in (("one adapter", NAMES[:1]), ("two adapters", NAMES), ("disabled", NAMES[:1])):
                rows.append(_row(modules, targets, state, active, setting))
        except ld.LoraDiffusionError as error:
            rows.append({"name": ", ".join(targets), "skipped": str(error)})
        except DisagreementError as error:
            rows.append({"name": ", ".join(targets), "disagrees": str(error)})
    return rows


def _row(
    modules: dict[str, nn.Module], targets: Sequence[str], state: str, active: Sequence[str], setting: Setting
) -> dict:
    """Seconds per call of one layer."""
    name = state if len(targets) == 1 else f"{state}, mean of q, k, v on one x"
    disabled = state == "disabled"
    x = torch.randn(1, WIDTH, device=setting.device)
    peft_activate(modules["PEFT"], list(active))
    for layer in modules["PEFT"].modules():
        if isinstance(layer, LoraLayer):
            layer.enable_adapters(not disabled)
    ld.set_adapters(modules["ours"], list(active))
    with ld.disable_adapters(modules["ours"]) if disabled else contextlib.nullcontext(), torch.no_grad():
        layers = {who: [module[target] for target in targets] for who, module in modules.items()}
        for expected, found in zip(_outputs(layers["PEFT"], x), _outputs(layers["ours"], x)):
            if not (expected - found).abs().max() <= FP32_TOLERANCE * expected.abs().max():
                raise DisagreementError(f"ours and PEFT's outputs differ with {name}")
        # One layer is called directly: a list around it would cost as much as what is measured.
        runs = {
            who: functools.partial(of[0], x) if len(of) == 1 else functools.partial(_outputs, of, x)
            for who, of in layers.items()
        }
        timing = take_turns(runs, setting.device, max(setting.repetitions, 5), host=True, least_s=2e-2)
    return {
        "name": name,
        "seconds": {who: timing.median(who) / len(targets) for who in runs},
        "ours_to_peft": timing.ratio("ours", "PEFT"),
        "calls_in_figures": len(targets),
        "figures": timing.figures(),
    }


def _outputs(layers: list[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    return [layer(x) for layer in layers]


def report(rows: list[dict]) -> str:
    header = ["64 × 64, one token", "Linear, µs", "PEFT, µs", "ours, µs", "PEFT adds", "ours adds", "ours / PEFT"]
    lines = []
    for row in rows:
        if "seconds" in row:
            bare, peers, ours = (row["seconds"][who] * 1e6 for who in ("Linear", "PEFT", "ours"))
            lines.append([
                row["name"], f"{bare:.2f}", f"{peers:.2f}", f"{ours:.2f}", f"{peers - bare:.2f}", f"{ours - bare:.2f}",
                f"{row['ours_to_peft']:.2f}",
            ])  # fmt: skip
    return sections("### Host time per call, no gradients", markdown(header, lines) if lines else "", notes(rows))
