"""The jobs behind the subcommands: run one, show it, say in words what came out.

Each takes a parsed config and whether debugging is on, and returns the exit code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from app.inspect_config import InspectConfig
from train.demo_config import DemoConfig
from train.dreambooth_config import DreamBoothConfig
from train.sample_config import SampleConfig


def dreambooth(config: DreamBoothConfig, debug: bool) -> int:
    """`lora-diffusion dreambooth`."""
    from train import dreambooth_config

    dreambooth_config.validate(config)  # before torch is loaded: most mistakes are answered at once
    with _job(debug) as (console, stop):
        from train.dreambooth import train

        result = train(config, on_event=console, should_stop=stop)
    print(f"adapter: {result.adapter}" if result.adapter else "stopped before the first step; nothing to save")
    if result.stopped:
        print(f"stopped after step {result.steps}; the same command with --resume_from_checkpoint latest goes on")
        return stop.exit_code
    model = config.pretrained_model_name_or_path
    print(f"{result.steps} steps in {result.seconds_training:.0f} s, {result.seconds:.0f} s in all")
    print(
        f"try: lora-diffusion sample --model {_quoted(model)} --adapter {_quoted(str(result.adapter))} "
        f"--prompt {_quoted(config.instance_prompt)}"
    )
    return 0


def sample(config: SampleConfig, debug: bool) -> int:
    """`lora-diffusion sample`."""
    with _job(debug) as (console, stop):
        from train.sample import sample as draw

        paths = draw(config, on_event=console, should_stop=stop)
    for path in paths:
        print(path)
    return stop.exit_code


def demo(config: DemoConfig, debug: bool) -> int:
    """`lora-diffusion demo`."""
    with _job(debug) as (console, stop):
        from train.demo import run_demo

        run_demo(config, console, should_stop=stop)
    return stop.exit_code


@contextmanager
def _job(debug: bool) -> Iterator[tuple[Any, Any]]:
    """A console for the job's events and the wish to stop; libraries keep quiet, unless debugging is on."""
    from app.console import Console, quieten
    from app.signals import StopWish

    if not debug:
        quieten()
    console = Console()
    with StopWish() as stop:
        try:
            yield console, stop
        finally:
            console.close()


def inspect(config: InspectConfig, debug: bool) -> int:
    """`lora-diffusion inspect FILE`."""
    import lora_diffusion as ld

    facts = describe(ld.read_adapter(config.file))
    if config.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    print(f"file        {config.file}")
    print(f"dialect     {facts['dialect']}")
    for name, part in facts["components"].items():
        print(
            f"{name:<11} {part['layers']} layers, rank {_spread(part['ranks'])}, scale {_spread(part['scales'])}, "
            f"{part['parameters']:,} parameters"
        )
    for title in ("metadata", "foreign"):
        for key, value in facts[title].items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            print(f"{key:<11} {text if len(text) <= 200 else text[:197] + '...'}")
    for note in facts["notes"]:
        print(f"note        {note}")
    return 0


def describe(adapter: Any) -> dict[str, Any]:
    """What is in an `Adapter`, as JSON-ready values."""
    components = {}
    for name, layers in adapter.components.items():
        components[name] = {
            "layers": len(layers),
            "ranks": sorted({layer.rank for layer in layers.values()}),
            "scales": sorted({round(layer.scale, 6) for layer in layers.values()}),
            "parameters": sum(layer.a.numel() + layer.b.numel() for layer in layers.values()),
            "dtypes": sorted({str(layer.a.dtype).removeprefix("torch.") for layer in layers.values()}),
            "paths": sorted(layers),
        }
    return {
        "dialect": adapter.dialect,
        "components": components,
        "metadata": adapter.metadata,
        "foreign": adapter.foreign,
        "notes": adapter.notes,
    }


def _spread(values: list[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
