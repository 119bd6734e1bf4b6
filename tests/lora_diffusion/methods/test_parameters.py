"""Existing parameters that learn: BitFit, top blocks, everything; and the base is there all the time."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from torch import nn

import lora_diffusion as ld
from lora_diffusion.layers.weight_only import store_weight
from lora_diffusion.methods.registry import config_from_dict

Model, Answer, Bits = Callable[[str], Any], Callable[..., torch.Tensor], Callable[[nn.Module], dict[str, bytes]]
FAMILIES = ("bert", "roberta", "deberta", "gpt2", "llama", "qwen2", "mistral", "t5", "bloom")
NO_BIASES = ("llama", "mistral", "t5")
CONFIGS = {
    "bitfit": ld.BitFitConfig(),
    "top": ld.TopLayersConfig(num_layers=1),
    "full": ld.FullConfig(),
    "full, base on the CPU": ld.FullConfig(keep_base_on="cpu"),
}


def own(model: nn.Module) -> list[nn.Parameter]:
    return [p for several in ld.adapter_parameters(model).values() for p in several]


def identities(model: nn.Module) -> dict[str, int]:
    """{name: which object}, tied parameters under all their names."""
    return {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_acts_and_leaves(
    text_model: Model, text_answer: Answer, randomise: Callable[..., None], bits: Bits, family: str, how: str
) -> None:
    """The base's values at the start; the base's own objects, bit for bit, when disabled, switched off, taken out."""
    if how == "bitfit" and family in NO_BIASES:
        pytest.skip("it has no biases")
    model = text_model(family)
    before, objects, base = bits(model), identities(model), text_answer(model)
    structure = {path: (type(m), sorted(m.__dict__)) for path, m in model.named_modules()}
    ld.add_adapter(model, CONFIGS[how])
    assert torch.equal(text_answer(model), base)
    randomise(model)
    assert not torch.allclose(text_answer(model), base, atol=1e-4)
    with ld.disable_adapters(model):
        assert torch.equal(text_answer(model), base)
        assert {name: value for name, value in identities(model).items() if name in objects} == objects
    ld.set_adapters(model, "default", 0.0)
    assert torch.equal(text_answer(model), base)
    assert {name: value for name, value in bits(model).items() if name in before} == before
    ld.set_adapters(model, "default")
    ld.unload(model)
    assert bits(model) == before and identities(model) == objects
    assert {path: (type(m), sorted(m.__dict__)) for path, m in model.named_modules()} == structure
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("bert", ld.BitFitConfig(), 642),
        ("bert", ld.BitFitConfig(bias_terms="query_mlp"), 2 * (32 + 64)),
        ("deberta", ld.BitFitConfig(bias_terms="query_mlp"), 2 * (32 + 64)),
        ("qwen2", ld.BitFitConfig(), 2 * (32 + 16 + 16)),
        ("gpt2", ld.TopLayersConfig(num_layers=1), 12 * 32**2 + 13 * 32),
        ("gpt2", ld.TopLayersConfig(num_layers=1, final_norm=True), 12 * 32**2 + 13 * 32 + 2 * 32),
        ("gpt2", ld.TopLayersConfig(num_layers=2), 2 * (12 * 32**2 + 13 * 32)),
        ("t5", ld.TopLayersConfig(num_layers=1), 2 * 4 * 32**2 + 2 * 32 * 64 + 3 * 32),
    ],
)
def test_what_learns(text_model: Model, family: str, config: Any, expected: int) -> None:
    model = text_model(family)
    ld.add_adapter(model, config)
    assert sum(p.numel() for p in own(model)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_full_is_every_parameter(text_model: Model, family: str) -> None:
    """Each once, tied ones too, and all of them in place of the base's."""
    model = text_model(family)
    expected = sum(p.numel() for p in model.parameters())
    ld.add_adapter(model, ld.FullConfig())
    assert sum(p.numel() for p in own(model)) == expected
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in own(model)} == learning


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_tied_parameters_stay_tied(text_model: Model, randomise: Callable[..., None], family: str) -> None:
    model = text_model(family)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is head.weight
    base = embedding.weight
    ld.add_adapter(model, ld.FullConfig())
    randomise(model)
    assert embedding.weight is head.weight and embedding.weight is not base
    ld.set_adapters(model, "default", 0.5)
    assert embedding.weight is head.weight and embedding.weight is not base
    ld.set_adapters(model, [])
    assert embedding.weight is head.weight and embedding.weight is base


@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_training_is_ordinary_training_of_those_parameters(
    text_model: Model, text_answer: Answer, bits: Bits, family: str, how: str
) -> None:
    """Three steps of AdamW give what they give a model whose other parameters are frozen by hand; the optimizer keeps
    its parameters through switching and moving; the base has not changed."""
    model, plain = text_model(family), text_model(family)
    before = bits(model)
    ld.add_adapter(model, CONFIGS[how])
    names = set(ld.get_adapter(model).methods["model"][CONFIGS[how].kind].tensors)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in names)
    held = own(model)
    ours = torch.optim.AdamW(held, lr=1e-2)
    theirs = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        for one, optimizer in ((model, ours), (plain, theirs)):
            text_answer(one, learning=True).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with ld.disable_adapters(model):
            text_answer(model)
        model.to(torch.float64).to(torch.float32)
    assert [id(p) for p in own(model)] == [id(p) for p in held]
    assert torch.allclose(text_answer(model), text_answer(plain), atol=1e-5)
    trained = dict(plain.named_parameters())
    for name, tensor in ld.get_adapter(model).methods["model"][CONFIGS[how].kind].tensors.items():
        assert torch.allclose(tensor, trained[name], atol=1e-5), name
    ld.unload(model)
    assert bits(model) == before


def test_gradient_checkpointing(text_model: Model, text_answer: Answer) -> None:
    model = text_model("gpt2")
    ld.add_adapter(model, ld.TopLayersConfig(num_layers=1))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        text_answer(model, learning=True, use_cache=False).square().mean().backward()
        gradients.append([p.grad.clone() for p in own(model)])
        model.zero_grad()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients))


def test_other_weights_lie_between(text_model: Model, randomise: Callable[..., None]) -> None:
    """base + w · (learned − base), and the sum over several adapters; what was learned is not touched."""
    model = text_model("bert")
    name = "bert.encoder.layer.1.output.dense.bias"
    ld.add_adapter(model, ld.BitFitConfig(), "a")
    base = model.get_parameter(f"base_parameters.{name.replace('.', '/')}").detach().clone()
    randomise(model, "a", seed=1)
    learned = model.get_parameter(name).detach().clone()
    for weight in (0.5, -1.0, 2.0):
        ld.set_adapters(model, "a", weight)
        assert torch.allclose(model.get_parameter(name), base + weight * (learned - base), atol=1e-6)
    ld.set_adapters(model, [])
    ld.add_adapter(model, ld.FullConfig(), "b")
    randomise(model, "b", seed=2)
    other = model.get_parameter(name).detach().clone()
    ld.set_adapters(model, ["a", "b"], [0.25, 1.0])
    assert torch.allclose(model.get_parameter(name), base + 0.25 * (learned - base) + (other - base), atol=1e-6)
    ld.delete_adapter(model, "a")
    assert torch.equal(model.get_parameter(name), other)
    ld.delete_adapter(model, "b")
    assert torch.equal(model.get_parameter(name), base)


def test_put_reaches_what_acts_in_part(text_model: Model, randomise: Callable[..., None], text_answer: Answer) -> None:
    """A resumed run's tensors show at once, at half strength as well."""
    model = text_model("bert")
    ld.add_adapter(model, ld.BitFitConfig())
    randomise(model)
    tensors = ld.get_adapter(model)
    ld.set_adapters(model, "default", 0.5)
    expected = text_answer(model)
    randomise(model, seed=8)
    ld.put_adapter(model, tensors)
    assert torch.equal(text_answer(model), expected)


@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_save_and_load(
    text_model: Model, text_answer: Answer, randomise: Callable[..., None], tmp_path: Path, family: str, how: str
) -> None:
    """The same outputs from the file, saved while acting and while not."""
    if how == "bitfit" and family in NO_BIASES:
        pytest.skip("it has no biases")
    model, path = text_model(family), tmp_path / "adapter.safetensors"
    ld.add_adapter(model, CONFIGS[how])
    randomise(model)
    expected = text_answer(model)
    for acting in (["default"], []):
        ld.set_adapters(model, acting)
        ld.save_adapter(model, path)
        other = text_model(family)
        report = ld.load_adapter(other, path, "mine")
        assert torch.equal(text_answer(other), expected)
        assert report.methods == {"model": [CONFIGS[how].kind]}
        assert not any(p.requires_grad for several in ld.adapter_parameters(other, "mine").values() for p in several)
        assert ld.read_adapter(path).methods["model"][CONFIGS[how].kind].config == CONFIGS[how]
    assert config_from_dict(CONFIGS[how].to_dict()) == CONFIGS[how]


def test_a_head_that_is_learned_along(
    text_model: Model, text_answer: Answer, randomise: Callable[..., None], tmp_path: Path
) -> None:
    """BitFit with a new classifier: its bias is the copy's, and both are in the file."""
    model = text_model("bert")
    ld.add_adapter(model, ld.BitFitConfig(modules_to_save=["classifier"]))
    randomise(model)
    assert "classifier.bias" not in ld.get_adapter(model).methods["model"]["bitfit"].tensors
    expected = text_answer(model)
    ld.save_adapter(model, tmp_path / "a.safetensors")
    other = text_model("bert")
    ld.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(text_answer(other), expected)


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("how", CONFIGS)
def test_copies_are_whole_and_of_their_own(
    text_model: Model, text_answer: Answer, randomise: Callable[..., None], how: str, weight: float
) -> None:
    model = text_model("gpt2")
    base = text_answer(model)
    ld.add_adapter(model, CONFIGS[how])
    randomise(model)
    ld.set_adapters(model, "default", weight)
    expected = text_answer(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(text_answer(twin), expected)
        ld.set_adapters(twin, "default", 1.0)
        ld.unload(twin)
        assert torch.equal(text_answer(twin), base)
        assert torch.equal(text_answer(model), expected)


@pytest.mark.parametrize("how", CONFIGS)
def test_beside_lora_and_with_it_in_one(
    text_model: Model, text_answer: Answer, randomise: Callable[..., None], tmp_path: Path, how: str
) -> None:
    """LoRA on the very layers whose parameters learn: one adapter, both trained, saved, loaded and taken out."""
    model = text_model("gpt2")
    base = text_answer(model)
    both = [ld.LoraConfig(r=2, target_modules=["c_attn", "c_fc"]), CONFIGS[how]]
    ld.add_adapter(model, both, "both")
    parameters = ld.adapter_parameters(model, "both")["model"]
    randomise(model, "both")
    text_answer(model, learning=True).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    expected = text_answer(model)
    ld.save_adapter(model, tmp_path / "both.safetensors", "both")
    ld.delete_adapter(model, "both")
    assert torch.equal(text_answer(model), base)
    ld.load_adapter(model, tmp_path / "both.safetensors", "both")
    assert torch.equal(text_answer(model), expected)
    ld.unload(model)
    ld.add_adapter(model, both[0], "lora")
    ld.add_adapter(model, CONFIGS[how], "other")
    names = set(ld.get_adapter(model, "other").methods["model"][CONFIGS[how].kind].tensors)
    assert not any("adapter_" in name for name in names)
    ld.unload(model)
    assert torch.equal(text_answer(model), base)


def test_beside_bottlenecks(text_model: Model, text_answer: Answer) -> None:
    """Full fine-tuning does not take another method's parameters for the base's."""
    model = text_model("bert")
    expected = sum(p.numel() for p in model.parameters())
    ld.add_adapter(model, [ld.BottleneckConfig(), ld.FullConfig()])
    kinds = ld.get_adapter(model).methods["model"]
    assert sum(t.numel() for t in kinds["full"].tensors.values()) == expected
    assert {id(p) for p in own(model)} == {id(p) for p in model.parameters() if p.requires_grad}


def test_bias_of_a_norm_behind_pfeiffer(text_model: Model, text_answer: Answer, randomise: Callable[..., None]) -> None:
    """The norm that a bottleneck computes again is the learned one."""
    model = text_model("bert")
    ld.add_adapter(model, ld.BitFitConfig(), "biases")
    randomise(model, "biases")
    expected = text_answer(model)
    ld.add_adapter(model, ld.BottleneckConfig(placement="pfeiffer", init_weights="zero"), "small")
    assert torch.allclose(text_answer(model), expected, atol=1e-6)


def test_two_in_one_place_are_refused(text_model: Model, bits: Bits, text_answer: Answer) -> None:
    """A new one would begin from the other's values: the other has to be off."""
    model = text_model("gpt2")
    ld.add_adapter(model, ld.TopLayersConfig(num_layers=1), "top")
    before = bits(model)
    with pytest.raises(ld.ConfigError, match="another adapter acts in place of"):
        ld.add_adapter(model, ld.FullConfig(), "all")
    with pytest.raises(ld.ConfigError, match="acts in place of"):
        ld.add_adapter(model, [ld.LoraConfig(r=2, target_modules=["c_attn"]), ld.BitFitConfig()], "biases")
    assert bits(model) == before and ld.list_adapters(model) == {"top": ["model"]}
    ld.set_adapters(model, [])
    ld.add_adapter(model, ld.FullConfig(), "all")
    assert ld.active_adapters(model) == {"all": {"model": 1.0}}


def test_what_is_merged_into_is_refused(text_model: Model, bits: Bits) -> None:
    """The base's own weights are away then; other parameters may learn."""
    model = text_model("gpt2")
    ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=["c_attn"]), "lora")
    ld.merge_adapters(model)
    before = bits(model)
    with pytest.raises(ld.ConfigError, match=r"merged into transformer\.h\.0\.attn\.c_attn"):
        ld.add_adapter(model, ld.FullConfig())
    assert bits(model) == before
    ld.unmerge_adapters(model)
    ld.add_adapter(model, ld.FullConfig())


def test_rows_are_refused(text_model: Model) -> None:
    model = text_model("bert")
    ld.add_adapter(model, ld.BitFitConfig())
    with pytest.raises(ld.ConfigError, match="cannot be mixed row by row"), ld.adapters_per_sample(model, ["default"]):
        pass


def test_a_quantised_base_is_refused(text_model: Model, text_answer: Answer) -> None:
    """Full fine-tuning and top blocks name the first weight; biases are floats, and learn."""
    model = text_model("bert")
    for module in model.bert.encoder.modules():
        if isinstance(module, nn.Linear):
            store_weight(module, "int8")
    for config in (ld.FullConfig(), ld.TopLayersConfig(num_layers=1)):
        with pytest.raises(ld.AdapterMismatchError, match="weight is quantised, and cannot learn"):
            ld.add_adapter(model, config)
    ld.add_adapter(model, ld.BitFitConfig())
    assert len(own(model)) == 19
    text_answer(model, learning=True).square().mean().backward()
    assert all(parameter.grad is not None for parameter in own(model))


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("llama", ld.BitFitConfig(), "LlamaForCausalLM has no biases"),
        ("t5", ld.BitFitConfig(), "T5ForConditionalGeneration has no biases"),
        ("gpt2", ld.BitFitConfig(bias_terms="query_mlp"), "take bias_terms='all'"),
        ("bert", ld.TopLayersConfig(num_layers=3), "num_layers=3: the model has 2 blocks"),
        ("bert", ld.TopLayersConfig(final_norm=True), "no norm behind its last block"),
    ],
)
def test_what_does_not_fit_the_model(text_model: Model, bits: Bits, family: str, config: Any, words: str) -> None:
    model = text_model(family)
    before = bits(model)
    with pytest.raises(ld.LoraDiffusionError, match=words) as caught:
        ld.add_adapter(model, config)
    assert "\n" not in str(caught.value) and bits(model) == before


def test_blocks_of_an_unknown_kind() -> None:
    with pytest.raises(ld.AdapterMismatchError, match="no blocks of a known kind"):
        ld.add_adapter(nn.Sequential(nn.Linear(4, 4)), ld.TopLayersConfig())


@pytest.mark.parametrize(
    ("cls", "fields", "words"),
    [
        (ld.BitFitConfig, {"bias_terms": "value"}, "bias_terms='value'"),
        (ld.TopLayersConfig, {"num_layers": 0}, "num_layers=0"),
        (ld.TopLayersConfig, {"final_norm": "yes"}, "final_norm='yes'"),
        (ld.FullConfig, {"keep_base_on": "disk"}, "keep_base_on='disk'"),
    ],
)
def test_settings_that_are_refused(cls: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ld.ConfigError, match=words):
        cls(**fields)


def test_recurrent_layers_follow() -> None:
    """They keep a list of their weights beside; it has to show what acts."""
    model = nn.LSTM(4, 4, batch_first=True)
    x = torch.ones(1, 3, 4)
    base = model(x)[0]
    ld.add_adapter(model, ld.FullConfig())
    for parameter in own(model):
        parameter.data.mul_(2)
    assert not torch.equal(model(x)[0], base)
    ld.unload(model)
    assert torch.equal(model(x)[0], base)


def test_in_shards_it_trains_and_refuses_to_switch(text_model: Model, text_answer: Answer) -> None:
    """FSDP2 keeps the parameters that it was given, so a switch would not show: an error says so."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, plain = text_model("gpt2"), text_model("gpt2")
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for one in (model, plain):
            ld.add_adapter(one, ld.FullConfig())
        for block in (*model.transformer.h, model):
            torch.distributed.fsdp.fully_shard(block, mesh=mesh)
        for one in (model, plain):
            optimizer = torch.optim.SGD(own(one), lr=0.1)
            text_answer(one, learning=True).square().mean().backward()
            optimizer.step()
        assert torch.allclose(text_answer(model), text_answer(plain), atol=1e-6)
        with pytest.raises(ld.ConfigError, match="is in shards"):
            ld.set_adapters(model, [])
    finally:
        torch.distributed.destroy_process_group()
