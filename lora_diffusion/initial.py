"""Initial values of the low-rank factors."""

from __future__ import annotations

import math

import torch

from .errors import ConfigError


def initial_factors(
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    init: bool | str,
    generator: torch.Generator | None = None,
    *,
    embedding: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in fp32 on the CPU; a_shape: (r, in, …), b_shape: (out, r, …).

    True: A from U(-1/√fan_in, 1/√fan_in), which is Kaiming's rule with a=√5, and B zero (Microsoft's loralib, PEFT);
    beside an embedding A zero and B from N(0, 1). "gaussian": A from N(0, 1/r²) and B zero (diffusers' scripts).
    False: both by the rule for A, so ΔW is not zero. "orthogonal": see `_orthogonal`.
    """
    if init == "orthogonal":
        return _orthogonal(a_shape, b_shape, generator)
    a, b = torch.zeros(a_shape), torch.zeros(b_shape)
    if init is True and embedding:
        return a, b.normal_(generator=generator)
    if init == "gaussian":
        a.normal_(0.0, 1.0 / a_shape[0], generator=generator)
        return a, b
    _uniform(a, generator)
    if init is False:
        _uniform(b, generator)
    return a, b


def factors_of_weight(
    weight: torch.Tensor, rank: int, scale: float, init: str, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in fp32 on the CPU from a base weight (out, in), such that s·B·A is a part of it.

    "pissa": the `rank` largest singular triples, A = √(S/s)·Vᵀ, B = U·√(S/s) (Meng et al. 2024, "PiSSA", eq. 2–3);
    "pissa_niter_n": the same by a randomised method with n iterations. "olora": weight = Q·R, A the first rows of R, B
    the first columns of Q (Büyükakyüz 2024, "OLoRA", algorithm 1).
    """
    matrix = weight.detach().to("cpu", torch.float32)
    if init == "olora":
        q, r = torch.linalg.qr(matrix)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    if init == "pissa":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], vh[:rank].t()
    else:
        u, s, v = _randomised_svd(matrix, rank, int(init.rpartition("_")[2]), generator)
    root = (s / scale).sqrt()
    return (root[:, None] * v.t()).contiguous(), (u * root).contiguous()


def _randomised_svd(
    matrix: torch.Tensor, rank: int, iterations: int, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S, V of the largest singular triples (Halko et al. 2011, algorithms 4.4 and 5.1)."""
    sketch = torch.randn(matrix.shape[1], min(rank + 8, *matrix.shape), generator=generator)
    q = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(iterations):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.t() @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vh[:rank].t()


def _orthogonal(
    a_shape: tuple[int, ...], b_shape: tuple[int, ...], generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B that are both not zero and whose product is: each lives in one half of the rows of a random rotation."""
    rank = a_shape[0]
    if rank % 2 or len(a_shape) != 2:
        raise ConfigError(f"init_lora_weights='orthogonal' needs an even rank and linear layers, and rank is {rank}")
    rotation = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    a = rotation[0::2].t() @ torch.randn(rank // 2, a_shape[1], generator=generator) / 10
    b = torch.randn(b_shape[0], rank // 2, generator=generator) @ rotation[1::2] / 10
    return a, b


def _uniform(tensor: torch.Tensor, generator: torch.Generator | None) -> None:
    bound = 1.0 / math.sqrt(math.prod(tensor.shape[1:]))
    tensor.uniform_(-bound, bound, generator=generator)
