"""Bytes kept for backward: q, k and v that read one bf16 x, in units of x's bytes.

Counted are the distinct storages that autograd saves (and that custom functions keep as attributes), parameters aside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from engine_cases import Case, Projections, built
from engine_common import Setting, markdown, notes, sections
from engine_contestants import (
    Contestant,
    DisagreementError,
    check,
    frozen,
    random_gradients,
    same_factors,
    with_ours,
    with_peft,
)

import lora_diffusion as ld

WIDTH = 640
TARGETS = ("q_proj", "k_proj", "v_proj")
DROPOUTS = (0.0, 0.1)


def measure(setting: Setting) -> list[dict]:
    tokens = 256 if setting.quick else 4096
    case = Case(f"q, k, v: {tokens} × {WIDTH}", "bytes", lambda: Projections(WIDTH, out=False), tokens, WIDTH, TARGETS)
    return [row for dropout in DROPOUTS for row in _rows(case, dropout, setting)]


def _rows(case: Case, dropout: float, setting: Setting) -> Iterator[dict]:
    base = built(case, setting.device, torch.bfloat16)
    x, context = case.inputs(1, setting.device, torch.bfloat16)
    floor = frozen(base)
    peers = with_peft(base, TARGETS, dropout=dropout)
    same_dtype = with_peft(base, TARGETS, dropout=dropout, own_dtype=True)
    contestants = {
        "frozen": (floor, False),
        "PEFT, factors fp32 (its default)": (peers, False),
        "PEFT, factors fp32, autocast": (peers, True),
        "PEFT, factors bf16": (same_dtype, False),
    }
    row = {"shape": case.name, "dropout": dropout, "x_bytes": x.nbytes}
    try:
        ours = with_ours(base, TARGETS, dropout=dropout)
        same_factors(peers, ours)
        check(ours, peers, x, context, random_gradients(floor, x, context), dropout)
        contestants |= {"ours, factors fp32": (ours, False), "ours, factors fp32, autocast": (ours, True)}
    except ld.LoraDiffusionError as error:
        yield row | {"name": "ours", "skipped": str(error)}
    except DisagreementError as error:
        yield row | {"name": "ours", "disagrees": str(error)}
    for name, (contestant, autocast) in contestants.items():
        with torch.autocast(x.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            yield row | {"name": name, **kept(contestant, x)}


def kept(contestant: Contestant, x: torch.Tensor) -> dict[str, int]:
    """{"bytes": what is kept}; on a GPU also what the allocator says, less the outputs."""
    parameters = {tensor.untyped_storage().data_ptr() for tensor in contestant.module.parameters()}
    storages: dict[int, int] = {}
    held: list[torch.Tensor] = []  # alive until all are counted, so that no address is used twice

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    on_gpu = x.device.type == "cuda"
    contestant.module(x)  # warm: what is allocated once does not count
    if on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        outputs = contestant.module(x)
    facts = {}
    if on_gpu:
        torch.cuda.synchronize()
        facts["allocated_bytes"] = torch.cuda.memory_allocated() - before - sum(y.nbytes for y in outputs)
    for tensor in attributes_of_functions(outputs):
        count(tensor)
    return facts | {"bytes": sum(storages.values())}


def attributes_of_functions(outputs: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Tensors that custom autograd functions in the outputs' graph keep past `save_for_backward`."""
    waiting: list[Any] = [y.grad_fn for y in outputs]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            yield from _tensors(vars(node).values())


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def report(rows: list[dict]) -> str:
    counted = [row for row in rows if "bytes" in row]
    by_name: dict[str, dict[float, dict]] = {}
    for row in counted:
        by_name.setdefault(row["name"], {})[row["dropout"]] = row
    keys = {"bytes": "", **({"allocated_bytes": ", allocator"} if "allocated_bytes" in counted[0] else {})}
    header = [
        "kept for backward, in x's bytes",
        *(f"dropout {p:g}{words}" for words in keys.values() for p in DROPOUTS),
    ]
    lines = [
        [name, *(f"{of[p][key] / of[p]['x_bytes']:.2f}" if p in of else "–" for key in keys for p in DROPOUTS)]
        for name, of in by_name.items()
    ]
    shape, size = counted[0]["shape"], counted[0]["x_bytes"]
    title = f"### Bytes kept for backward: {shape}, bf16, one x of {size / 2**20:.2f} MiB"
    return sections(title, markdown(header, lines), notes(rows))
