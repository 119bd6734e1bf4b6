"""Which modules a config names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lora_diffusion as ld
from lora_diffusion.targets import find_targets


def found(model: nn.Module, target_modules: Any, **more: Any) -> list[str]:
    return list(find_targets(model, ld.LoraConfig(target_modules=target_modules, **more)))


def test_attention_preset_in_unet_and_clip(tiny_pipeline: Any) -> None:
    """q, k, v and out of every attention, and nothing else."""
    unet = found(tiny_pipeline.unet, "attention")
    assert len(unet) == 32
    assert {path.split(".attn")[1][2:] for path in unet} == {"to_q", "to_k", "to_v", "to_out.0"}
    clip = found(tiny_pipeline.text_encoder, "attention")
    assert len(clip) == 8
    assert {path.rsplit(".", 1)[1] for path in clip} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert len(found(tiny_pipeline.unet, "attention-qv")) == 16


@pytest.mark.parametrize(("kind", "count"), [("llama", 4 * 2), ("bert", 4 * 2), ("t5", 4 * 2 + 8 * 2)])
def test_attention_preset_in_language_models(kind: str, count: int) -> None:
    import transformers as tf

    if kind == "llama":
        config = tf.LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
        )
        model: nn.Module = tf.LlamaForCausalLM(config)
    elif kind == "bert":
        model = tf.BertModel(
            tf.BertConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
        )
    else:
        model = tf.T5Model(tf.T5Config(vocab_size=16, d_model=8, d_ff=8, d_kv=4, num_layers=2, num_heads=2))
    assert len(found(model, "attention")) == count


def test_all_linear_leaves_the_output_head_out() -> None:
    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    paths = found(tf.LlamaForCausalLM(config), "all-linear")
    assert len(paths) == 7
    assert "lm_head" not in paths


def test_names_suffixes_and_regexes(toy: nn.Module) -> None:
    assert found(toy, "to_q") == ["attn.to_q"]
    assert found(toy, ["to_q", "head"]) == ["attn.to_q", "head"]
    assert found(toy, r"attn\.to_[qv]") == ["attn.to_q", "attn.to_v"]
    assert found(toy, r"attn\..*", exclude_modules=["to_v"]) == ["attn.to_q"]
    assert found(toy, "all-linear", exclude_modules="head") == ["attn.to_q", "attn.to_v"]


def test_a_suffix_ends_at_a_dot(toy: nn.Module) -> None:
    """`q` is not a suffix of `to_q` in the sense of module names."""
    with pytest.raises(ld.AdapterMismatchError):
        found(toy, ["q"])


def test_nothing_matched_lists_the_nearest_names(toy: nn.Module) -> None:
    with pytest.raises(ld.AdapterMismatchError, match=r"'to_qq'.*Toy.*nearest names are to_q"):
        found(toy, "to_qq")
    with pytest.raises(ld.AdapterMismatchError, match="there are embed, to_q, to_v, conv, head"):
        found(toy, "zzzzzzzz")


def test_a_kind_that_cannot_be_adapted_is_refused_by_name(toy: nn.Module) -> None:
    toy.volume = nn.Conv3d(3, 4, 3)
    with pytest.raises(ld.AdapterMismatchError, match="volume: it is a Conv3d"):
        found(toy, ["to_q", "volume"])


def test_all_linear_leaves_tables_and_convolutions_alone(toy: nn.Module) -> None:
    assert found(toy, "all-linear") == ["attn.to_q", "attn.to_v", "head"]
    assert found(toy, ["conv", "embed"]) == ["embed", "conv"]


def test_blocks_by_their_number() -> None:
    """layers_to_transform, with PEFT's rule for which number in a path counts."""
    block = nn.ModuleDict({"layer": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(4)]), "b": block})
    assert found(model, ["q"], layers_to_transform=[1, 3]) == ["h.1.q", "h.3.q"]
    assert found(model, ["q"], layers_to_transform=2, layers_pattern="h") == ["h.2.q"]
    with pytest.raises(ld.AdapterMismatchError):
        found(model, ["q"], layers_to_transform=[9])


def test_a_projection_that_is_never_called_is_refused() -> None:
    """nn.MultiheadAttention reads out_proj.weight; an adapter there would have no effect."""
    with pytest.raises(ld.AdapterMismatchError, match="without calling it"):
        found(nn.Sequential(nn.MultiheadAttention(8, 2)), "out_proj")


def test_shared_modules_count_once() -> None:
    shared = nn.Linear(4, 4)
    assert found(nn.ModuleDict({"a": shared, "b": shared}), "all-linear") == ["a"]


def test_adapted_layers_can_be_targeted_again(toy: nn.Module) -> None:
    before = found(toy, "attention")
    ld.add_adapter(toy, ld.LoraConfig())
    assert found(toy, "attention") == before
    assert torch.is_tensor(toy.state_dict()["attn.to_q.adapter_default.lora_A"])
