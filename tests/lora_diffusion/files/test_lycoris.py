"""LyCORIS's files: every kind of factors on the tiny UNet, and what is refused by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn

import lora_diffusion as ld
from lora_diffusion.lowering import lowered
from lora_diffusion.structured import Dense, LoHa, LoKr, TuckerLoCon

Tensors = dict[str, torch.Tensor]
Made = tuple[Tensors, torch.Tensor]  # a module's tensors, and its update by a formula of the test's own

RANK, ALPHA = 2, 1.0
SCALE = ALPHA / RANK
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def split(size: int) -> tuple[int, int]:
    return (4, size // 4) if size % 4 == 0 else (1, size)


def make_lora(shape: tuple[int, ...]) -> Made:
    down, up = randn(RANK, *shape[1:]), randn(shape[0], RANK, *(1 for _ in shape[2:]))
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}
    return tensors, SCALE * torch.einsum("or,r...->o...", up.flatten(1), down)


def make_tucker(shape: tuple[int, ...]) -> Made:
    if len(shape) == 2:
        return make_lora(shape)
    out, width, *kernel = shape
    up, mid, down = randn(out, RANK, 1, 1), randn(RANK, RANK, *kernel), randn(RANK, width, 1, 1)
    tensors = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, "alpha": torch.tensor(ALPHA)}
    return tensors, SCALE * torch.einsum("op,pqhw,qi->oihw", up.flatten(1), mid, down.flatten(1))


def make_loha(shape: tuple[int, ...]) -> Made:
    columns = math.prod(shape[1:])
    w1_a, w1_b, w2_a, w2_b = (
        randn(shape[0], RANK),
        randn(RANK, columns),
        2 * randn(shape[0], RANK),
        -randn(RANK, columns),
    )
    tensors = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b}
    wanted = SCALE * torch.einsum("oi,ic,oj,jc->oc", w1_a, w1_b, w2_a, w2_b).reshape(shape)
    return {**tensors, "alpha": torch.tensor([ALPHA])}, wanted


def make_loha_with_cores(shape: tuple[int, ...]) -> Made:
    if len(shape) == 2:
        return make_loha(shape)
    out, width, *kernel = shape
    w1_a, w1_b, w2_a, w2_b = randn(RANK, out), randn(RANK, width), 2 * randn(RANK, out), -randn(RANK, width)
    t1, t2 = randn(RANK, RANK, *kernel), -randn(RANK, RANK, *kernel)
    tensors = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b}
    first = torch.einsum("ijhw,ip,jq->pqhw", t1, w1_a, w1_b)
    second = torch.einsum("ijhw,ip,jq->pqhw", t2, w2_a, w2_b)
    return {**tensors, "hada_t1": t1, "hada_t2": t2, "alpha": torch.tensor(ALPHA)}, SCALE * first * second


def make_lokr(shape: tuple[int, ...]) -> Made:
    """w1 whole, w2 a product; a convolution's is flattened."""
    (a, b), (c, d), kernel = split(shape[0]), split(shape[1]), shape[2:]
    w1, w2_a, w2_b = randn(a, c), randn(b, RANK), randn(RANK, d * math.prod(kernel))
    tensors = {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": torch.tensor(ALPHA)}
    return tensors, SCALE * torch.kron(w1, w2_a @ w2_b).reshape(shape)


def make_lokr_of_products(shape: tuple[int, ...]) -> Made:
    """Both halves products, of a convolution the second with a core."""
    (a, b), (c, d), kernel = split(shape[0]), split(shape[1]), shape[2:]
    w1_a, w1_b = randn(a, RANK), randn(RANK, c)
    tensors = {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "alpha": torch.tensor(ALPHA)}
    if not kernel:
        w2_a, w2_b = randn(b, RANK), randn(RANK, d)
        tensors |= {"lokr_w2_a": w2_a, "lokr_w2_b": w2_b}
        return tensors, SCALE * torch.kron(w1_a @ w1_b, w2_a @ w2_b)
    w2_a, w2_b, t2 = randn(RANK, b), randn(RANK, d), randn(RANK, RANK, *kernel)
    tensors |= {"lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "lokr_t2": t2}
    wanted = torch.einsum("ac,ijhw,ib,jd->abcdhw", w1_a @ w1_b, t2, w2_a, w2_b)
    return tensors, SCALE * wanted.reshape(shape)


def make_lokr_of_whole(shape: tuple[int, ...]) -> Made:
    """Alpha means nothing to it."""
    (a, b), (c, d), kernel = split(shape[0]), split(shape[1]), shape[2:]
    w1, w2 = randn(a, c), randn(b, d, *kernel)
    wanted = torch.einsum("ac,bd...->abcd...", w1, w2).reshape(shape)
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(64.0)}, wanted


def make_full(shape: tuple[int, ...]) -> Made:
    diff = 0.1 * randn(*shape)
    return {"diff": diff, "diff_b": torch.zeros(shape[0])}, diff


def with_lengths_and_scalar(shape: tuple[int, ...]) -> Made:
    tensors, wanted = make_loha(shape)
    tensors["dora_scale"] = 1 + randn(shape[0], *(1 for _ in shape[1:])).abs()
    tensors["scalar"] = torch.tensor(0.5)
    return tensors, 0.5 * wanted


MAKERS: dict[str, tuple[Callable[[tuple[int, ...]], Made], type]] = {
    "tucker": (make_tucker, TuckerLoCon),
    "loha": (make_loha, LoHa),
    "loha with cores": (make_loha_with_cores, LoHa),
    "lokr": (make_lokr, LoKr),
    "lokr of products": (make_lokr_of_products, LoKr),
    "lokr of whole matrices": (make_lokr_of_whole, LoKr),
    "full": (make_full, Dense),
    "lengths and scalar": (with_lengths_and_scalar, LoHa),
}


def weighted(unet: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def whole_file(path: Path, unet: nn.Module, make: Callable[[tuple[int, ...]], Made]) -> dict[str, torch.Tensor]:
    """A file for every Linear and convolution of the UNet; gives back {module path: ΔW}."""
    tensors: Tensors = {}
    wanted: dict[str, torch.Tensor] = {}
    for where, module in weighted(unet).items():
        own, wanted[where] = make(module.weight.shape)
        tensors |= {f"lora_unet_{where.replace('.', '_')}.{ending}": value for ending, value in own.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return wanted


def bare(layer: Any) -> torch.Tensor:
    return dataclasses.replace(layer, magnitude=None).delta()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_on_every_module(tmp_path: Path, tiny_pipeline: StableDiffusionPipeline, kind: str) -> None:
    """Read, every layer's ΔW is the formula's; lowered it still is, in the shape of the module's weight."""
    make, form = MAKERS[kind]
    wanted = whole_file(tmp_path / "a.safetensors", tiny_pipeline.unet, make)
    adapter = ld.read_adapter(tmp_path / "a.safetensors")
    assert adapter.dialect == "lycoris"
    assert adapter.layer_count() == len(wanted)
    layers = adapter.layers()["unet"]
    assert any(isinstance(layer, form) for layer in layers.values())
    assert all(isinstance(layer, form | ld.LowRank) for layer in layers.values())
    low = lowered(adapter)
    for where, delta in wanted.items():
        found = bare(layers[where])
        assert relative(found.reshape(delta.shape), delta) < 1e-5, where
        found = bare(low.components["unet"][where])
        assert found.shape == delta.shape
        assert relative(found, delta) < 1.01e-3, where
    has_lengths = kind == "lengths and scalar"
    assert all((layer.magnitude is not None) == has_lengths for layer in low.components["unet"].values())


@pytest.mark.parametrize("kind", MAKERS)
def test_into_a_pipeline(tmp_path: Path, tiny_pipeline: StableDiffusionPipeline, unet_output: Any, kind: str) -> None:
    """The UNet answers as one whose weights were changed by the formula, DoRA's lengths included."""
    unet = tiny_pipeline.unet
    wanted = whole_file(tmp_path / "a.safetensors", unet, MAKERS[kind][0])
    report = ld.load_adapter(tiny_pipeline, tmp_path / "a.safetensors")
    assert report.complete
    assert report.matched == len(wanted)
    with torch.no_grad():
        found = unet_output(unet)
        ld.unload(tiny_pipeline)
        before = unet_output(unet)
        for where, module in weighted(unet).items():
            changed = module.weight + wanted[where]
            if kind == "lengths and scalar":
                lengths = with_lengths_and_scalar(module.weight.shape)[0]["dora_scale"]
                norms = changed.flatten(1).norm(dim=1).view(lengths.shape)
                changed = changed * lengths / norms
            module.weight.copy_(changed)
        after = unet_output(unet)
    assert relative(found, after) < 5e-3
    assert relative(before, after) > 0.05


def test_kinds_may_differ_from_module_to_module(tmp_path: Path) -> None:
    """Plain LoRA beside the rest becomes a plain layer at once; text encoders have names of their own."""
    tensors = {f"{NAME}.{ending}": value for ending, value in make_lora((8, 12))[0].items()}
    other = NAME.replace("to_q", "to_k")
    tensors |= {f"{other}.{ending}": value for ending, value in make_lokr((8, 12))[0].items()}
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors |= {f"{text}.{ending}": value for ending, value in make_loha((8, 12))[0].items()}
    lengths = 1 + torch.rand(8, 1)
    tensors |= {f"{NAME}.dora_scale": lengths, f"{NAME}.scalar": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_tag": "x", "sshs_model_hash": "0"})
    adapter = ld.read_adapter(tmp_path / "a.safetensors")
    assert {component: list(layers) for component, layers in adapter.components.items()} == {"unet": [PATH]}
    assert {component: list(layers) for component, layers in adapter.structured.items()} == {
        "unet": [PATH.replace("to_q", "to_k")],
        "text_encoder": ["text_model.encoder.layers.0.mlp.fc1"],
    }
    plain = adapter.components["unet"][PATH]
    assert plain.scale == 3 * SCALE
    assert torch.equal(plain.magnitude, lengths.flatten())
    assert adapter.foreign == {"ss_tag": "x"}
    assert adapter.notes == []


def test_what_has_to_be_assumed_is_in_the_notes(tmp_path: Path) -> None:
    def notes(tensors: Tensors) -> list[str]:
        save_file({f"{NAME}.{ending}": value for ending, value in tensors.items()}, tmp_path / "a.safetensors")
        adapter = ld.read_adapter(tmp_path / "a.safetensors")
        assert adapter.structured["unet"][PATH].scale == 1.0
        return adapter.notes

    loha = make_loha((8, 12))[0]
    assert "no alpha" in notes({ending: value for ending, value in loha.items() if ending != "alpha"})[0]
    assert "no alpha, or one of 0" in notes({**loha, "alpha": torch.tensor(0.0)})[0]
    full = make_full((8, 12))[0]
    alpha, biases = notes({**full, "alpha": torch.tensor(4.0)})
    assert "means nothing" in alpha
    assert "all of them zero" in biases
    assert notes(make_lokr_of_whole((8, 12))[0]) == []


def zeros(**shapes: tuple[int, ...]) -> Tensors:
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


LOHA = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 12), "hada_w2_a": (8, 2), "hada_w2_b": (2, 12)}
CORES = {"hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3)}
LOKR = {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}
TUCKER = {"lora_up__weight": (8, 2, 1, 1), "lora_mid__weight": (2, 2, 3, 3), "lora_down__weight": (2, 4, 1, 1)}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        # Kinds by name.
        ({"on_input": (), "weight": (8,)}, "uses IA3"),
        ({**LOHA, "weight": (8,)}, "uses IA3"),
        ({"a1__weight": (2, 8), "a2__weight": (8, 2)}, "uses GLoRA"),
        ({"oft_blocks": (2, 4, 4)}, "uses OFT or BOFT"),
        ({"oft_diag": (2, 4, 4)}, "uses OFT"),
        ({"w_norm": (8,), "b_norm": (8,)}, "uses a change of a norm"),
        ({"lambda_layer": (1, 2)}, "uses T-LoRA"),
        ({**LOHA, "bias_indices": (2, 4)}, "uses a sparse bias"),
        ({**LOHA, "something": (2, 4)}, "not understood in the lycoris dialect: .*something"),
        ({**LOKR, "lokr_t1": (2, 2, 3, 3)}, "not understood in the lycoris dialect: .*lokr_t1"),
        # Factors that do not fit each other.
        ({name: shape for name, shape in LOHA.items() if name != "hada_w2_b"}, "incomplete or do not fit"),
        ({**LOHA, "hada_w1_b": (3, 12)}, r"hada_w1_a \[8, 2\], hada_w1_b \[3, 12\]"),
        ({**LOHA, "hada_w2_a": (7, 2)}, "do not fit"),
        ({**LOHA, "hada_w2_b": (2, 13)}, "do not fit"),
        ({**LOHA, "hada_w2_a": (8, 3), "hada_w2_b": (3, 12)}, "do not fit"),
        ({**LOHA, "hada_w1_a": (8, 2, 1, 1)}, "do not fit"),
        ({**LOHA, "hada_w1_a": (0, 2), "hada_w2_a": (0, 2)}, "do not fit"),
        ({**LOHA, **CORES}, "do not fit"),
        ({**LOHA, "hada_w1_a": (2, 8), "hada_w2_a": (2, 8), "hada_t1": (2, 2, 3, 3)}, "do not fit"),
        ({**LOHA, "hada_w1_a": (2, 8), "hada_w2_a": (2, 8), **CORES, "hada_t2": (2, 2, 1, 1)}, "do not fit"),
        ({**LOHA, "hada_w1_a": (2, 8), "hada_w2_a": (2, 8), **CORES, "hada_t2": (2, 2)}, "do not fit"),
        ({"lokr_w1": (2, 3)}, "do not fit"),
        ({**LOKR, "lokr_w2": (4, 4)}, "do not fit"),
        ({**LOKR, "lokr_w1": (2, 3, 1)}, "do not fit"),
        ({**LOKR, "lokr_w2_b": (3, 4)}, "do not fit"),
        ({**LOKR, "lokr_t2": (2, 2, 3, 3)}, "do not fit"),
        ({"lokr_w1": (2, 3), "lokr_w2": (2, 3, 3)}, "do not fit"),
        ({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}, "do not fit"),
        ({**TUCKER, "lora_mid__weight": (2, 3, 3, 3)}, "do not fit"),
        ({**TUCKER, "lora_mid__weight": (2, 2, 3)}, "do not fit"),
        ({**TUCKER, "lora_down__weight": (2, 4, 3, 3)}, "do not fit"),
        ({"lora_mid__weight": (2, 2, 3, 3)}, "do not fit"),
        ({"diff": (8,)}, "full difference factors at .* do not fit each other: diff .8."),
        ({"diff_b": (8,)}, "incomplete"),
        ({**LOHA, "diff": (8, 12)}, r"factors of more than one kind \(LoHa, full difference\)"),
        ({**LOHA, **TUCKER}, "more than one kind"),
        (
            {"hada_w1_a": (8, 9000), "hada_w1_b": (9000, 1), "hada_w2_a": (8, 9000), "hada_w2_b": (9000, 1)},
            "rank 9,000",
        ),
        # What stands beside them.
        ({"scalar": ()}, "without the factors"),
        ({**LOHA, "alpha": (2,)}, r"alpha with shape \[2\]; it is one number"),
        ({**LOHA, "scalar": (0,)}, r"scalar with shape \[0\]; it is one number"),
        ({**LOHA, "dora_scale": (1, 12)}, r"DoRA along the inputs \(.*dora_scale, wd_on_output=False\)"),
        ({**TUCKER, "dora_scale": (1, 4, 1, 1)}, "DoRA along the inputs"),
        ({**LOHA, "hada_w1_b": (2, 8), "hada_w2_b": (2, 8), "dora_scale": (1, 8)}, "DoRA along the inputs"),
        ({**LOHA, "dora_scale": (7, 1)}, "for 8 outputs"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, shapes: dict[str, tuple[int, ...]], words: str) -> None:
    tensors = {f"{NAME}.{ending}": value for ending, value in zeros(**shapes).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ld.AdapterFormatError, match=words) as caught:
        ld.read_adapter(tmp_path / "a.safetensors")
    assert str(caught.value).isprintable()


def test_a_change_of_a_bias_is_refused(tmp_path: Path) -> None:
    tensors = make_full((8, 12))[0]
    tensors["diff_b"][3] = 1e-3
    save_file({f"{NAME}.{ending}": value for ending, value in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ld.AdapterFormatError, match="changes a bias"):
        ld.read_adapter(tmp_path / "a.safetensors")


def test_names_that_are_unknown_or_meet(tmp_path: Path) -> None:
    loha = zeros(**LOHA)
    save_file({f"lora_unet_nowhere.{ending}": value for ending, value in loha.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ld.AdapterFormatError, match=r"lora_unet_nowhere\.hada_w1_a, and no module of that name"):
        ld.read_adapter(tmp_path / "a.safetensors")
    twice = {f"{name}.{ending}": value for name in (NAME, f"lycoris{NAME[4:]}") for ending, value in loha.items()}
    save_file({name: value.clone() for name, value in twice.items()}, tmp_path / "b.safetensors")
    with pytest.raises(ld.AdapterFormatError, match="twice, as lora_unet_mid_block"):
        ld.read_adapter(tmp_path / "b.safetensors")


def test_a_small_file_that_claims_much_is_read_and_not_multiplied_out(tmp_path: Path) -> None:
    """Half a megabyte stands for a matrix of 16 GiB: reading allocates the file's own tensors only."""
    side = 2**16
    loha = {"hada_w1_a": (side, 1), "hada_w1_b": (1, side), "hada_w2_a": (side, 1), "hada_w2_b": (1, side)}
    tensors = {f"{NAME}.{ending}": value.half() for ending, value in zeros(**loha).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = ld.read_adapter(tmp_path / "a.safetensors")
    assert adapter.structured["unet"][PATH].shape == (side, side)
    with pytest.raises(ld.AdapterFormatError, match=r"to_q would take 4,294,967,296 numbers"):
        lowered(adapter)


def test_written_in_another_dialect(tmp_path: Path) -> None:
    """`write_adapter` turns it into plain products, in the convolution's shape."""
    name, path = "lora_unet_down_blocks_0_resnets_0_conv1", "down_blocks.0.resnets.0.conv1"
    tensors, wanted = make_loha((16, 8, 3, 3))
    save_file({f"{name}.{ending}": value for ending, value in tensors.items()}, tmp_path / "a.safetensors")
    for format in ("diffusers", "kohya"):
        ld.write_adapter(ld.read_adapter(tmp_path / "a.safetensors"), tmp_path / f"{format}.safetensors", format)
        again = ld.read_adapter(tmp_path / f"{format}.safetensors")
        assert again.dialect == format
        assert relative(again.components["unet"][path].delta(), wanted) < 1e-6
