"""The lecture's memory table (PEFT's README: T0-3B, mT0-XXL, BLOOMZ-7B1 on an A100 of 80 GB) beside what `plan` says.

    python examples/lecture/memory.py            prints the table; some minutes on one core, and no memory to speak of
    python examples/lecture/memory.py --write    puts it into this folder's README.md

Every figure of ours is `lora-diffusion plan text` for one row in a batch: the real architecture's code runs forward and
backward with tensors that have shapes only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_diffusion.planning.plan import Plan
from train.plan import RunPlan
from train.plan_cards import CARDS, CONTEXT
from train.text_plan import plan_text, resolved_text, text_job
from train.text_plan_batches import example_batch, loss_of
from train.text_plan_config import TextPlanConfig
from train.text_plan_models import text_model
from train.text_plan_parts import base_bytes
from train.text_plan_phases import TRAINING, TextJob, phases_of_text

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- memory.py: begin -->", "<!-- memory.py: end -->"
CARD = CARDS["a100"]
GIB = 2**30

# RAFT's twitter_complaints as PEFT's example has it: "Tweet text : … Label : " filled up to 64 tokens (max_length), and
# "complaint" or "no complaint" with the end of text, 5 tokens at most. For the two sequence-to-sequence models the
# example fills nothing up; the same 64 for the encoder and 5 for the decoder are assumed.
LENGTH, ANSWER = 64, 5


@dataclass(frozen=True)
class Way:
    """A way of training. key: of the reference's figures. settings: of `lora-diffusion plan text`; None: every weight
    learns in fp32, outside of the recipe."""

    words: str
    key: str | None
    settings: dict[str, Any] | None


@dataclass(frozen=True)
class Model:
    """A model of the table. printed: {way: (GPU, CPU)} as PEFT's README and the lecture print them, in GB."""

    name: str
    title: str
    task: str
    printed: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """A row of the table. main: bytes in main memory for the base, where it lies there."""

    model: Model
    way: Way
    plan: RunPlan
    main: int | None


MODELS = (
    Model("t0-3b", "T0-3B", "seq2seq-lm",
          {"full": ("47.14", "2.96"), "lora": ("14.4", "2.96"), "offload": ("9.8", "17.8")}),
    Model("mt0-xxl", "mT0-XXL (12B)", "seq2seq-lm",
          {"full": ("OOM", "–"), "lora": ("56", "3"), "offload": ("22", "52")}),
    Model("bloomz-7b1", "BLOOMZ-7B1", "causal-lm",
          {"full": ("OOM", "–"), "lora": ("32", "3.8"), "offload": ("18.1", "35")}),
)  # fmt: skip
_OFFLOAD = {"fsdp": True, "fsdp_cpu_offload": True}
WAYS = (
    Way("full fine-tuning, fp32", "full", None),
    Way("LoRA, fp32 base, as the reference", "lora", {"mixed_precision": "no"}),
    Way("LoRA, bf16 base", None, {"mixed_precision": "bf16"}),
    Way("the same, checkpointing", None, {"mixed_precision": "bf16", "gradient_checkpointing": True}),
    Way("LoRA, NF4 base", None, {"mixed_precision": "bf16", "quantize": "nf4"}),
    Way("the same, checkpointing", None,
        {"mixed_precision": "bf16", "quantize": "nf4", "gradient_checkpointing": True}),
    Way("LoRA, CPU offload, bf16 base", "offload", {"mixed_precision": "bf16", **_OFFLOAD}),
)  # fmt: skip


def settings_of(model: Model, way: Way, length: int = LENGTH) -> TextPlanConfig:
    """PEFT's LoRA of the example: rank 8, α 32, dropout 0.1, on queries and values."""
    return TextPlanConfig(
        model.name, model.task, max_length=length, train_batch_size=1, lora_alpha=32.0, lora_dropout=0.1,
        target_modules="attention-qv", **(way.settings or {}),
    )  # fmt: skip


def planned(model: Model, way: Way, *, length: int = LENGTH, answer: int = ANSWER, made: Any = None) -> Line:
    """made: the model on the meta device, where there is one already."""
    made = made or text_model(model.name, model.task)
    if way.settings is None:
        made = made.requires_grad_(True)
        batch = example_batch(model.task, 1, length, answer)
        job = TextJob(partial(loss_of, model.task), batch, optimizer="adamw", copies=0)
        plan = RunPlan(tuple(phases_of_text(made, job)), "cuda", CONTEXT)
        made.requires_grad_(False)
        return Line(model, way, plan, None)
    config = resolved_text(settings_of(model, way, length), made, device="cuda", card=CARD)
    plan = plan_text(config, made, card=CARD, answer_length=answer)
    half = 2 if config.mixed_precision == "bf16" else 1
    return Line(model, way, plan, base_bytes(made) // half if config.fsdp_cpu_offload else None)


def lines() -> Iterator[Line]:
    for model in MODELS:
        made = text_model(model.name, model.task)
        for way in WAYS:
            yield planned(model, way, made=made)


def table(found: list[Line]) -> str:
    """The table in Markdown. With CPU offload it is about training: before, the base is whole on the card."""
    rows = [
        "| model | way | reference: GPU / CPU, GB | planned peak | needed | weights | rest | main memory | measured |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for line in found:
        printed = line.model.printed.get(line.way.key or "")
        plan = line.plan.largest.plan if line.main is None else _training(line.plan)
        needed = plan.reserved + line.plan.aside if line.main is not None else line.plan.needed
        weights = plan.parts["weights"] + (plan.parts["adapters"] if line.way.settings is None else 0)
        cells = [
            line.model.title,
            line.way.words,
            "" if printed is None else " / ".join(printed),
            f"{plan.peak / GIB:.2f}",
            f"{needed / GIB:.2f}" + ("" if needed <= CARD.memory else " (too much)"),
            f"{weights / GIB:.2f}",
            f"{(plan.peak - weights) / GIB:.2f}",
            "" if line.main is None else f"{line.main / GIB:.1f}",
            "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _training(plan: RunPlan) -> Plan:
    return next(phase.plan for phase in plan.phases if phase.name == TRAINING)


def long_rows() -> str:
    """BLOOMZ-7B1 with an NF4 base and checkpointing, a row of 512 tokens: what the loss takes."""
    model, way = MODELS[2], WAYS[5]
    made = text_model(model.name, model.task)
    own = [planned(model, way, length=512, answer=answer, made=made).plan for answer in (5, 511)]
    batch = example_batch(model.task, 1, 512, 511)
    config = resolved_text(settings_of(model, way, 512), made, device="cuda", card=CARD)
    job = replace(text_job(config, made, answer_length=511), loss=_plain_loss, batch=batch)
    plain = RunPlan(tuple(phases_of_text(made, job)), "cuda", CONTEXT)
    words = ("ours, 5 tokens of the row counted", "ours, all of them counted", "transformers' own")
    rows = ["| loss | planned peak, GiB | activations |", "|---|--:|--:|"]
    for said, plan in zip(words, (*own, plain)):
        rows.append(f"| {said} | {plan.peak / GIB:.2f} | {plan.largest.plan.parts['activations'] / GIB:.2f} |")
    return "\n".join(rows)


def _plain_loss(model: Any, batch: dict[str, Any]) -> Any:
    return model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["input_ids"]).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    text = f"{table(list(lines()))}\n\nBLOOMZ-7B1, NF4 base, checkpointing, a row of 512 tokens:\n\n{long_rows()}"
    if not arguments.write:
        print(text)
        return
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
