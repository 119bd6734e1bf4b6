"""A LoRA training step of a whole language model: ours, PEFT's, and the floor.

    python benchmarks/text.py --out benchmarks/text.json
    python benchmarks/text.py --quick          # does it work? two layers, short rows

GPT-2 small and a Llama-shaped model, both with random weights, rank 8 on the query and value projections, rows of which
all or a quarter of the tokens count (an instruction and its answer). Theirs is PEFT with the loss that transformers
computes from labels, as its training scripts do. Ours is the engine with the recipe's loss, which sends the counted
positions alone through the head. A third contestant is PEFT with our loss: what the engine alone makes of it. The floor
is the frozen model with our loss and gradients to its input. All take turns in one process; before anything is timed,
ours and PEFT must give the same loss and the same gradients from the same factors (exit status 1 where they do not).
Time is that of forward and backward; memory the most bytes alive beside weights, adapters and their gradients.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine_common import markdown
from engine_timing import take_turns
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_diffusion as ld
from lora_diffusion.planning.live_bytes import LiveBytes
from train import environment
from train.text_loss import answer_loss
from train.text_tasks.language_model import targets_of

OURS, PEFT, PEFT_OUR_LOSS, FLOOR = "ours", "PEFT", "PEFT with our loss", "floor"
RANK = 8
MIB = 2**20


def gpt2(quick: bool) -> Any:
    return GPT2LMHeadModel(GPT2Config(n_layer=2 if quick else 12, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def llama(quick: bool) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=2 if quick else 12,
            num_attention_heads=12, num_key_value_heads=4,
        )
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[bool], Any], list[str]]] = {
    "GPT-2 small": (gpt2, ["c_attn"]),
    "Llama-shaped, 12 × 768": (llama, ["q_proj", "v_proj"]),
}


def measure(name: str, dtype: torch.dtype, batch: int, length: int, share: float, args: argparse.Namespace) -> dict:
    build, targets = MODELS[name]
    torch.manual_seed(0)
    base = build(args.quick).to(dtype).train().requires_grad_(False)
    theirs, ours = with_peft(base, targets), base
    ld.add_adapter(ours, ld.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), generator=torch.Generator())
    same_factors(theirs, ours)
    ids = torch.randint(0, base.config.vocab_size, (batch, length))
    labels = ids.clone()
    labels[:, : length - round(length * share)] = -100
    labels[:, 0] = -100  # nothing predicts it
    inputs, (counted, wanted) = {"input_ids": ids}, targets_of(labels, shift=1)

    def lean(model: Any) -> torch.Tensor:
        return answer_loss(model, inputs, counted, wanted)

    def floor() -> None:
        embedded = ours.get_input_embeddings()(ids).detach().requires_grad_()
        with ld.disable_adapters(ours):
            answer_loss(ours, {"inputs_embeds": embedded}, counted, wanted).backward()

    steps: dict[str, Callable[[], None]] = {
        FLOOR: floor,
        PEFT: lambda: theirs(**inputs, labels=labels, use_cache=False).loss.backward(),
        PEFT_OUR_LOSS: lambda: lean(theirs.base_model.model).backward(),
        OURS: lambda: lean(ours).backward(),
    }
    row: dict[str, Any] = {
        "model": name, "dtype": str(dtype).removeprefix("torch."), "batch": batch, "length": length, "counted": share,
        "difference": disagreement(steps, theirs, ours),
    }  # fmt: skip
    row["activation_mib"] = {key: round(activation_bytes(step, theirs, ours) / MIB, 1) for key, step in steps.items()}
    timing = take_turns(steps, torch.device("cpu"), args.repetitions)
    row["seconds"] = {key: round(timing.median(key), 4) for key in steps}
    row["time_to_peft"] = {key: round(timing.ratio(key, PEFT), 3) for key in steps}
    row["memory_to_peft"] = {key: round(row["activation_mib"][key] / row["activation_mib"][PEFT], 3) for key in steps}
    return row


def with_peft(base: Any, targets: list[str]) -> Any:
    """PEFT around a copy whose frozen weights are the base's own tensors."""
    import copy

    from peft import LoraConfig, get_peft_model

    twin = copy.deepcopy(base, {id(p): p for p in [*base.parameters(), *base.buffers()]})
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM",
                        fan_in_fan_out=isinstance(base, GPT2LMHeadModel))  # fmt: skip
    return get_peft_model(twin, config).train()


@torch.no_grad()
def same_factors(theirs: Any, ours: nn.Module) -> None:
    factors = ld.get_adapter(ours).components["model"]
    generator = torch.Generator().manual_seed(1)
    for path, layer in factors.items():
        b = torch.randn(layer.b.shape, generator=generator) * 0.02
        module = theirs.base_model.model.get_submodule(path)
        module.lora_A["default"].weight.copy_(layer.a)
        module.lora_B["default"].weight.copy_(b)
        ours.get_submodule(path).part("default").lora_B.copy_(b)


def learned(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def disagreement(steps: dict[str, Callable[[], None]], theirs: nn.Module, ours: nn.Module) -> float:
    """The largest difference of a gradient of ours from PEFT's, relative to the largest gradient; clears them."""
    gradients = []
    for name, model in ((PEFT, theirs), (OURS, ours)):
        steps[name]()
        gradients.append([p.grad.float().clone() for p in learned(model) if p.grad is not None])
        model.zero_grad()
    largest = max(float(g.abs().max()) for g in gradients[0])
    return max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)) / largest


def activation_bytes(step: Callable[[], None], theirs: nn.Module, ours: nn.Module) -> int:
    """The most bytes alive during a step that were not there before it, gradients of adapters apart."""
    step()  # gradients are there, and are added to
    with LiveBytes() as live:
        for model in (theirs, ours):
            for tensor in (
                *model.parameters(),
                *model.buffers(),
                *(p.grad for p in learned(model) if p.grad is not None),
            ):
                live.adopt(tensor, "there before")
        before = live.parts["there before"]
        step()
        return live.peak - before


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two layers, short rows, few repetitions")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, help="file for all figures")
    args = parser.parse_args()
    if args.quick:
        args.repetitions = 2
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    sizes = [(1, 64)] if args.quick else [(4, 128)]
    dtypes = [torch.float32] if args.quick else [torch.float32, torch.bfloat16]
    rows = []
    for name in MODELS:
        for dtype in dtypes:
            for batch, length in sizes:
                for share in (1.0, 0.25):
                    rows.append(measure(name, dtype, batch, length, share, args))
                    print(rows[-1]["model"], rows[-1]["dtype"], batch, length, share, rows[-1]["time_to_peft"],
                          rows[-1]["memory_to_peft"], flush=True)  # fmt: skip
                    if args.out:
                        facts = {
                            **environment.machine(),
                            **environment.versions(),
                            "threads": args.threads,
                            "rows": rows,
                        }
                        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    contestants = ["floor", "PEFT, our loss", "**ours**"]
    header = ["model", "dtype", "rows", "counted", "PEFT, s", *contestants, "PEFT, MiB", *contestants]
    print(markdown(header, [_line(row) for row in rows]))
    limits = {"float32": 1e-4, "bfloat16": 0.05}
    if any(row["difference"] > limits[row["dtype"]] for row in rows):
        sys.exit("ours and PEFT disagree: see `difference` in the figures")


def _line(row: dict) -> list[str]:
    times, bytes_ = row["time_to_peft"], row["memory_to_peft"]
    return [
        row["model"], {"float32": "fp32", "bfloat16": "bf16"}[row["dtype"]], f"{row['batch']} × {row['length']}",
        f"{row['counted']:.0%}", f"{row['seconds'][PEFT]:.3f}", *(f"{times[k]:.2f}" for k in (FLOOR, PEFT_OUR_LOSS)),
        f"**{times[OURS]:.2f}**", f"{row['activation_mib'][PEFT]:,.0f}",
        *(f"{bytes_[k]:.2f}" for k in (FLOOR, PEFT_OUR_LOSS)), f"**{bytes_[OURS]:.2f}**",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
