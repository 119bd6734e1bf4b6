"""`lora-diffusion plan`: the memory of a DreamBooth run before it starts, whether it fits, and what would make it."""

from __future__ import annotations

import json
from typing import Any

from app.plan_lines import card_lines, plan_lines
from train.plan_cards import Card, card_of
from train.plan_config import PlanConfig, validate


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
    lines += plan_lines(facts)
    return [*lines, "", *card_lines(facts)] if card is not None else lines
