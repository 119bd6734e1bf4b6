"""The command `lora-diffusion`: a table of subcommands, one way in, one way out.

What a subcommand needs is imported when it is called, so that `--help` answers at once. Errors are one line on stderr;
exit code 2 is misuse, 1 a failure, 130 an interruption.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.options import parse
from lora_diffusion.errors import ConfigError, LoraDiffusionError
from train.config import nearest

PROGRAM = "lora-diffusion"


@dataclass(frozen=True)
class Command:
    """A subcommand. `config` and `run` are written 'module:name' and imported when needed."""

    name: str
    help: str
    config: str
    run: str
    unsupported: str | None = None


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "demo",
            "five shipped photos of a subject in, an adapter and a picture of the result out, in minutes",
            "train.demo_config:DemoConfig",
            "app.commands:demo",
        ),
        Command(
            "dreambooth",
            "train an adapter on a few photos of your own subject",
            "train.dreambooth_config:DreamBoothConfig",
            "app.commands:dreambooth",
            "train.dreambooth_config:UNSUPPORTED_FLAGS",
        ),
        Command(
            "text",
            "train an adapter of a language model on rows of text",
            "train.text_config:TextConfig",
            "app.commands:text",
            "train.text_config:UNSUPPORTED_FLAGS",
        ),
        Command(
            "plan",
            "say how much memory a training will take, whether it fits on a card, and what would make it fit",
            "train.plan_config:PlanConfig",
            "app.plan_command:plan",
            "train.dreambooth_config:UNSUPPORTED_FLAGS",
        ),
        Command(
            "plan text",
            "the same for a text run",
            "train.text_plan_config:TextPlanConfig",
            "app.text_plan_command:plan_text",
            "train.text_config:UNSUPPORTED_FLAGS",
        ),
        Command(
            "sample",
            "draw pictures with a model and any number of adapters",
            "train.sample_config:SampleConfig",
            "app.commands:sample",
        ),
        Command(
            "generate",
            "let a language model with adapters write, or judge texts",
            "train.generate_config:GenerateConfig",
            "app.generate_command:generate",
        ),
        Command(
            "evaluate",
            "judge adapters: likeness, prompt following, what else has changed",
            "train.evaluate_config:EvaluateConfig",
            "app.evaluate_command:evaluate",
        ),
        Command(
            "inspect",
            "say what is in an adapter file, and whether it fits a model",
            "app.file_configs:InspectConfig",
            "app.inspect_command:inspect",
        ),
        Command(
            "convert",
            "write an adapter in another tool's format",
            "app.file_configs:ConvertConfig",
            "app.file_commands:convert",
        ),
        Command(
            "combine",
            "one adapter out of several, each with a weight",
            "app.file_configs:CombineConfig",
            "app.file_commands:combine",
        ),
        Command(
            "resize",
            "bring an adapter to another rank",
            "app.file_configs:ResizeConfig",
            "app.file_commands:resize",
        ),
        Command(
            "extract",
            "an adapter out of the difference of two models",
            "app.file_configs:ExtractConfig",
            "app.model_commands:extract",
        ),
        Command(
            "merge",
            "a model folder with adapters added to its weights",
            "app.file_configs:MergeConfig",
            "app.model_commands:merge",
        ),
        Command(
            "app",
            "a page in the browser: train, watch, draw, write, and keep adapters in order",
            "app.web_config:AppConfig",
            "app.web_command:app",
        ),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. One of several processes ends here and now."""
    code = _answer(argv)
    if "train.distributed" in sys.modules:
        sys.modules["train.distributed"].leave(code)
    return code


def _answer(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("LORA_DIFFUSION_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _dispatch(arguments, debug)
    except LoraDiffusionError as problem:
        if debug:
            raise
        return _fail(" ".join(str(problem).split()), problem.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as problem:
        if debug:
            raise
        what = " ".join(str(problem).split())
        return _fail(f"{type(problem).__name__}: {what} (unexpected; --debug shows where)", 1)


def _dispatch(arguments: list[str], debug: bool) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"{PROGRAM} {_version()}")
        return 0
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in COMMANDS:
        raise ConfigError(f"there is no subcommand {name!r}{nearest(name, COMMANDS) or '; see lora-diffusion --help'}")
    command = COMMANDS[name]
    try:
        config = parse(
            _named(command.config),
            rest,
            program=f"{PROGRAM} {name}",
            description=command.help,
            unsupported=_named(command.unsupported) if command.unsupported else None,
        )
    except SystemExit as done:  # argparse has printed the help
        return int(done.code or 0)
    if not debug:
        _quieten_early()
    return int(_named(command.run)(config, debug))


def overview() -> str:
    """What `lora-diffusion --help` says."""
    width = max(map(len, COMMANDS))
    rows = [f"  {command.name:<{width}}  {command.help}" for command in COMMANDS.values()]
    return "\n".join(
        [
            f"usage: {PROGRAM} SUBCOMMAND [--flag value …]",
            "",
            "Adapters for diffusion and language models: train one on your own photos or texts, use it in any tool.",
            "",
            "subcommands:",
            *rows,
            "",
            f"{PROGRAM} SUBCOMMAND --help lists its flags; --debug shows tracebacks.",
        ]
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(PROGRAM)
    except PackageNotFoundError:
        return "(not installed, run from its source)"


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _fail(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    print(f"error{'' if rank == '0' else f' in process {rank}'}: {message}", file=sys.stderr)
    return code


def _quieten_early() -> None:
    """What other libraries read from the environment when they are imported: no chatter beside our own."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main())
