"""Cards by name and the memory that a program can have on them.

What PyTorch reports as a card's total is a little less than what it is sold with; where no report was at hand, it is
taken to be 1.5 % less. Light on purpose: the command line reads this file for `--help`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lora_diffusion.errors import ConfigError
from train.config import nearest

GIB = 2**30
CONTEXT = 450 * 2**20  # the driver's context and loaded kernels, which PyTorch does not count


@dataclass(frozen=True)
class Card:
    """A card.

    Attributes:
        title: its name in full.
        memory: bytes that a program sees.
        bf16: whether it computes in bf16; else `--mixed_precision auto` is fp16.
        hopper: cuBLAS's workspaces are larger from Hopper on.
        laptop: it also draws the desktop, which takes some of it.
    """

    title: str
    memory: int
    bf16: bool = True
    hopper: bool = False
    laptop: bool = False


def _card(title: str, gib: float, **facts: bool) -> Card:
    return Card(title, int(gib * GIB), **facts)


CARDS = {
    "gtx1060": _card("GTX 1060 6 GB", 5.93, bf16=False),
    "gtx1080ti": _card("GTX 1080 Ti 11 GB", 10.91, bf16=False),
    "gtx1650": _card("GTX 1650 4 GB", 3.82, bf16=False),
    "rtx2060": _card("RTX 2060 6 GB", 5.79, bf16=False),
    "rtx2070": _card("RTX 2070 8 GB", 7.79, bf16=False),
    "rtx2080ti": _card("RTX 2080 Ti 11 GB", 10.75, bf16=False),
    "rtx3050-laptop": _card("RTX 3050 Laptop 4 GB", 3.81, laptop=True),
    "rtx3060-laptop": _card("RTX 3060 Laptop 6 GB", 5.80, laptop=True),
    "rtx3060": _card("RTX 3060 12 GB", 11.76),
    "rtx3070": _card("RTX 3070 8 GB", 7.79),
    "rtx3080": _card("RTX 3080 10 GB", 9.77),
    "rtx3090": _card("RTX 3090 24 GB", 23.69),
    "rtx4050-laptop": _card("RTX 4050 Laptop 6 GB", 5.77, laptop=True),
    "rtx4060-laptop": _card("RTX 4060 Laptop 8 GB", 7.75, laptop=True),
    "rtx4070-laptop": _card("RTX 4070 Laptop 8 GB", 7.75, laptop=True),
    "rtx4090-laptop": _card("RTX 4090 Laptop 16 GB", 15.70, laptop=True),
    "rtx4060": _card("RTX 4060 8 GB", 7.75),
    "rtx4070": _card("RTX 4070 12 GB", 11.72),
    "rtx4080": _card("RTX 4080 16 GB", 15.70),
    "rtx4090": _card("RTX 4090 24 GB", 23.64),
    "rtx5060-laptop": _card("RTX 5060 Laptop 8 GB", 7.75, hopper=True, laptop=True),
    "rtx5070": _card("RTX 5070 12 GB", 11.82, hopper=True),
    "rtx5080": _card("RTX 5080 16 GB", 15.76, hopper=True),
    "rtx5090": _card("RTX 5090 32 GB", 31.36, hopper=True),
    "p100": _card("Tesla P100 16 GB", 15.90, bf16=False),
    "t4": _card("T4 16 GB", 14.56, bf16=False),
    "v100": _card("V100 16 GB", 15.77, bf16=False),
    "v100-32gb": _card("V100 32 GB", 31.73, bf16=False),
    "a10": _card("A10/A10G 24 GB", 22.06),
    "l4": _card("L4 24 GB", 22.03),
    "l40s": _card("L40S 48 GB", 44.39),
    "a6000": _card("RTX A6000 48 GB", 47.40),
    "a100-40gb": _card("A100 40 GB", 39.39),
    "a100": _card("A100 80 GB", 79.15),
    "h100": _card("H100 80 GB", 79.10, hopper=True),
    "h200": _card("H200 141 GB", 139.80, hopper=True),
}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB|M)?", re.IGNORECASE)


def card_of(gpu: str | None, memory: str | None) -> Card | None:
    """The card that `--gpu` or `--memory` names; None if neither does.

    `--memory 6GB` is read as 6 GiB, as cards are sold.

    Raises:
        ConfigError: no such card, no size, or both are given.
    """
    if gpu is not None and memory is not None:
        raise ConfigError("--gpu and --memory both say how much memory there is; give one of them")
    if gpu is not None:
        key = re.sub(r"[^a-z0-9]", "", gpu.lower())
        plain = {re.sub(r"[^a-z0-9]", "", name): card for name, card in CARDS.items()}
        found = plain.get(key) or plain.get(key.removeprefix("nvidia").removeprefix("geforce"))
        if found is None:
            near = nearest(gpu.lower(), CARDS)
            raise ConfigError(f"--gpu {gpu} is not known{near}; --memory 8GB works for any card")
        return found
    if memory is None:
        return None
    match = _SIZE.fullmatch(memory.strip())
    size = 0 if match is None else int(float(match[1]) * (2**20 if (match[2] or "G")[0] in "mM" else GIB))
    if size <= 0:
        raise ConfigError(f"--memory {memory} is no size; write 6GB or 5900MiB")
    return Card(f"a card of {memory.strip()}", size)
