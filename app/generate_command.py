"""`lora-diffusion generate`: texts appear as they are written, answers as lines or as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

from lora_diffusion.text import printable
from train.generate_config import GenerateConfig, validate

PROMPT_LENGTH = 100  # characters of a prompt in front of its answer


def generate(config: GenerateConfig, debug: bool) -> int:
    """`lora-diffusion generate --model MODEL --adapter FILE --prompt "…"`."""
    validate(config)  # before torch is loaded: most mistakes are answered at once
    from app.console import quieten
    from app.signals import StopWish

    if not debug:
        quieten()
    show = JsonLines() if config.json else Streamed(compare=config.compare)
    with StopWish() as stop:
        from train.generate import answers

        answers(config, on_event=show, should_stop=stop)
    if config.output_file is not None and not config.json:
        print(f"answers: {config.output_file}")
    return stop.exit_code


class JsonLines:
    """Every answer is one JSON line; warnings go to stderr."""

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "warning":
            print(f"warning: {event['message']}", file=sys.stderr)
        if event["event"] == "answer":
            record = {name: value for name, value in event.items() if name not in ("event", "index")}
            print(json.dumps(record, ensure_ascii=False), flush=True)


class Streamed:
    """Words: what is asked, where there is more than one thing, and the answer as it grows.

    Args:
        compare: each answer comes after that of the base, and both are named.
        out: where to write.
    """

    def __init__(self, *, compare: bool, out: TextIO | None = None) -> None:
        self._compare, self._out = compare, out or sys.stdout
        self._questions = 1
        self._writing = False

    def __call__(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _on_warning(self, event: dict[str, Any]) -> None:
        print(f"warning: {event['message']}", file=sys.stderr)

    def _on_start(self, event: dict[str, Any]) -> None:
        self._questions = event["questions"]

    def _on_writing(self, event: dict[str, Any]) -> None:
        self._writing = True
        if self._questions > 1 and (event["base"] or not self._compare):
            row = {name: value for name, value in event.items() if name not in ("event", "index", "base", "of")}
            asked = row["prompt"] if set(row) == {"prompt"} else json.dumps(row, ensure_ascii=False)
            self._say(f"[{event['index'] + 1}/{event['of']}] {printable(str(asked), PROMPT_LENGTH)}\n")
        if self._compare:
            self._say("base:    " if event["base"] else "\nadapted: ")

    def _on_piece(self, event: dict[str, Any]) -> None:
        self._say(_shown(event["text"]))

    def _on_answer(self, event: dict[str, Any]) -> None:
        if self._writing:
            self._say("\n")
            return
        asked = printable(str(event["prompt"]), PROMPT_LENGTH) if "prompt" in event else str(event["index"] + 1)
        base = f"   (base: {printable(event['base'])})" if "base" in event else ""
        self._say(f"{asked} → {printable(event['prediction'], 2000)}{base}\n")

    def _say(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def _shown(text: str) -> str:
    """A text without characters that steer a terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
