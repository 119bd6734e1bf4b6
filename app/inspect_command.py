"""`lora-diffusion inspect`: what is in an adapter file, and whether it fits a model."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from app.file_configs import InspectConfig
from app.file_output import megabytes, model_folder, say, size_of
from lora_diffusion.text import printable

_LINES = 12  # of a table, in a terminal
_HASH = {True: "intact", False: "BROKEN: the tensors are not those of the hash in the file", None: "none in the file"}


def inspect(config: InspectConfig, debug: bool) -> int:
    """`lora-diffusion inspect FILE`."""
    import lora_diffusion as ld
    from lora_diffusion.describe import describe

    adapter = ld.read_adapter(config.file)
    facts: dict[str, Any] = {"file": config.file, "bytes": size_of(config.file), **describe(adapter)}
    lines = [*_summary(facts), *_contents(facts), *_tables(facts)]
    if config.model is not None:
        from app.console import quieten

        if not debug:
            quieten()
        facts["fit"] = _fit(adapter, facts["base"], config.model, config.variant)
        lines += _fit_lines(facts["fit"])
    return say(facts, config.json, lines)


def _line(title: str, text: str) -> str:
    return f"{printable(title, 24):<11} {printable(text)}"


def _summary(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"{'file':<11} {facts['file']}",
        _line("size", f"{megabytes(facts['bytes'])}, {facts['parameters']:,} parameters in {facts['layers']} layers"),
        _line("dialect", str(facts["dialect"])),
    ]
    if facts["base"]:
        lines.append(_line("made for", facts["base"]))
    if facts["trigger_words"]:
        lines.append(_line("in prompts", ", ".join(facts["trigger_words"])))
    return [*lines, _line("hash", _HASH[facts["intact"]])]


def _contents(facts: dict[str, Any]) -> list[str]:
    lines = []
    for name, part in facts["components"].items():
        kinds = "" if list(part["kinds"]) == ["LoRA"] else f" of {' and '.join(part['kinds'])}"
        lines.append(
            f"{name:<11} {part['layers']} layers{kinds}, rank {_spread(part['ranks'])}, alpha {_spread(part['alphas'])}"
            f", scale {_spread(part['scales'])}, {part['parameters']:,} parameters in {' and '.join(part['dtypes'])}"
        )
    for word, parts in facts["tokens"].items():
        shapes = ", ".join(f"{component}: {shape[0]} of {shape[-1]}" for component, shape in parts.items())
        lines.append(_line("word", f"{word} ({shapes})"))
    for component, prompt in facts["prompts"].items():
        lines.append(_line("prompt", f"{component}: {prompt['kind']}, {prompt['shape']}"))
    for component, modules in facts["copies"].items():
        lines.append(_line("copies", f"{component}: {', '.join(modules)}"))
    idle = facts["without_effect"]
    if idle:
        lines.append(_line("no effect", f"{len(idle)} layers, such as {idle[0]}: their update is zero"))
    return lines


def _tables(facts: dict[str, Any]) -> list[str]:
    lines = []
    for title in ("metadata", "foreign"):
        table = list(facts[title].items())
        for key, value in table[:_LINES]:
            lines.append(_line(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
        if len(table) > _LINES:
            lines.append(_line("", f"and {len(table) - _LINES} more; --json has them all"))
    return lines + [_line("note", note) for note in facts["notes"]]


def _fit(adapter: Any, made_for: str | None, model: str, variant: str | None) -> dict[str, Any]:
    """Whether the adapter fits a model folder, as JSON values."""
    from lora_diffusion.folder_match import match_folder
    from train.saving import model_label

    folder = model_folder(model, variant)
    report, _ = match_folder(adapter, folder)
    label = model_label(model)
    same = None if made_for is None else made_for.rpartition("/")[2].lower() == label.rpartition("/")[2].lower()
    return {
        "model": label,
        "same_name": same,
        "base": report.base,
        "components": {
            component: {"layers": part.total, "matched": sorted(part.matched), "unmatched": part.unmatched}
            for component, part in report.components.items()
        },
        "complete": report.complete and report.matched > 0,
        "notes": folder.notes(),
    }


def _fit_lines(fit: dict[str, Any]) -> list[str]:
    lines = [_line("model", f"{fit['model']}: " + ("every layer fits" if fit["complete"] else "it does not fit"))]
    for component, part in fit["components"].items():
        verdict = fit["base"].get(component, "unknown")
        known = f"; the base in hand is {_VERDICTS[verdict]}" if verdict in _VERDICTS else ""
        lines.append("  " + _line(component, f"{len(part['matched'])} of {part['layers']} layers fit{known}"))
        for reason, count in Counter(part["unmatched"].values()).most_common(3):
            first = next(path for path, why in part["unmatched"].items() if why == reason)
            lines.append(_line("", f"{count} do not, such as {first}: {reason}"))
    return lines + [_line("note", note) for note in fit["notes"]]


_VERDICTS = {
    "same": "the one it was made for",
    "other weights": "of the same architecture with other weights than the one it was made for",
    "other architecture": "of another architecture than the one it was made for",
}


def _spread(values: list[float]) -> str:
    if not values:
        return "none"
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
