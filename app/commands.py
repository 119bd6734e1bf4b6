"""The jobs behind the subcommands: run one, show it, say in words what came out.

Each takes a parsed config and whether debugging is on, and returns the exit code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from train.demo_config import DemoConfig
from train.dreambooth_config import DreamBoothConfig
from train.sample_config import SampleConfig
from train.text_config import TextConfig


def dreambooth(config: DreamBoothConfig, debug: bool) -> int:
    """`lora-diffusion dreambooth`."""
    from train.dreambooth_checks import validate

    validate(config)  # before torch is loaded: most mistakes are answered at once
    with _job(debug) as (console, stop):
        from train.distributed import launched_as
        from train.dreambooth import train

        result = train(config, on_event=console, should_stop=stop)
    if launched_as() > 0:  # process 0 speaks for all
        return stop.exit_code
    print(f"adapter: {result.adapter}" if result.adapter else "stopped before the first step; nothing to save")
    if result.best:
        print(f"best: {result.best} (step {result.best_step})")
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


def text(config: TextConfig, debug: bool) -> int:
    """`lora-diffusion text`."""
    from train.text_checks import validate

    validate(config)  # before torch is loaded: most mistakes are answered at once
    with _job(debug) as (console, stop):
        from train.distributed import launched_as
        from train.text import train

        result = train(config, on_event=console, should_stop=stop)
    if launched_as() > 0:  # process 0 speaks for all
        return stop.exit_code
    print(f"adapter: {result.adapter}")
    if result.best:
        print(f"best: {result.best} (step {result.best_step})")
    if result.stopped:
        print(f"stopped after step {result.steps}; the same command with --resume_from_checkpoint latest goes on")
        return stop.exit_code
    for part, figures in result.figures.items():
        print(f"{part}: {', '.join(f'{name} {value:.4g}' for name, value in figures.items())}")
    print(f"{result.steps} steps in {result.seconds_training:.0f} s, {result.seconds:.0f} s in all")
    model, rows = config.pretrained_model_name_or_path, config.test_file or config.validation_file or config.train_file
    asked = "--prompt …" if rows is None or rows.endswith(".txt") else f"--input_file {_quoted(rows)}"
    adapter = _quoted(str(result.best or result.adapter))
    print(f"try: lora-diffusion generate --model {_quoted(model)} --adapter {adapter} {asked}")
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


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
