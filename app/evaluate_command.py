"""`lora-diffusion evaluate`: judge adapters, or sweep over one's weight and rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from train.evaluate_config import EvaluateConfig, is_sweep, validate


def evaluate(config: EvaluateConfig, debug: bool) -> int:
    """`lora-diffusion evaluate --model MODEL --adapter FILE … `."""
    validate(config)  # before torch is loaded: most mistakes are answered at once
    from app.console import Console, quieten
    from app.signals import StopWish

    if not debug:
        quieten()
    console = Console(out=sys.stderr if config.json else sys.stdout)
    with StopWish() as stop:
        try:
            if is_sweep(config):
                from train.sweep import in_words, sweep, table

                report, picture = sweep(config, on_event=console, should_stop=stop), "sweep.png"
            else:
                from train.evaluate import evaluate as judge
                from train.evaluate_report import in_words, table

                report, picture = judge(config, on_event=console, should_stop=stop), "comparison.png"
        finally:
            console.close()
    if report is None:
        console.say("stopped: no figures; the pictures drawn so far stay")
        return stop.exit_code
    if config.json:
        print(json.dumps(report, indent=2))
        return stop.exit_code
    folder = Path(config.output_dir)
    print("\n".join([table(report), "", *in_words(report)]))
    print(f"Look at   {folder / picture}")
    print(f"Figures   {folder / 'report.json'}")
    return stop.exit_code
