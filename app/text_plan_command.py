"""`lora-diffusion plan text`: the memory of a text run before it starts, whether it fits, and what would make it."""

from __future__ import annotations

import json
from typing import Any

from app.plan_lines import card_lines, gib, plan_lines
from train.plan_cards import Card, card_of
from train.text_plan_config import TextPlanConfig, validate


def plan_text(config: TextPlanConfig, debug: bool) -> int:
    """`lora-diffusion plan text`; exit code 0 if it fits, 3 if it does not."""
    validate(config)
    card = card_of(config.gpu, config.memory)
    if not debug:
        from app.console import quieten

        quieten()
    from train.text_plan import plan_text as make_plan
    from train.text_plan import resolved_text
    from train.text_plan_advice import advise_text
    from train.text_plan_models import text_model
    from train.text_plan_parts import base_bytes

    device = "cpu" if config.device == "cpu" else "cuda"
    labels = 1 if config.regression else len((config.labels or "1,2").split(","))
    model = text_model(
        config.pretrained_model_name_or_path, config.task, labels=labels, revision=config.revision,
        attn_implementation=config.attn_implementation,
    )  # fmt: skip
    settings = resolved_text(config, model, device=device, card=card)

    def plan_for(one: Any) -> Any:
        return make_plan(
            one, model, device=device, card=card, answer_length=config.answer_length, processes=config.processes
        )

    made = plan_for(settings)
    facts = {**_about(settings), **made.to_dict()}
    if config.fsdp_cpu_offload:
        from train.models import PRECISIONS

        size = next(parameter.element_size() for parameter in model.parameters())
        facts["main_memory"] = base_bytes(model) * PRECISIONS[settings.mixed_precision].itemsize // size
    if card is not None:
        facts |= {"card": card.title, "memory": card.memory, "fits": made.needed <= card.memory}
        if made.needed > card.memory:
            facts["change"] = _change(advise_text(settings, plan_for, card.memory))
    print(json.dumps(facts, indent=2) if config.json else "\n".join(_lines(facts, card)))
    return 0 if facts.get("fits", True) else 3


def _about(settings: Any) -> dict[str, Any]:
    names = (
        "task", "method", "max_length", "train_batch_size", "mixed_precision", "gradient_checkpointing", "quantize",
        "fsdp", "fsdp_cpu_offload",
    )  # fmt: skip
    return {"model": settings.pretrained_model_name_or_path, **{name: getattr(settings, name) for name in names}}


def _change(advice: Any) -> dict[str, Any]:
    return {
        "fits": advice.fits,
        "flags": [change.flags() for change in advice.changes],
        "why": [change.what for change in advice.changes],
        "peak": advice.plan.peak,
        "needed": advice.plan.needed,
    }


def _lines(facts: dict[str, Any], card: Card | None) -> list[str]:
    words = [facts["task"], facts["method"], f"{facts['train_batch_size']} × {facts['max_length']} tokens"]
    words.append({"no": "fp32"}.get(facts["mixed_precision"], facts["mixed_precision"]))
    words += [f"base in {facts['quantize']}"] if facts["quantize"] else []
    words += ["checkpointing"] if facts["gradient_checkpointing"] else []
    words += ["base in main memory" if facts["fsdp_cpu_offload"] else "base in parts"] if facts["fsdp"] else []
    lines = [f"{facts['model']}: {', '.join(words)}, on {facts['device']}", "", *plan_lines(facts)]
    if "main_memory" in facts:
        lines.append(f"{'main memory':<15} {gib(facts['main_memory'])}  for the base, all processes together")
    return [*lines, "", *card_lines(facts)] if card is not None else lines
