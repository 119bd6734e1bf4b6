"""How much of one LoRA's subspace lies in another's? The LoRA paper's figures 3 and 4 on pocket-bert.

    python examples/lecture/subspaces.py           trains what is missing, then writes the numbers and the picture
    python examples/lecture/subspaces.py --table   only the picture, of the numbers that are there

Equation 4: φ(A, A', i, j) = ‖Uᵢᵀ U'ⱼ‖²_F / min(i, j), with Uᵢ the first i right-singular vectors of A (rank, width), by
size: 1 where the smaller subspace lies in the larger, 0 where they are at right angles. Subspaces drawn at random have
max(i, j) / width on average, which in a width of 192 is much more than in GPT-3's 12,288.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from methods import HEAD_RATE, MODEL
from plots import Map, heat_maps
from runs import RESULTS, Results, classify, put_into_readme
from weights_and_ranks import Q, V, rate

import lora_diffusion as ld

TASK, LENGTH = "topic", 300  # steps
PAIRS = {"r = 8 and r = 64": ((8, 0), (64, 1)), "two seeds of r = 64": ((64, 1), (64, 2))}  # (rank, seed)
WEIGHTS = {"W_q": "attention.self.query", "W_v": "attention.self.value"}


def similarity(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(r, width), (r', width) -> (r, r'): φ for every i and j from 1 on, in 0..1."""
    u, v = (torch.linalg.svd(a.double(), full_matrices=False).Vh for a in (one, other))
    squares = (u @ v.T).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, len(u) + 1)[:, None], torch.arange(1, len(v) + 1)[None]
    return squares / torch.minimum(i, j)


def by_chance(rank: int, other: int, width: int) -> torch.Tensor:
    """(rank, other): the mean of φ for subspaces drawn at random."""
    i, j = torch.arange(1, rank + 1)[:, None], torch.arange(1, other + 1)[None]
    return torch.maximum(i, j) / width


def factors(file: Path) -> dict[str, torch.Tensor]:
    """{path: A} of an adapter file with one component."""
    (layers,) = ld.read_adapter(file).components.values()
    return {path: layer.a for path, layer in layers.items()}


def compare(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], ending: str) -> torch.Tensor:
    """The mean of φ over the blocks, for the weights whose path ends so."""
    found = [similarity(a, other[path]) for path, a in one.items() if path.endswith(ending)]
    return torch.stack(found).mean(0)


def settings_of(rank: int, seed: int) -> dict[str, Any]:
    return {
        "method": "lora", "target_modules": f"{Q},{V}", "rank": rank, "learning_rate": rate(),
        "head_learning_rate": HEAD_RATE, "seed": seed, "max_train_steps": LENGTH,
    }  # fmt: skip


def sweep(results: Results) -> None:
    """Train the adapters and keep φ of each pair and weight, and what chance would give."""
    pairs = {name: {"pair": name, "runs": [settings_of(*run) for run in runs]} for name, runs in PAIRS.items()}
    if all(results.find(settings) for settings in pairs.values()):
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for run in dict.fromkeys(run for runs in PAIRS.values() for run in runs):
            files[run] = Path(folder) / f"{run[0]}-{run[1]}.safetensors"
            print(run, classify(results.model, TASK, settings_of(*run), keep=files[run]), flush=True)
        for name, (one, other) in PAIRS.items():
            a, b = factors(files[one]), factors(files[other])
            width = next(iter(a.values())).shape[1]
            maps = {weight: _rounded(compare(a, b, ending)) for weight, ending in WEIGHTS.items()}
            results.add(pairs[name], {"maps": {**maps, "by chance": _rounded(by_chance(one[0], other[0], width))}})


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(float(value), 3) for value in row] for row in values]


def table(found: Mapping[str, Mapping[str, list[list[float]]]]) -> str:
    """Markdown: φ at some places of each map."""
    places = ((1, 1), (4, 4), (8, 8), (8, 64))
    rows = [
        "| pair | weights | " + " | ".join(f"φ(i = {i}, j = {j})" for i, j in places) + " |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for pair, maps in found.items():
        for weight, values in maps.items():
            rows.append(f"| {pair} | {weight} | " + " | ".join(f"{values[i - 1][j - 1]:.2f}" for i, j in places) + " |")
    return "\n".join(rows)


def write(results: Results) -> None:
    found = {run["settings"]["pair"]: run["maps"] for run in results.runs()}
    found = {pair: found[pair] for pair in PAIRS if pair in found}
    text = table(found)
    (RESULTS / "subspaces.md").write_text(f"{text}\n", encoding="utf-8")
    axes = {
        "r = 8 and r = 64": ("i of r = 8", "j of r = 64"),
        "two seeds of r = 64": ("i of one seed", "j of the other"),
    }
    maps = [
        [Map(f"{weight}: {pair}", rows, *axes[pair]) for weight, rows in maps.items()] for pair, maps in found.items()
    ]
    under = f"the LoRA paper's equation 4, {results.model} on {TASK}, mean over the blocks; by chance: random subspaces"
    heat_maps("Subspaces that LoRA learns", under, maps).save(RESULTS / "subspaces.png", optimize=True)
    put_into_readme("subspaces.py", text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    results = Results(RESULTS / "subspaces.json", MODEL)
    if not args.table:
        sweep(results)
    write(results)


if __name__ == "__main__":
    main()
