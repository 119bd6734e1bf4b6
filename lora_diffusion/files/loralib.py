"""The dialect of loralib, Microsoft's first implementation of LoRA: state dicts of a bare model.

Names are `<module path>.lora_A` (rank, in) and `<module path>.lora_B` (out, rank), without `.weight`; whatever else was
trained, a new head as a rule, lies beside them under its own name and is kept as whole modules.

A MergedLinear learns parts of one fused projection, each with factors of its own: A is (rank · parts, in), B is
(out of the parts, rank), the weight of a convolution in groups. Two parts are query and value of a fused query, key and
value, three are all of them. They become one product of rank `rank · parts` whose B is zero outside the parts' blocks.

Alpha is in nobody's file, it was an argument of the training; without it alpha equals the rank.
"""

from __future__ import annotations

import torch

from ..adapter import Adapter, LowRank, inferred_config
from ..components import BARE
from ..config import MAX_RANK, is_number
from ..errors import ConfigError
from .pairs import Half, read_pairs
from .source import Source

NAME = "loralib"
_ENDINGS = {".lora_A": "a", ".lora_B": "b"}
_PARTS = {2: (0, 2), 3: (0, 1, 2)}  # how many parts learn -> which of query, key and value they are


def recognise(file: Source) -> bool:
    return any(_half(name) is not None for name in file.tensors)


def read(file: Source, alpha: float | None = None) -> Adapter:
    """alpha: what the training was given as lora_alpha; None assumes the rank, and says so in the notes.

    Raises AdapterFormatError for factors that do not fit each other and for tensors that are neither factors nor whole
    modules; ConfigError for an alpha that is none.
    """
    if alpha is not None and not (is_number(alpha) and alpha > 0):
        raise ConfigError(f"alpha={alpha!r}: give a finite number above 0, the training's lora_alpha")
    halves = {name: half for name in file.tensors if (half := _half(name)) is not None}
    modules = _whole_modules(file, [name for name in file.tensors if name not in halves], halves)
    parts = {path: n for path, n in _parts(file, halves).items() if n > 1}
    plain = {name: half for name, half in halves.items() if half.path not in parts}
    read = read_pairs(file, plain, lambda component, path, rank: _scale(alpha, rank)) if plain else {}
    layers = read.get(BARE, {})
    for path, n in parts.items():
        layers[path] = _merged_linear(file, path, n, alpha)
    order = dict.fromkeys(half.path for half in halves.values())
    layers = {path: layers[path] for path in order}
    values = file.read([f"{path}.{tensor}" for path, tensors in modules.items() for tensor in tensors])
    copies = {path: {tensor: values[f"{path}.{tensor}"] for tensor in tensors} for path, tensors in modules.items()}
    adapter = Adapter({BARE: layers}, {BARE: inferred_config(layers)}, copies={BARE: copies} if copies else {})
    if alpha is None:
        adapter.notes.append("alpha is not in a loralib file: it is taken to equal the rank; give the training's alpha")
    if 2 in parts.values():
        adapter.notes.append("two parts of a fused projection were learned: they are taken for its query and value")
    return adapter


def _half(name: str) -> Half | None:
    path, side = name[:-7], _ENDINGS.get(name[-7:])
    return Half(BARE, path, side) if path and side is not None else None


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def _whole_modules(file: Source, names: list[str], halves: dict[str, Half]) -> dict[str, list[str]]:
    """{module path: names of its tensors} of what is not low-rank."""
    modules: dict[str, list[str]] = {}
    for name in names:
        path, _, tensor = name.rpartition(".")
        if not path or "lora_" in tensor:
            raise file.error(f"has a tensor that is not understood in the loralib dialect: {name}")
        modules.setdefault(path, []).append(tensor)
    adapted = {half.path for half in halves.values()}
    for path, tensors in modules.items():
        if tensors == ["bias"]:
            raise file.error(f"brings {path}.bias alone, and biases that were learned beside LoRA are not built here")
        if path in adapted:
            raise file.error(f"holds {path} whole as well as its LoRA: save loralib.lora_state_dict(model) instead")
        if path.endswith(".conv") and path.removesuffix(".conv") in adapted:
            raise file.error(f"has a LoRA convolution of loralib's own form around {path}, which is not built here")
    return modules


def _parts(file: Source, halves: dict[str, Half]) -> dict[str, int]:
    """{path: how many parts of a fused projection its factors are for}, 1 for a plain one."""
    tensors = {(half.path, half.side): file.tensors[name] for name, half in halves.items()}
    found = {}
    for path in {half.path for half in halves.values()}:
        a, b = tensors.get((path, "a")), tensors.get((path, "b"))
        found[path] = 1
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or 0 in (*a.shape, *b.shape):
            continue  # read_pairs says what is wrong
        parts, rest = divmod(a.shape[0], b.shape[1])
        if rest == 0 and parts in _PARTS and b.shape[0] % parts == 0:
            found[path] = parts
    return found


def _merged_linear(file: Source, path: str, parts: int, alpha: float | None) -> LowRank:
    names = [f"{path}.lora_A", f"{path}.lora_B"]
    rank = file.tensors[names[0]].shape[0]
    if rank > MAX_RANK:
        raise file.error(f"has rank {rank:,} at {path}; the limit is {MAX_RANK:,}")
    values = file.read(names)
    a, b = values[names[0]], values[names[1]]
    height, width = b.shape[0] // parts, b.shape[1]
    wide = torch.zeros(3 * height, parts * width, dtype=b.dtype)
    for n, place in enumerate(_PARTS[parts]):
        wide[place * height : (place + 1) * height, n * width : (n + 1) * width] = b[n * height : (n + 1) * height]
    return LowRank(a, wide, _scale(alpha, width))
