"""Bottleneck adapters: where they stand, what they compute, and that nothing is left of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_diffusion as ld
from lora_diffusion.methods.bottleneck import Bottleneck
from lora_diffusion.methods.registry import config_from_dict

Model, Answer = Callable[[str], Any], Callable[..., torch.Tensor]
FAMILIES = ("bert", "roberta", "deberta", "gpt2", "llama", "qwen2", "mistral", "t5", "bloom")
PLACEMENTS = ("houlsby", "pfeiffer", "lin")


def config(placement: str = "houlsby", **fields: Any) -> ld.BottleneckConfig:
    return ld.BottleneckConfig(placement=placement, **{"bottleneck_size": 8, **fields})


def shape_of(model: nn.Module) -> dict[str, Any]:
    """Everything that an adapter could leave behind: names, classes, hooks and attributes of every module."""
    return {
        path: (type(module), list(module._forward_hooks), sorted(module.__dict__), sorted(module._modules))
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_acts_and_leaves(
    text_model: Model,
    text_answer: Answer,
    randomise: Callable[..., None],
    bits: Callable[[nn.Module], dict[str, bytes]],
    family: str,
    placement: str,
) -> None:
    """Nearly the base at the start; the base bit for bit when disabled, switched off and taken out."""
    model = text_model(family)
    before, shape, base = bits(model), shape_of(model), text_answer(model)
    ld.add_adapter(model, config(placement))
    assert {name: value for name, value in bits(model).items() if name in before} == before
    assert torch.allclose(text_answer(model), base, atol=0.05)
    randomise(model)
    assert not torch.allclose(text_answer(model), base, atol=1e-4)
    with ld.disable_adapters(model):
        assert torch.equal(text_answer(model), base)
    ld.set_adapters(model, [])
    assert torch.equal(text_answer(model), base)
    ld.set_adapters(model, "default", 0.0)
    assert torch.equal(text_answer(model), base)
    ld.unload(model)
    assert bits(model) == before and shape_of(model) == shape
    assert torch.equal(text_answer(model), base)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_zero_initial_values_are_the_base(text_model: Model, text_answer: Answer) -> None:
    model = text_model("gpt2")
    base = text_answer(model)
    ld.add_adapter(model, config("lin", init_weights="zero"))
    assert torch.equal(text_answer(model), base)


def test_initial_values_are_cut_and_repeatable(text_model: Model) -> None:
    """Houlsby et al.: N(0, 0.01²), nothing beyond two deviations; the same generator draws the same."""
    drawn = []
    for _ in range(2):
        model = text_model("bert")
        ld.add_adapter(model, config(), generator=torch.Generator().manual_seed(5))
        drawn.append(ld.get_adapter(model).methods["model"]["bottleneck"].tensors)
    weights = torch.cat([t.flatten() for name, t in drawn[0].items() if name.endswith((".down", ".up"))])
    assert weights.abs().max() <= 0.02 and 0.007 < weights.std() < 0.01
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def bottleneck(h: torch.Tensor, t: dict[str, torch.Tensor], path: str, f: Callable[..., torch.Tensor]) -> torch.Tensor:
    """What one bottleneck makes of h, written out."""
    if f"{path}.norm_weight" in t:
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h = h * t[f"{path}.norm_weight"] + t[f"{path}.norm_bias"]
    return f(h @ t[f"{path}.down"].t() + t[f"{path}.down_bias"]) @ t[f"{path}.up"].t() + t[f"{path}.up_bias"]


def learned(model: Any) -> dict[str, torch.Tensor]:
    return dict(ld.get_adapter(model).methods["model"]["bottleneck"].tensors)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_computes_a_bert_block_as_published(
    text_model: Model, randomise: Callable[..., None], placement: str
) -> None:
    """One block of a BERT written out, with the adapters where the papers have them."""
    model = text_model("bert")
    ld.add_adapter(model, config(placement))
    randomise(model)
    t, block = learned(model), model.bert.encoder.layer[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4))
    out, attention = block.output, block.attention.output
    with ld.disable_adapters(model):
        context = block.attention.self(x)[0]
        h = attention.dense(context)
        if placement == "houlsby":
            h = h + bottleneck(h, t, "bert.encoder.layer.0.attention.output.dropout", F.gelu)
        y = attention.LayerNorm(h + x)
        h = out.dense(block.intermediate(y))
        if placement == "pfeiffer":
            normed = out.LayerNorm(h + y)
            expected = out.LayerNorm(h + y + bottleneck(normed, t, "bert.encoder.layer.0.output.LayerNorm", torch.relu))
        else:
            f = F.gelu if placement == "houlsby" else torch.relu
            h = h + bottleneck(h, t, "bert.encoder.layer.0.output.dropout", f)
            expected = out.LayerNorm(h + y)
    assert torch.allclose(block(x), expected, atol=1e-6)


def test_houlsby_stands_behind_every_sublayer_of_t5(text_model: Model) -> None:
    """Encoder blocks have two, decoder blocks three with the cross-attention; the decoder's count on for leave_out."""
    model = text_model("t5")
    ld.add_adapter(model, config())
    paths = {name.rpartition(".")[0] for name in learned(model)}
    assert len(paths) == 2 * 2 + 2 * 3
    ld.unload(model)
    ld.add_adapter(model, config(leave_out=[0, 1, 2]))
    paths = {name.rpartition(".")[0] for name in learned(model)}
    assert paths == {f"decoder.block.1.layer.{k}.dropout" for k in range(3)}


def test_adapter_drop_leaves_out_the_first_blocks(text_model: Model, text_answer: Answer) -> None:
    """What the blocks without adapters compute is the base's."""
    model = text_model("llama")
    ld.add_adapter(model, config("pfeiffer", leave_out=range(1)))
    assert {name.partition(".mlp")[0] for name in learned(model)} == {"model.layers.1"}
    hidden = model.model(torch.tensor([[5, 6]]), output_hidden_states=True).hidden_states[1]
    ld.unload(model)
    assert torch.equal(hidden, model.model(torch.tensor([[5, 6]]), output_hidden_states=True).hidden_states[1])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_training_changes_nothing_else(
    text_model: Model,
    text_answer: Answer,
    bits: Callable[[nn.Module], dict[str, bytes]],
    family: str,
    placement: str,
) -> None:
    """Every tensor of every bottleneck learns, with gradient checkpointing as without, and the base stays."""
    model = text_model(family)
    before = bits(model)
    ld.add_adapter(model, config(placement), generator=torch.Generator().manual_seed(1))
    parameters = [p for several in ld.adapter_parameters(model).values() for p in several]
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module.__dict__.get("dropout"), float):  # T5's attention
                module.dropout = 0.0
        without_cache = {} if family == "bert" else {"use_cache": False}
        text_answer(model, learning=True, **without_cache).square().mean().backward()
        gradients.append([p.grad.clone() for p in parameters])
        model.zero_grad()
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        text_answer(model, learning=True).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {name: value for name, value in bits(model).items() if name in before} == before


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_save_and_load(
    text_model: Model, text_answer: Answer, randomise: Callable[..., None], tmp_path: Path, family: str
) -> None:
    """The same outputs from the file, by a config that says the same."""
    model, path = text_model(family), tmp_path / "adapter.safetensors"
    made = config("pfeiffer", leave_out=range(1), non_linearity="tanh")
    ld.add_adapter(model, made)
    randomise(model)
    expected = text_answer(model)
    ld.save_adapter(model, path)
    other = text_model(family)
    report = ld.load_adapter(other, path, "mine")
    assert torch.equal(text_answer(other), expected)
    assert report.methods == {"model": ["bottleneck"]}
    loaded = ld.read_adapter(path).methods["model"]["bottleneck"].config
    assert loaded == config_from_dict(made.to_dict()) and loaded.non_linearity == "tanh"
    assert not any(p.requires_grad for several in ld.adapter_parameters(other, "mine").values() for p in several)


def test_a_file_of_another_size_is_refused(
    text_model: Model, bits: Callable[[nn.Module], dict[str, bytes]], tmp_path: Path
) -> None:
    model, path = text_model("bert"), tmp_path / "adapter.safetensors"
    ld.add_adapter(model, config())
    ld.save_adapter(model, path)
    other = text_model("gpt2")
    before, shape = bits(other), shape_of(other)
    with pytest.raises(ld.AdapterMismatchError, match="tensors are others"):
        ld.load_adapter(other, path)
    assert bits(other) == before and shape_of(other) == shape


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_copies_are_whole_and_of_their_own(
    text_model: Model, text_answer: Answer, randomise: Callable[..., None], placement: str
) -> None:
    model = text_model("bert")
    ld.add_adapter(model, config(placement))
    randomise(model)
    expected = text_answer(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(text_answer(twin), expected)
        ld.unload(twin)
        assert not any(isinstance(module, Bottleneck) for module in twin.modules())
        assert torch.equal(text_answer(model), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_several_act_side_by_side(
    text_model: Model, text_answer: Answer, randomise: Callable[..., None], placement: str
) -> None:
    """Two of the same tensors at half strength are one at full strength, at the first block's place; the order in
    which they came does not matter."""
    model = text_model("bert")
    only_last = config(placement, leave_out=[0])
    for name in ("a", "b"):
        ld.add_adapter(model, only_last, name)
        randomise(model, name)
    ld.set_adapters(model, ["a"])
    expected = text_answer(model)
    ld.set_adapters(model, ["a", "b"], [0.5, 0.5])
    tolerance = 0.05 if placement == "houlsby" else 1e-6  # its second bottleneck reads what the first has changed
    assert torch.allclose(text_answer(model), expected, atol=tolerance)
    randomise(model, "b", seed=9)
    one = text_answer(model)
    ld.set_adapters(model, ["b", "a"], [0.5, 0.5])
    assert torch.equal(text_answer(model), one)
    ld.delete_adapter(model, "a")
    ld.set_adapters(model, "b")
    assert not torch.equal(text_answer(model), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_rows_of_different_adapters(
    text_model: Model, text_answer: Answer, randomise: Callable[..., None], family: str, placement: str
) -> None:
    """Row i is what the batch is with its adapter alone; twice the rows are two of each; another number is refused."""
    model = text_model(family)
    base, alone = text_answer(model, rows=6), {}
    for seed, name in enumerate(("a", "b")):
        ld.add_adapter(model, config(placement), name)
        randomise(model, name, seed=seed)
        ld.set_adapters(model, name, 1.0)
        alone[name] = text_answer(model, rows=6)
    ld.set_adapters(model, "a", 0.5)
    half = text_answer(model, rows=6)
    ld.set_adapters(model, ["a", "b"], [0.5, 1.0])
    with ld.adapters_per_sample(model, ["b", None, "a"]):
        mixed = text_answer(model, rows=6)
        with pytest.raises(ld.ConfigError, match="told 3 adapters and the batch has 4"):
            text_answer(model, rows=4)
    with ld.adapters_per_sample(model, ["a", None]), ld.adapters_per_sample(model, ["b", None]):
        inner = text_answer(model, rows=2)
    assert torch.allclose(inner[0], alone["b"][0], atol=1e-5) and torch.allclose(inner[1], base[1], atol=1e-5)
    for row, expected in enumerate([alone["b"], alone["b"], base, base, half, half]):  # as beam search lays them out
        assert torch.allclose(mixed[row], expected[row], atol=1e-5)
    ld.set_adapters(model, "a", 1.0)
    assert torch.equal(text_answer(model, rows=6), alone["a"])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_beside_lora_and_with_it_in_one(
    text_model: Model, text_answer: Answer, randomise: Callable[..., None], tmp_path: Path, placement: str
) -> None:
    """LoRA on the very modules that carry bottlenecks: as two adapters and as one, trained, saved and taken out."""
    model = text_model("llama")
    base = text_answer(model)
    lora = ld.LoraConfig(r=2, target_modules=["down_proj", "o_proj"])
    ld.add_adapter(model, lora, "lora")
    randomise(model, "lora")
    with_lora = text_answer(model)
    ld.add_adapter(model, config(placement), "small")
    randomise(model, "small")
    both = text_answer(model)
    ld.delete_adapter(model, "lora")
    assert not torch.allclose(text_answer(model), both, atol=1e-4)
    ld.unload(model)
    assert torch.equal(text_answer(model), base)

    ld.add_adapter(model, [lora, config(placement)], "one")
    randomise(model, "one")
    for parameters in ld.adapter_parameters(model, "one").values():
        text_answer(model, learning=True).square().mean().backward()
        assert all(p.grad is not None for p in parameters)
    expected = text_answer(model)
    ld.save_adapter(model, tmp_path / "one.safetensors", "one")
    ld.unload(model)
    ld.load_adapter(model, tmp_path / "one.safetensors", "one")
    assert torch.equal(text_answer(model), expected)
    assert not torch.allclose(expected, with_lora, atol=1e-4)


def test_norms_that_are_learned_along(
    text_model: Model, text_answer: Answer, randomise: Callable[..., None], tmp_path: Path
) -> None:
    """As Houlsby et al. do; where a bottleneck stands on the norm itself, that is refused."""
    model = text_model("bert")
    base = text_answer(model)
    ld.add_adapter(model, config(modules_to_save=["LayerNorm"]))
    randomise(model)
    expected = text_answer(model)
    ld.save_adapter(model, tmp_path / "a.safetensors")
    ld.unload(model)
    assert torch.equal(text_answer(model), base)
    ld.load_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(text_answer(model), expected)
    ld.unload(model)
    with pytest.raises(ld.ConfigError, match="modules_to_save names"):
        ld.add_adapter(model, config("pfeiffer", modules_to_save=["LayerNorm"]))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_half_precision_bases(text_model: Model, text_answer: Answer, family: str, placement: str) -> None:
    """fp32 bottlenecks beside a bf16 base, and under autocast: the outputs' dtype is the base's, gradients are fp32."""
    model = text_model(family).to(torch.bfloat16)
    ld.add_adapter(model, config(placement))
    answer = text_answer(model, learning=True)
    assert answer.dtype == torch.bfloat16
    answer.float().square().mean().backward()
    parameters = [p for several in ld.adapter_parameters(model).values() for p in several]
    assert all(p.dtype == torch.float32 and p.grad is not None for p in parameters)
    model = text_model(family)
    ld.add_adapter(model, config(placement))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(text_answer(model)).all()


def test_generation_with_a_cache(text_model: Model, randomise: Callable[..., None]) -> None:
    """Token by token with a cache says what it says without."""
    model = text_model("gpt2")
    ld.add_adapter(model, config())
    randomise(model)
    ids = torch.tensor([[5, 6, 7]])
    said = [model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*said)


class Unknown(nn.Module):
    """Blocks of a kind that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"wide": nn.Linear(8, 16), "back": nn.Linear(16, 8)})] * 1)
        self.blocks.append(nn.ModuleDict({"wide": nn.Linear(8, 16), "back": nn.Linear(16, 8)}))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["back"](torch.relu(block["wide"](x)))
        return x


def test_an_unknown_architecture_says_the_way_out() -> None:
    model, x = Unknown(), torch.ones(2, 3, 8)
    base = model(x)
    with pytest.raises(ld.AdapterMismatchError, match="target_modules, of 'back', 'wide'"):
        ld.add_adapter(model, config())
    ld.add_adapter(model, config("lin", target_modules=["back"]))
    assert {name.rpartition(".")[0] for name in learned(model)} == {"blocks.0.back", "blocks.1.back"}
    ld.set_adapters(model, [])
    assert torch.equal(model(x), base)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"leave_out": [2]}, "leave_out names block 2: the model has 2, 0 to 1"),
        ({"leave_out": range(2)}, "all 2 blocks"),
        ({"bottleneck_size": 129}, "bottleneck_size=129: give a whole number from 1 to 128"),
        ({"target_modules": ["densee"]}, "nearest names are dense"),
        ({"target_modules": "bert.encoder"}, None),
    ],
)
def test_what_does_not_fit_the_model(
    text_model: Model,
    bits: Callable[[nn.Module], dict[str, bytes]],
    fields: dict[str, Any],
    words: str | None,
) -> None:
    """One clear line, and the model as it was; a module of no known width takes the model's."""
    model = text_model("bert")
    before, shape = bits(model), shape_of(model)
    if words is None:
        ld.add_adapter(model, config(**fields))
        return
    with pytest.raises(ld.LoraDiffusionError, match=words) as caught:
        ld.add_adapter(model, config(**fields))
    assert "\n" not in str(caught.value)
    assert bits(model) == before and shape_of(model) == shape


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"placement": "parallel"}, "'houlsby', 'pfeiffer', 'lin'"),
        ({"bottleneck_size": 0}, "from 1 to"),
        ({"bottleneck_size": 1 << 20}, "from 1 to"),
        ({"bottleneck_size": 4, "reduction_factor": 2}, "give one of them"),
        ({"reduction_factor": float("nan")}, "reduction_factor=nan"),
        ({"reduction_factor": 0}, "reduction_factor=0"),
        ({"non_linearity": "sin"}, "non_linearity='sin'"),
        ({"leave_out": [-1]}, "leave_out"),
        ({"leave_out": "01"}, "leave_out"),
        ({"leave_out": range(10**9)}, "leave_out"),
        ({"init_weights": "ones"}, "init_weights='ones'"),
        ({"reduction_factor": 0.1}, "reduction_factor=0.1"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": "(out"}, "not a valid regular expression"),
        ({"target_modules": ["a"], "leave_out": [0]}, "name only the modules"),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ld.ConfigError, match=words):
        ld.BottleneckConfig(**fields)


def test_sizes() -> None:
    assert ld.BottleneckConfig().size_for(768) == 48
    assert ld.BottleneckConfig(reduction_factor=2.5).size_for(768) == 307
    assert ld.BottleneckConfig(reduction_factor=16).size_for(8) == 1
