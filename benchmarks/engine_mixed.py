"""Mixed batch: eight rows, each with an adapter of its own, in one run against one run per row."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import peft
import torch
from engine_cases import LLAMA_TARGETS, SD_TARGETS, TEXT_TOKENS, TEXT_WIDTH, SDBlocks, llama
from engine_common import DTYPES, Setting, markdown, notes, sections
from engine_contestants import (
    ALPHA,
    BF16_TOLERANCE,
    FP32_TOLERANCE,
    RANK,
    Contestant,
    DisagreementError,
    peft_factors,
    same_factors,
    with_ours,
)
from engine_timing import take_turns
from torch import nn

import lora_diffusion as ld

NAMES = tuple(f"a{index}" for index in range(8))
MISSING = "this version of lora_diffusion has no adapters_per_sample"


@dataclass(frozen=True)
class Stack:
    name: str
    build: Callable[[], nn.Module]
    width: int
    tokens: tuple[int, ...]
    targets: tuple[str, ...]
    text: bool = False


def stacks(quick: bool) -> list[Stack]:
    """Few tokens (a decoding step; the innermost level of a UNet) and many."""
    layers = 1 if quick else 4
    sd, language = ((16, 64), (1, 16)) if quick else ((16, 256, 1024), (1, 16, 256))
    return [
        Stack(f"SD 1.5 blocks, {layers} × 320", lambda: SDBlocks(320, layers), 320, sd, SD_TARGETS, text=True),
        Stack(f"Llama-shaped, {layers} × 512", lambda: llama(layers, 512), 512, language, LLAMA_TARGETS),
    ]


def measure(setting: Setting) -> list[dict]:
    if not hasattr(ld, "adapters_per_sample"):
        return [{"name": "all", "skipped": MISSING}]
    dtype = "bf16" if setting.device.type == "cuda" else "fp32"
    rows = []
    for stack in stacks(setting.quick):
        torch.manual_seed(0)
        base = stack.build().to(setting.device, DTYPES[dtype]).eval()
        facts: dict = {"name": stack.name, "dtype": dtype}
        try:
            ours = with_ours(base, stack.targets, names=NAMES)
            peers = _peft_model(base, stack.targets)
            same_factors(ours, peers)
            for tokens in stack.tokens:
                rows.append(facts | {"tokens": tokens} | _timed(stack, ours.module, peers.module, tokens, setting))
        except ld.LoraDiffusionError as error:
            rows.append(facts | {"skipped": str(error)})
        except DisagreementError as error:
            rows.append(facts | {"disagrees": str(error)})
    return rows


def _peft_model(base: nn.Module, targets: Sequence[str]) -> Contestant:
    """Wrapped, since only PEFT's wrapper takes `adapter_names`."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets))
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return Contestant(model.eval(), [factor for name in NAMES for factor in peft_factors(model, name)])


@torch.no_grad()
def _timed(stack: Stack, ours: nn.Module, peers: nn.Module, tokens: int, setting: Setting) -> dict:
    draw = torch.Generator().manual_seed(1)
    like = next(ours.parameters())
    shapes = [(len(NAMES), tokens, stack.width)] + [(len(NAMES), TEXT_TOKENS, TEXT_WIDTH)] * stack.text
    inputs = [torch.randn(shape, generator=draw).to(like.device, like.dtype) for shape in shapes]
    runs = {
        "8 runs": functools.partial(_one_by_one, ours, inputs),
        "mixed": functools.partial(_mixed, ours, inputs),
        "one adapter for all": functools.partial(_one_for_all, ours, inputs),
        "PEFT mixed": functools.partial(_peft_mixed, peers, inputs),
    }
    expected = runs["8 runs"]()
    facts: dict = {}
    _compare("8 runs", "mixed", expected, runs["mixed"]())
    try:
        _compare("8 runs", "PEFT mixed", expected, runs["PEFT mixed"]())
    except (TypeError, ValueError, RuntimeError) as error:  # a reference only, and not for every model
        facts["peft_skipped"] = f"{type(error).__name__}: {error}"
        del runs["PEFT mixed"]
    timing = take_turns(runs, setting.device, setting.repetitions)
    facts |= {"seconds": {name: timing.median(name) for name in runs}, "gain": timing.ratio("8 runs", "mixed")}
    if "PEFT mixed" in runs:
        facts["mixed_to_peft"] = timing.ratio("mixed", "PEFT mixed")
    return facts | {"figures": timing.figures()}


def _one_by_one(module: nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
    outputs = []
    for index, name in enumerate(NAMES):
        ld.set_adapters(module, name)
        outputs.append(module(*(tensor[index : index + 1] for tensor in inputs))[0])
    return torch.cat(outputs)


def _mixed(module: nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
    with ld.adapters_per_sample(module, list(NAMES)):
        return module(*inputs)[0]


def _one_for_all(module: nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
    ld.set_adapters(module, NAMES[0])
    return module(*inputs)[0]


def _peft_mixed(model: nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
    return model(*inputs, adapter_names=list(NAMES))[0]


def _compare(one: str, other: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    tolerance = FP32_TOLERANCE if expected.dtype == torch.float32 else 2 * BF16_TOLERANCE
    difference = ((expected - found).abs().max() / expected.abs().max()).item()
    if not difference <= tolerance:
        raise DisagreementError(f"{one} and {other} differ by {difference:.1e} of the largest element")


def report(rows: list[dict]) -> str:
    timed = [row for row in rows if "seconds" in row]
    names = list(dict.fromkeys(name for row in timed for name in row["seconds"]))
    header = [
        "8 rows, 8 adapters",
        "tokens",
        *(f"{n}, ms" for n in names),
        "rows/s, mixed to 8 runs",
        "mixed / PEFT mixed",
    ]
    lines = [
        [
            row["name"], row["tokens"],
            *(f"{row['seconds'][name] * 1e3:.3g}" if name in row["seconds"] else "–" for name in names),
            f"{row['gain']:.2f}", f"{row['mixed_to_peft']:.2f}" if "mixed_to_peft" in row else "–",
        ]
        for row in timed
    ]  # fmt: skip
    peers = [{"name": f"{row['name']}, PEFT", "skipped": row["peft_skipped"]} for row in rows if "peft_skipped" in row]
    return sections("### Mixed batch", markdown(header, lines) if lines else "", notes([*rows, *peers]))
