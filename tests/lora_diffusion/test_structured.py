"""LoHa, LoKr, Tucker, full differences: ΔW and its exact product against formulas written another way."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diffusion.structured import Dense, LoHa, LoKr, Structured, TuckerLoCon

SIZE = st.integers(1, 12)
RANK = st.integers(1, 3)
KERNEL = st.sampled_from([(1, 1), (3, 3), (1, 3)])
DTYPE = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SEED = st.integers(0, 2**16)
few = settings(max_examples=60, deadline=None)


def random_tensors(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def check(layer: Structured, wanted: torch.Tensor) -> None:
    """ΔW is `wanted`, in fp64; so is the exact product, which is there if its rank is small."""
    assert layer.shape == wanted.shape
    delta = layer.delta()
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), wanted, rtol=1e-5, atol=1e-5)
    product = layer.exact()
    if product is not None:
        a, b = product
        assert a.dtype == b.dtype == torch.float32
        assert a.ndim == b.ndim == 2
        assert b.shape == (wanted.shape[0], a.shape[0])
        torch.testing.assert_close(layer.scale * (b @ a), delta.flatten(1), rtol=1e-5, atol=1e-5)


def is_worth_it(rank: int, shape: tuple[int, ...]) -> bool:
    return 2 * rank <= min(shape[0], torch.Size(shape[1:]).numel())


@few
@given(SIZE, SIZE, RANK, DTYPE, SEED)
def test_loha(out: int, columns: int, rank: int, dtype: torch.dtype, seed: int) -> None:
    w = random_tensors(seed, dtype, (out, rank), (rank, columns), (out, rank), (rank, columns))
    layer = LoHa(*w, scale=0.5)
    w1_a, w1_b, w2_a, w2_b = (tensor.double() for tensor in w)
    check(layer, 0.5 * torch.einsum("oi,ic,oj,jc->oc", w1_a, w1_b, w2_a, w2_b))
    assert layer.rank == rank
    assert (layer.exact() is not None) == is_worth_it(rank**2, layer.shape)
    assert list(layer.tensors()) == ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]


@few
@given(SIZE, SIZE, RANK, KERNEL, DTYPE, SEED)
def test_loha_with_cores(
    out: int, width: int, rank: int, kernel: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    sides = [(rank, out), (rank, width)]
    w = random_tensors(seed, dtype, *sides, *sides, *[(rank, rank, *kernel)] * 2)
    layer = LoHa(*w, scale=2.0)
    w1_a, w1_b, w2_a, w2_b, t1, t2 = (tensor.double() for tensor in w)
    first, second = (torch.einsum("ijhw,ip,jq->pqhw", *side) for side in ((t1, w1_a, w1_b), (t2, w2_a, w2_b)))
    check(layer, 2.0 * first * second)
    assert set(layer.tensors()) >= {"hada_t1", "hada_t2"}


@few
@given(st.tuples(SIZE, SIZE, SIZE, SIZE), RANK, st.booleans(), st.booleans(), DTYPE, SEED)
def test_lokr(
    sizes: tuple[int, int, int, int], rank: int, whole1: bool, whole2: bool, dtype: torch.dtype, seed: int
) -> None:
    a, c, b, d = sizes
    w1, w1_a, w1_b, w2, w2_a, w2_b = random_tensors(
        seed, dtype, (a, c), (a, rank), (rank, c), (b, d), (b, rank), (rank, d)
    )
    first = {"w1": w1} if whole1 else {"w1_a": w1_a, "w1_b": w1_b}
    second = {"w2": w2} if whole2 else {"w2_a": w2_a, "w2_b": w2_b}
    layer = LoKr(**first, **second, scale=0.5)
    left = w1.double() if whole1 else w1_a.double() @ w1_b.double()
    right = w2.double() if whole2 else w2_a.double() @ w2_b.double()
    check(layer, 0.5 * torch.kron(left, right))
    ranks = (min(a, c) if whole1 else rank) * (min(b, d) if whole2 else rank)
    assert (layer.exact() is not None) == is_worth_it(ranks, layer.shape)
    assert set(layer.tensors()) == {f"lokr_{name}" for name in (*first, *second)}


@few
@given(st.tuples(SIZE, SIZE, SIZE, SIZE), RANK, KERNEL, st.booleans(), DTYPE, SEED)
def test_lokr_of_convolutions(
    sizes: tuple[int, int, int, int], rank: int, kernel: tuple[int, int], whole: bool, dtype: torch.dtype, seed: int
) -> None:
    a, c, b, d = sizes
    w1, w2, t2, w2_a, w2_b = random_tensors(
        seed, dtype, (a, c), (b, d, *kernel), (rank, rank, *kernel), (rank, b), (rank, d)
    )
    layer = LoKr(w1=w1, w2=w2) if whole else LoKr(w1=w1, w2_a=w2_a, w2_b=w2_b, t2=t2)
    right = w2.double() if whole else torch.einsum("ijhw,ib,jd->bdhw", t2.double(), w2_a.double(), w2_b.double())
    wanted = torch.einsum("ac,bdhw->abcdhw", w1.double(), right).reshape(a * b, c * d, *kernel)
    check(layer, wanted)


@few
@given(SIZE, SIZE, RANK, KERNEL, st.booleans(), DTYPE, SEED)
def test_tucker_locon(
    out: int, width: int, rank: int, kernel: tuple[int, int], flat: bool, dtype: torch.dtype, seed: int
) -> None:
    """Always one product of its own rank: the core goes into A."""
    up, mid, down = random_tensors(seed, dtype, (out, rank), (rank, rank, *kernel), (rank, width))
    ones = () if flat else (1, 1)
    layer = TuckerLoCon(up.reshape(out, rank, *ones), mid, down.reshape(rank, width, *ones), 0.25)
    check(layer, 0.25 * torch.einsum("op,pqhw,qi->oihw", up.double(), mid.double(), down.double()))
    assert layer.exact()[0].shape[0] == layer.rank == rank


def test_half_precision_is_multiplied_out_without_rounding() -> None:
    """Products of two numbers of fp16 fit into fp32, so factors of LoHa and LoKr lose nothing at all."""
    w = random_tensors(0, torch.float16, (16, 2), (2, 18), (16, 2), (2, 18))
    a, b = LoHa(*w).exact()
    w1_a, w1_b, w2_a, w2_b = (tensor.double() for tensor in w)
    assert torch.equal(a.double(), torch.einsum("ic,jc->ijc", w1_b, w2_b).reshape(4, 18))
    assert torch.equal(b.double(), torch.einsum("oi,oj->oij", w1_a, w2_a).reshape(16, 4))
    a, b = LoKr(w1_a=w[0], w1_b=w[1], w2_a=w[2], w2_b=w[3]).exact()
    assert torch.equal(a.double(), torch.kron(w1_b, w2_b))
    assert torch.equal(b.double(), torch.kron(w1_a, w2_a))


def test_a_full_difference_is_itself() -> None:
    (diff,) = random_tensors(0, torch.float16, (4, 3, 3, 3))
    layer = Dense(diff, 0.5)
    check(layer, 0.5 * diff.double())
    assert layer.exact() is None
    assert layer.rank == 4
    assert layer.tensors() == {"diff": diff}


def test_shapes_take_no_computing() -> None:
    """Nor memory: tensors of no content know what they would be."""
    big = {"device": "meta"}
    w = [torch.empty(shape, **big) for shape in ((2**20, 1), (1, 2**20))]
    assert LoHa(*w, *w).shape == (2**20, 2**20)
    assert LoKr(w1=w[0], w2=w[1]).shape == (2**20, 2**20)
    core = torch.empty(1, 1, 2**10, 2**10, **big)
    assert TuckerLoCon(w[0], core, w[1]).shape == (2**20, 2**20, 2**10, 2**10)
