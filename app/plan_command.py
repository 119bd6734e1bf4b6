"""`lora-diffusion plan`: the memory of a DreamBooth run before it starts, whether it fits, and what would make it."""

from __future__ import annotations

import json
import shutil
from typing import Any

from train.plan_cards import Card, card_of
from train.plan_config import PlanConfig, validate

_BAR = 34
_MARKS = {"weights": "█", "adapters": "▓", "gradients": "▓", "optimizer": "▓", "activations": "▒", "workspace": "░"}


def plan(config: PlanConfig, debug: bool) -> int:
    """`lora-diffusion plan`; exit code 0 if it fits, 3 if it does not."""
    validate(config)
    card = card_of(config.gpu, config.memory)
    if not debug:
        from app.console import quieten

        quieten()
    from train.plan import plan_run, resolved
    from train.plan_advice import advise
    from train.plan_models import blueprint

    device = "cpu" if config.device == "cpu" else "cuda"
    model = blueprint(config.pretrained_model_name_or_path, config.revision)
    settings = resolved(config, model, device=device, card=card)
    made = plan_run(settings, model, device=device, card=card)
    room = card.memory if card is not None else None
    advice = None
    if room is not None and made.needed > room:
        advice = advise(settings, model, lambda one: plan_run(one, model, device=device, card=card), room)
    facts = {**_about(settings), **made.to_dict(), **_verdict(card, made.needed, advice)}
    if config.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(_lines(facts, card)))
    return 0 if facts.get("fits", True) else 3


def _about(settings: Any) -> dict[str, Any]:
    names = ("resolution", "mixed_precision", "train_batch_size", "gradient_checkpointing", "train_text_encoder",
             "rank", "quantize")  # fmt: skip
    return {"model": settings.pretrained_model_name_or_path, **{name: getattr(settings, name) for name in names}}


def _verdict(card: Card | None, needed: int, advice: Any) -> dict[str, Any]:
    if card is None:
        return {}
    facts: dict[str, Any] = {"card": card.title, "memory": card.memory, "fits": needed <= card.memory}
    if advice is not None:
        facts["change"] = {
            "fits": advice.fits,
            "flags": [change.flags() for change in advice.changes],
            "why": [change.what for change in advice.changes],
            "peak": advice.plan.peak,
            "needed": advice.plan.needed,
        }
    return facts


def _lines(facts: dict[str, Any], card: Card | None) -> list[str]:
    words = [f"{facts['resolution']} px", f"batch {facts['train_batch_size']}"]
    words.append({"no": "fp32"}.get(facts["mixed_precision"], facts["mixed_precision"]))
    words += [f"base in {facts['quantize']}"] if facts["quantize"] else []
    words += ["checkpointing"] if facts["gradient_checkpointing"] else []
    words += ["text encoder too"] if facts["train_text_encoder"] else []
    lines = [f"{facts['model']}: {', '.join(words)}, rank {facts['rank']}, on {facts['device']}", ""]
    longest = max(phase["peak"] for phase in facts["phases"].values())
    width = min(_BAR, max(10, shutil.get_terminal_size().columns - 40))
    for name, phase in facts["phases"].items():
        mark = " <" if name == facts["phase"] else ""
        lines.append(f"{name:<15} {gib(phase['peak'])}  {_bar(phase['parts'], longest, width)}{mark}")
    lines += ["", f"{'at the peak':<15} {gib(facts['peak'])}  ({facts['phase']})"]
    for part, size in facts["parts"].items():
        if size:
            lines.append(f"  {part:<13} {gib(size)}  {_MARKS.get(part, '')}")
    aside = "CUDA context, and blocks kept by the allocator" if facts["device"] == "cuda" else "Python and libraries"
    lines.append(f"{'needed':<15} {gib(facts['needed'])}  with {aside}")
    return [*lines, "", *_card_lines(facts)] if card is not None else lines


def _card_lines(facts: dict[str, Any]) -> list[str]:
    there = f"{facts['card']} ({gib(facts['memory']).strip()})"
    if facts["fits"]:
        return [f"it fits on {there}: {gib(facts['memory'] - facts['needed']).strip()} to spare"]
    change = facts["change"]
    lines = [f"it does not fit on {there}: {gib(facts['needed'] - facts['memory']).strip()} too much"]
    if not change["fits"]:
        return [*lines, f"nor with {' '.join(change['flags'])}, which needs {gib(change['needed']).strip()}"]
    lines.append(f"it fits with {' '.join(change['flags'])}: {gib(change['needed']).strip()} needed")
    return lines + [f"  {flags}: {why}" for flags, why in zip(change["flags"], change["why"])]


def _bar(parts: dict[str, int], longest: int, width: int) -> str:
    bar, total, drawn = "", 0, 0
    for part, size in parts.items():
        total += size
        end = round(total / max(longest, 1) * width)
        bar += _MARKS.get(part, "░") * (end - drawn)
        drawn = end
    return bar


def gib(size: int) -> str:
    return f"{size / 2**30:6.2f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:6.1f} MiB"
