"""loralib's state dicts: plain and merged projections, heads, and an alpha that is nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification

import lora_diffusion as ld
from lora_diffusion.files import loralib
from lora_diffusion.files.pickled import read_pickled_adapter
from lora_diffusion.files.safetensors_file import TensorFile

REAL = Path(__file__).parents[4] / "shared" / "data" / "adapters" / "loralib_roberta_base_mnli.bin"
QUERY = "roberta.encoder.layer.0.attention.self.query"


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    g = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(shape, generator=g) for name, shape in shapes.items()}, path)
    return path


def pair(where: str, rank: int = 2, width: int = 8) -> dict[str, tuple[int, ...]]:
    return {f"{where}.lora_A": (rank, width), f"{where}.lora_B": (width, rank)}


@pytest.fixture(scope="module")
def roberta() -> RobertaForSequenceClassification:
    """RoBERTa base with the shape of Microsoft's: random weights."""
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=3)
    return RobertaForSequenceClassification(config).eval()


def test_the_real_file(roberta: RobertaForSequenceClassification) -> None:
    """All 24 layers and both head modules find their place, and the logits are those of W + alpha/r · B·A."""
    if not REAL.exists():
        pytest.skip("the real adapters are not here")
    saved = torch.load(REAL, map_location="cpu", weights_only=True)
    adapter = read_pickled_adapter(REAL, alpha=16)
    assert adapter.dialect == "loralib"
    assert adapter.notes == []
    layers = adapter.components["model"]
    assert len(layers) == 24
    for path, layer in layers.items():
        expected = 16 / 8 * saved[f"{path}.lora_B"] @ saved[f"{path}.lora_A"]
        torch.testing.assert_close(layer.delta(), expected, rtol=1e-6, atol=1e-8)
    tokens = torch.arange(3, 15)[None]
    before = {name: value.clone() for name, value in roberta.state_dict().items()}
    with torch.no_grad():
        report = ld.load_adapter(roberta, adapter, name="mnli")
        assert report.complete
        assert report.matched == 24
        ours = roberta(tokens).logits
        ld.delete_adapter(roberta, "mnli")
        plain = roberta(tokens).logits
        changed = dict(before)
        changed.update({name: value for name, value in saved.items() if "lora_" not in name})
        for path in layers:
            delta = 16 / 8 * saved[f"{path}.lora_B"] @ saved[f"{path}.lora_A"]
            changed[f"{path}.weight"] = before[f"{path}.weight"] + delta
        direct = torch.func.functional_call(roberta, changed, (tokens,)).logits
    torch.testing.assert_close(ours, direct, rtol=1e-5, atol=1e-5)
    assert (plain - direct).abs().max() > 1e-2, "the adapter does something"


def test_through_safetensors(tmp_path: Path) -> None:
    """Written again, the head and every delta come back."""
    if not REAL.exists():
        pytest.skip("the real adapters are not here")
    adapter = read_pickled_adapter(REAL)
    assert any("alpha is not in a loralib file" in note for note in adapter.notes)
    ld.write_adapter(adapter, tmp_path / "a.safetensors")
    again = ld.read_adapter(tmp_path / "a.safetensors")
    for path, layer in adapter.components["model"].items():
        assert torch.equal(again.components["model"][path].delta(), layer.delta())
    for path, tensors in adapter.copies["model"].items():
        for name, value in tensors.items():
            assert torch.equal(again.copies["model"][path][name], value)


def test_alpha(tmp_path: Path) -> None:
    """Without one the scale is 1 and a note says so; with one it is alpha over the rank."""
    path = write(tmp_path / "a.safetensors", pair(QUERY, 4))
    adapter = ld.read_adapter(path)
    assert adapter.components["model"][QUERY].scale == 1.0
    assert len(adapter.notes) == 1
    adapter = loralib.read(TensorFile(path), alpha=16)
    assert adapter.components["model"][QUERY].scale == 4.0
    assert adapter.configs["model"].lora_alpha == 16
    assert adapter.notes == []
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(ld.ConfigError, match="alpha="):
            loralib.read(TensorFile(path), alpha=alpha)


@pytest.mark.parametrize("enabled", [(True, False, True), (True, True, True)])
def test_merged_linear(tmp_path: Path, enabled: tuple[bool, ...]) -> None:
    """A fused projection as loralib computes it, a convolution in groups whose rows are spread; and in GPT-2."""
    parts, rank, width = sum(enabled), 4, 24
    name = "transformer.h.0.attn.c_attn"
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(parts * rank, width, generator=g), torch.randn(parts * width, rank, generator=g)
    torch.save({"model_state_dict": {f"{name}.lora_A": a, f"{name}.lora_B": b}}, tmp_path / "gpt2.pt")
    adapter = read_pickled_adapter(tmp_path / "gpt2.pt", alpha=32)
    learned = F.conv1d(a[None], b[..., None], groups=parts)[0] * 32 / rank
    expected = torch.zeros(3, width, width)
    expected[torch.tensor(enabled)] = learned.view(parts, width, width)
    layer = adapter.components["model"][name]
    torch.testing.assert_close(layer.delta(), expected.view(3 * width, width), rtol=1e-5, atol=1e-5)
    assert bool(adapter.notes) == (parts == 2)

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_head=2, n_layer=1, vocab_size=32, n_positions=16)).eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert ld.load_adapter(model, adapter, name="a").complete
        ours = model(tokens).logits
        ld.delete_adapter(model, "a")
        model.transformer.h[0].attn.c_attn.weight += expected.view(3 * width, width).T
        torch.testing.assert_close(ours, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_convolutions_do_not_slip_in(tmp_path: Path) -> None:
    """loralib folds the kernel into both factors: refused at the file where it shows, else at the model."""
    shapes = {"features.0.lora_A": (2 * 3, 4 * 3), "features.0.lora_B": (8 * 3, 2 * 3)}
    beside = write(tmp_path / "b.safetensors", {**shapes, "features.0.conv.weight": (8, 4, 3, 3)})
    with pytest.raises(ld.AdapterFormatError, match="convolution"):
        ld.read_adapter(beside)
    model = torch.nn.Sequential()
    model.add_module("features", torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3)))
    with pytest.raises(ld.AdapterMismatchError):
        ld.load_adapter(model, write(tmp_path / "a.safetensors", shapes))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({f"{QUERY}.lora_A": (2, 8)}, "without its other half"),
        ({f"{QUERY}.lora_A": (2, 8), f"{QUERY}.lora_B": (8, 3)}, "do not fit each other"),
        ({f"{QUERY}.lora_A": (8, 8), f"{QUERY}.lora_B": (8, 2)}, "do not fit each other"),  # four parts
        ({f"{QUERY}.lora_A": (4, 8), f"{QUERY}.lora_B": (7, 2)}, "do not fit each other"),  # two of an odd height
        ({f"{QUERY}.lora_A": (0, 8), f"{QUERY}.lora_B": (8, 0)}, "do not fit each other"),
        ({f"{QUERY}.lora_A": (2,), f"{QUERY}.lora_B": (8,)}, "do not fit each other"),
        ({f"{QUERY}.lora_A": (9000, 2), f"{QUERY}.lora_B": (2, 9000)}, "rank 9,000"),
        ({f"{QUERY}.lora_A": (9000, 2), f"{QUERY}.lora_B": (2, 4500)}, "rank 9,000"),
        ({**pair(QUERY), f"{QUERY}.bias": (8,)}, "biases"),
        ({**pair(QUERY), "roberta.LayerNorm.bias": (8,)}, "biases"),
        ({**pair(QUERY), f"{QUERY}.weight": (8, 8), f"{QUERY}.bias": (8,)}, "whole as well as"),
        ({**pair(QUERY), "weight": (8,)}, "not understood"),
        ({**pair(QUERY), f"{QUERY}.lora_C": (8,)}, "not understood"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ld.AdapterFormatError, match=words) as caught:
        ld.read_adapter(write(tmp_path / "a.safetensors", shapes))
    assert str(caught.value).isprintable()
