"""PEFT's folders against PEFT itself: its folders act as in PEFT, and PEFT loads ours."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_diffusion as ld
from lora_diffusion.config import pattern_fits

REAL = Path(__file__).parents[4] / "shared" / "data" / "adapters" / "peft_gpt2"
IDS = torch.tensor([[3, 7, 11, 2, 9, 1]])
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def tiny_llama(_: Path) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip


def tiny_gpt2(_: Path) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def tiny_gpt2_classifier(_: Path) -> nn.Module:
    config = GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0)
    return GPT2ForSequenceClassification(config)


def tiny_bert(_: Path) -> nn.Module:
    config = BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3,
        max_position_embeddings=32,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def tiny_t5(_: Path) -> nn.Module:
    config = T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config)


def tiny_unet(pipeline: Path) -> nn.Module:
    return UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")


def tiny_text_encoder(pipeline: Path) -> nn.Module:
    return CLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder")


def tiny_text_encoder_2(pipeline: Path) -> nn.Module:
    """SDXL's second text encoder, which keeps `text_model.` in its names."""
    return CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(pipeline, subfolder="text_encoder"))


Build = Callable[[Path], nn.Module]


@pytest.fixture
def built(tiny_pipeline_dir: Path) -> Callable[[Build], nn.Module]:
    """built(tiny_llama): a model, the same every time."""

    def run(build: Build) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(tiny_pipeline_dir)

    return run


def answer(model: nn.Module) -> torch.Tensor:
    """Logits for a fixed input, or what a UNet predicts."""
    model.eval()
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        if hasattr(inner, "down_blocks"):
            g = torch.Generator().manual_seed(1)
            latents, text = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 7, 32, generator=g)
            return model(latents, torch.tensor(500), text).sample
        if isinstance(inner, T5ForConditionalGeneration):
            return model(input_ids=IDS, labels=IDS).logits
        output = model(input_ids=IDS)
        return output.logits if hasattr(output, "logits") else output.last_hidden_state


def learned(model: nn.Module, **config: Any) -> peft.PeftModel:
    """PEFT's model with values in every trainable tensor as training might leave them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    g = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=g))
        elif parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return wrapped


def save(wrapped: peft.PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    return folder


def loaded(model: nn.Module, folder: Path) -> peft.PeftModel:
    """PEFT's model from a folder; PEFT says which tensors it missed in a warning only."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    words = [str(w.message) for w in caught if "keys" in str(w.message) or "fan_in_fan_out" in str(w.message)]
    assert words == []
    return wrapped


KINDS: dict[str, tuple[Build, dict[str, Any]]] = {
    "llama": (tiny_llama, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "rslora": (tiny_llama, {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "dora": (tiny_llama, {"r": 2, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "o_proj"]}),
    "patterns": (
        tiny_llama,
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {r"layers\.0\..*q_proj": 3, "k_proj": 1},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 7, r"^model\.layers\.(0|5)\.mlp\.up_proj": 1, "proj": 99},
        },
    ),
    "embedding": (tiny_llama, {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens", "q_proj"]}),
    "whole modules": (tiny_llama, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "gpt2": (tiny_gpt2, {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2 dora": (tiny_gpt2, {"r": 2, "use_dora": True, "target_modules": ["c_fc"], "fan_in_fan_out": True}),
    "gpt2 tables": (tiny_gpt2, {"r": 2, "target_modules": ["wte", "wpe", "c_attn"], "fan_in_fan_out": True}),
    "gpt2 classifier": (tiny_gpt2_classifier, {"target_modules": ["c_attn"], "task_type": "SEQ_CLS"}),
    "bert": (tiny_bert, {"r": 2, "target_modules": ["query", "value", "word_embeddings"], "task_type": "SEQ_CLS"}),
    "t5": (
        tiny_t5,
        {"r": 2, "target_modules": ["q", "v", "wo"], "rank_pattern": {"SelfAttention.q": 3}, "alpha_pattern": {
            r"decoder\.block\.1\.layer\.0\.SelfAttention\.q": 2}, "task_type": "SEQ_2_SEQ_LM"},
    ),
    "unet": (tiny_unet, {"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "to_out.0", "conv1", "conv_in"]}),
    "unet dora": (tiny_unet, {"r": 2, "use_dora": True, "target_modules": ["to_q", "conv1", "time_emb_proj"]}),
    "unet whole": (tiny_unet, {"r": 2, "target_modules": ["to_k"], "modules_to_save": ["conv_in", "conv_out"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_against_peft_in_both_directions(built: Callable[[Build], nn.Module], kind: str, tmp_path: Path) -> None:
    """Its folder acts here as there; ours, written from the engine, acts there as here; factors survive the circle."""
    build, config = KINDS[kind]
    model = built(build)
    theirs = learned(model, **config)
    expected, untouched = answer(theirs), answer(model)
    assert (expected - untouched).abs().max() > 1e-3
    folder = save(theirs, tmp_path / "theirs")

    report = ld.load_adapter(model, folder)
    assert report.complete
    assert report.dialect == "peft"
    torch.testing.assert_close(answer(model), expected, rtol=1e-5, atol=1e-5)

    ld.save_adapter(model, tmp_path / "ours", report.name, format="peft")
    torch.testing.assert_close(answer(loaded(built(build), tmp_path / "ours")), expected, rtol=1e-5, atol=1e-5)
    same(ld.read_adapter(folder), ld.read_adapter(tmp_path / "ours"))


def same(one: ld.Adapter, other: ld.Adapter) -> None:
    """Equal layers, copies and deltas."""
    assert list(one.components) == list(other.components)
    for component, layers in one.components.items():
        assert set(layers) == set(other.components[component])
        for path, layer in layers.items():
            again = other.components[component][path]
            assert torch.equal(layer.a, again.a)
            torch.testing.assert_close(layer.scale * layer.b, again.scale * again.b, rtol=1e-6, atol=1e-7)
            if layer.magnitude is None:
                torch.testing.assert_close(layer.delta(), again.delta(), rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(layer.magnitude, again.magnitude)
    assert {c: {p: sorted(v) for p, v in m.items()} for c, m in one.copies.items()} == {
        c: {p: sorted(v) for p, v in m.items()} for c, m in other.copies.items()
    }


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (tiny_gpt2, ["wte", "wpe", "c_attn", "c_fc"]),
        (tiny_bert, ["word_embeddings", "position_embeddings", "query"]),
        (tiny_llama, ["embed_tokens", "q_proj"]),
        (tiny_t5, ["shared", "relative_attention_bias", "v"]),
        (tiny_text_encoder, ["token_embedding", "fc1"]),
    ],
)
def test_adapters_that_were_made_here(
    built: Callable[[Build], nn.Module], randomise: Callable[..., None], build: Build, names: list[str], tmp_path: Path
) -> None:
    """No folder says what an embedding or a Conv1D is: their names do, and PEFT takes every layer without a warning."""
    model = built(build)
    ld.add_adapter(model, ld.LoraConfig(r=2, lora_alpha=5, target_modules=names))
    randomise(model, std=0.3)
    ld.save_adapter(model, tmp_path / "a", format="peft")
    torch.testing.assert_close(answer(loaded(built(build), tmp_path / "a")), answer(model), rtol=1e-5, atol=1e-5)


def test_alphas_of_clip_by_its_own_names(built: Callable[[Build], nn.Module], tmp_path: Path) -> None:
    """A pattern is for the names in the file, whatever this library calls the layers."""
    config = {"r": 2, "target_modules": ["q_proj"], "alpha_pattern": {"^encoder.layers.0.self_attn.q_proj": 6}}
    theirs = learned(built(tiny_text_encoder), **config)
    adapter = ld.read_adapter(save(theirs, tmp_path / "a"))
    assert [low_rank.scale for low_rank in adapter.components["text_encoder"].values()] == [3.0, 4.0]


def test_auto_class_and_base_name(built: Callable[[Build], nn.Module], tmp_path: Path) -> None:
    """AutoPeftModelForCausalLM finds the base by the name in the config and gives the same logits."""
    model = built(tiny_llama)
    model.save_pretrained(tmp_path / "base")
    save(learned(model, **KINDS["patterns"][1], task_type="CAUSAL_LM"), tmp_path / "theirs")
    ld.load_adapter(model, tmp_path / "theirs", name="a")
    ld.save_adapter(model, tmp_path / "ours", "a", format="peft", metadata={"base_model": str(tmp_path / "base")})
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(answer(found), answer(model), rtol=1e-5, atol=1e-5)
    assert ld.read_adapter(tmp_path / "ours").metadata["base_model"] == str(tmp_path / "base")


def test_a_real_folder(built: Callable[[Build], nn.Module], tmp_path: Path) -> None:
    """GPT-2 with a classification head, from the hub, whole: 12 Conv1D layers and the head that PEFT adds unasked."""
    if not REAL.is_dir():
        pytest.skip("the real adapters are not beside this checkout")
    config = GPT2Config(num_labels=6, pad_token_id=50256)
    model = built(lambda _: GPT2ForSequenceClassification(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), REAL)
    expected = answer(wrapped)
    report = ld.load_adapter(model, REAL)
    assert report.complete
    assert report.matched == 12
    torch.testing.assert_close(answer(model), expected, rtol=1e-5, atol=1e-5)
    adapter = ld.read_adapter(REAL)
    assert set(adapter.copies["model"]) == {"score"}
    assert adapter.configs["model"].task_type == "SEQ_CLS"
    assert adapter.metadata["base_model"] == "gpt2"
    ld.write_adapter(adapter, tmp_path / "ours", format="peft")
    again = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    first = load_file(REAL / "adapter_model.safetensors")
    assert set(again) == set(first)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_a_pipeline_folder_and_both_clip_spellings(tiny_pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """One sub-folder per component, which PEFT loads onto each; CLIP's names are the installed transformers'."""
    pipe, parts = tiny_pipeline, {"unet": ["to_q", "conv2"], "text_encoder": ["q_proj", "fc1"]}
    for part, names in parts.items():
        save(learned(getattr(pipe, part), r=2, lora_alpha=5, target_modules=names), tmp_path / "theirs" / part)
    expected = {part: answer(loaded(getattr(pipe, part), tmp_path / "theirs" / part)) for part in parts}
    bare = {part: copy.deepcopy(getattr(pipe, part)) for part in parts}
    adapter = ld.read_adapter(tmp_path / "theirs")
    assert all(path.startswith("text_model.encoder.layers.") for path in adapter.components["text_encoder"])
    report = ld.load_adapter(pipe, tmp_path / "theirs", name="a")
    assert report.complete
    ld.save_adapter(pipe, tmp_path / "ours", "a", format="peft")
    assert sorted(item.name for item in (tmp_path / "ours").iterdir()) == ["README.md", "text_encoder", "unet"]
    for part in parts:
        torch.testing.assert_close(answer(getattr(pipe, part)), expected[part], rtol=1e-5, atol=1e-5)
        wrapped = loaded(bare[part], tmp_path / "ours" / part)
        torch.testing.assert_close(answer(wrapped), expected[part], rtol=1e-5, atol=1e-5)
    same(adapter, ld.read_adapter(tmp_path / "ours"))
    assert ld.read_adapter(tmp_path / "ours").intact is True


@pytest.mark.parametrize(
    ("build", "names", "component"),
    [
        (tiny_unet, ["to_q"], "unet"),
        (tiny_text_encoder, ["q_proj"], "text_encoder"),
        (tiny_text_encoder_2, ["q_proj"], "text_encoder_2"),
        (tiny_llama, ["q_proj"], "model"),
    ],
)
def test_components_of_flat_folders(
    built: Callable[[Build], nn.Module], build: Build, names: list[str], component: str, tmp_path: Path
) -> None:
    save(learned(built(build), r=2, target_modules=names), tmp_path / "theirs")
    adapter = ld.read_adapter(tmp_path / "theirs")
    assert list(adapter.components) == [component]
    ld.write_adapter(adapter, tmp_path / "ours", format="peft")
    assert list(ld.read_adapter(tmp_path / "ours").components) == [component]
    assert list(ld.read_adapter(tmp_path / "ours" / "adapter_model.safetensors").components) == [component]
    wrapped = loaded(built(build), tmp_path / "ours")
    torch.testing.assert_close(answer(wrapped), answer(loaded(built(build), tmp_path / "theirs")), rtol=0, atol=1e-6)


def test_a_file_without_its_config(built: Callable[[Build], nn.Module], tmp_path: Path) -> None:
    """Read with alpha = rank, and the adapter says so."""
    folder = save(learned(built(tiny_llama), r=2, lora_alpha=16, target_modules=["q_proj"]), tmp_path / "a")
    assert ld.read_adapter(folder / "adapter_model.safetensors").components["model"][
        "model.layers.0.self_attn.q_proj"
    ].scale == 8.0  # fmt: skip
    (folder / "adapter_config.json").unlink()
    adapter = ld.read_adapter(folder / "adapter_model.safetensors")
    assert {layer.scale for layer in adapter.components["model"].values()} == {1.0}
    assert any("alpha = rank" in note for note in adapter.notes)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_changed_bases_are_noted(built: Callable[[Build], nn.Module], init: str, tmp_path: Path) -> None:
    """PEFT takes the first factors out of the base weights; a folder that was not converted means little without."""
    folder = save(learned(built(tiny_llama), r=2, target_modules=["q_proj"], init_lora_weights=init), tmp_path / "a")
    assert any(init in note and "base weights" in note for note in ld.read_adapter(folder).notes)


def test_a_converted_pissa_folder_is_a_difference(built: Callable[[Build], nn.Module], tmp_path: Path) -> None:
    model = built(tiny_llama)
    start = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    start.peft_config["default"].init_lora_weights = True
    start.save_pretrained(tmp_path / "start")
    start.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in start.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.1)
    start.save_pretrained(tmp_path / "done", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = ld.read_adapter(tmp_path / "done")
    assert adapter.notes == []
    ld.load_adapter(model, adapter)
    torch.testing.assert_close(answer(model), answer(start), rtol=1e-4, atol=1e-5)


def layer(rank: int = 2, scale: float = 1.0, **more: Any) -> ld.LowRank:
    g = torch.Generator().manual_seed(rank)
    return ld.LowRank(torch.randn(rank, 16, generator=g), torch.randn(16, rank, generator=g), scale, **more)


def adapter_of(**layers: ld.LowRank) -> ld.Adapter:
    """Layers of the tiny Llama: q0 is the query of block 0."""
    return ld.Adapter({"model": {f"model.layers.{name[1]}.self_attn.{name[0]}_proj": v for name, v in layers.items()}})


def test_scales_that_peft_cannot_say_are_folded(built: Callable[[Build], nn.Module], tmp_path: Path) -> None:
    """Zero and negative scales, beside others that stay as they are; PEFT adds the same deltas."""
    adapter = adapter_of(q0=layer(2, -0.5), q1=layer(3, 0.0), o0=layer(2, 1.5), o1=layer(2, 5 / 3**0.5))
    ld.write_adapter(adapter, tmp_path / "a", format="peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert min([config["lora_alpha"], *config["alpha_pattern"].values()]) > 0
    wrapped = loaded(built(tiny_llama), tmp_path / "a")
    for path, low_rank in adapter.components["model"].items():
        theirs = wrapped.get_submodule(f"base_model.model.{path}").get_delta_weight("default")
        torch.testing.assert_close(theirs, low_rank.delta(), rtol=1e-6, atol=1e-6)


def test_the_config_is_minimal_and_old_versions_match_its_patterns(tmp_path: Path) -> None:
    """PEFT 0.8 knows every field, and finds a pattern only behind a dot; it takes rank and alpha by one key."""
    adapter = adapter_of(q0=layer(2, 2.0), q1=layer(3, 2.0), o0=layer(2, 0.75), o1=layer(2, 2.0))
    ld.write_adapter(adapter, tmp_path / "a", format="peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert set(config) == {
        "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules",
        "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out", "modules_to_save", "use_rslora",
        "inference_mode", "init_lora_weights",
    }  # fmt: skip
    keys = [*config["rank_pattern"], *config["alpha_pattern"]]
    for path, low_rank in adapter.components["model"].items():
        key = next((key for key in keys if re.match(rf".*\.{key}$", path)), path)
        assert config["rank_pattern"].get(key, config["r"]) == low_rank.rank
        assert config["alpha_pattern"].get(key, config["lora_alpha"]) == low_rank.alpha


def test_patterns_fit_one_layer_each(tmp_path: Path) -> None:
    """Also where a path is the end of another's, as in T5's two stacks or a model with a bare "q"."""
    paths = ["q", "x.q", "encoder.block.0.q", "decoder.block.0.q", "y.proj.out", "y.proj_out"]
    layers = {path: layer(2 + n, 1.0 + n) for n, path in enumerate(paths)}
    ld.write_adapter(ld.Adapter({"model": layers}), tmp_path / "a", format="peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for path, low_rank in layers.items():
        ranks = [v for key, v in config["rank_pattern"].items() if pattern_fits(key, path)] or [config["r"]]
        alphas = [v for key, v in config["alpha_pattern"].items() if pattern_fits(key, path)] or [config["lora_alpha"]]
        assert (ranks, alphas) == ([low_rank.rank], [low_rank.alpha])


def test_a_classifier_without_its_head_gets_no_task(built: Callable[[Build], nn.Module], tmp_path: Path) -> None:
    """With the task PEFT would look for a head in the file, and fail."""
    model = built(tiny_gpt2_classifier)
    path = "transformer.h.0.attn.c_attn"
    low_rank = ld.LowRank(torch.randn(2, 16), torch.randn(48, 2))
    adapter = ld.Adapter(
        {"model": {path: low_rank}}, {"model": ld.LoraConfig(r=2, target_modules=[path], task_type="SEQ_CLS")}
    )
    ld.write_adapter(adapter, tmp_path / "a", format="peft")
    wrapped = loaded(model, tmp_path / "a")
    ld.load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(answer(wrapped), answer(model), rtol=1e-5, atol=1e-5)


def test_writing_is_repeatable_and_whole_or_not_at_all(tmp_path: Path) -> None:
    """The same adapter gives the same bytes; an old folder is replaced, also in kind; a failure leaves it as it was."""
    adapter, target = adapter_of(q0=layer()), tmp_path / "a"
    ld.write_adapter(adapter, target, format="peft")
    first = {item.name: item.read_bytes() for item in target.iterdir()}
    (target / "README.md").write_text("mine")
    ld.write_adapter(adapter, target, format="peft")
    assert {item.name: item.read_bytes() for item in target.iterdir()} == {**first, "README.md": b"mine"}
    broken = adapter_of(q0=ld.LowRank(torch.full((2, 16), torch.nan), torch.zeros(16, 2)))
    with pytest.raises(ld.AdapterFormatError, match="NaN"):
        ld.write_adapter(broken, target, format="peft")
    assert {item.name: item.read_bytes() for item in target.iterdir()} == {**first, "README.md": b"mine"}
    both = ld.Adapter({"unet": {QUERY: layer()}, "text_encoder": {"text_model.encoder.layers.0.mlp.fc1": layer()}})
    ld.write_adapter(both, target, format="peft")
    assert sorted(item.name for item in target.iterdir()) == ["README.md", "text_encoder", "unet"]
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one is back where it was."""
    ld.write_adapter(adapter_of(q0=layer()), tmp_path / "a", format="peft")
    first = {item.name: item.read_bytes() for item in (tmp_path / "a").iterdir()}
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise PermissionError(13, "not this time")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError):
        ld.write_adapter(adapter_of(q0=layer(3)), tmp_path / "a", format="peft")
    assert {item.name: item.read_bytes() for item in (tmp_path / "a").iterdir()} == first
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    adapter = adapter_of(q0=layer())
    (tmp_path / "a").mkdir()
    ld.write_adapter(adapter, tmp_path / "a", format="peft")
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    with pytest.raises(ld.ConfigError, match=r"thesis\.txt"):
        ld.write_adapter(adapter, tmp_path / "a", format="peft")
    assert (tmp_path / "a" / "thesis.txt").read_text() == "years of work"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (ld.Adapter({}, tokens={"<s1>": {"text_encoder": torch.zeros(1, 8)}}), "learned words"),
        (ld.Adapter({"model": {"a.b": layer(), "a.c": layer(magnitude=torch.ones(16))}}), "one switch"),
        (
            ld.Adapter({"unet": {"conv_in": ld.LowRank(torch.zeros(4, 2, 3, 3), torch.zeros(8, 2, 1, 1))}}),
            "several groups",
        ),
        (
            ld.Adapter({"unet": {"conv_in": layer()}}, copies={"model": {"score": {"weight": torch.zeros(1)}}}),
            "whole modules only",
        ),
    ],
)
def test_what_peft_has_no_place_for(adapter: ld.Adapter, words: str, tmp_path: Path) -> None:
    with pytest.raises(ld.AdapterFormatError, match=words):
        ld.write_adapter(adapter, tmp_path / "a", format="peft")
    assert list(tmp_path.iterdir()) == []


def test_what_a_folder_says_of_itself(built: Callable[[Build], nn.Module], tmp_path: Path) -> None:
    """Kinds that the names do not tell, and PEFT's fan_in_fan_out, survive reading and writing."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"words": nn.Embedding(12, 8), "embedding": nn.Linear(8, 8)})

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.inner["embedding"](self.inner["words"](input_ids))

    model = built(lambda _: Odd())
    wrapped = learned(model, r=2, target_modules=["words", "embedding"])
    adapter = ld.read_adapter(save(wrapped, tmp_path / "theirs"))
    ld.write_adapter(adapter, tmp_path / "ours", format="peft")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert set(again) == {name for name in first if ".base_layer." not in name}
    with torch.no_grad():
        ids = torch.tensor([[1, 5, 9]])
        torch.testing.assert_close(loaded(model, tmp_path / "ours")(ids), wrapped(ids), rtol=1e-6, atol=1e-6)
