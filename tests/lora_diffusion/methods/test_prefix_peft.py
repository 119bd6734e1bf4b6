"""Prefixes beside PEFT's: the same logits and the same generated tokens, and folders that go both ways."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lora_diffusion as ld
from lora_diffusion.adapter import Adapter, Learned, Prompt
from lora_diffusion.files import write_adapter
from lora_diffusion.methods.prefix_encoder import flat
from lora_diffusion.methods.prefix_tuning import check_given, from_prompt, to_prompt
from tests.lora_diffusion.methods.prefix_models import (
    CAUSAL,
    ENCODERS,
    FAMILIES,
    OTHERS,
    TWO_STACKS,
    batch,
    generated,
    logits,
    model,
)

PEERS = [family for family in (*FAMILIES, *OTHERS) if family != "deberta"]  # which PEFT refuses
TASKS = {
    **dict.fromkeys((*CAUSAL, *OTHERS), "CAUSAL_LM"),
    **dict.fromkeys((*ENCODERS, "electra"), "SEQ_CLS"),
    **dict.fromkeys(TWO_STACKS, "SEQ_2_SEQ_LM"),
}


def theirs(base: Any, family: str, **fields: Any) -> Any:
    torch.manual_seed(7)
    config = peft.PrefixTuningConfig(task_type=TASKS[family], num_virtual_tokens=5, **fields)
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


def with_learned(base: Any, learned: Learned) -> Any:
    ours = copy.deepcopy(base)
    ld.load_adapter(ours, Adapter({}, methods={"model": {"prefix_tuning": learned}}), "other")
    return ours


def learned_of(target: Any) -> Learned:
    return ld.get_adapter(target).methods["model"]["prefix_tuning"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PEERS)
def test_a_folder_of_peft_gives_pefts_logits_and_tokens(family: str, attention: str, tmp_path: Path) -> None:
    """Positions, masks and left padding included; with and without a mask, greedily and with beams."""
    base = model(family, attention)
    peer = theirs(base, family)
    peer.save_pretrained(str(tmp_path))
    ours = with_learned(base, from_prompt(ld.read_adapter(tmp_path).prompts["model"]))
    inputs = batch(family)
    assert not torch.allclose(logits(ours, inputs), logits(base, inputs), atol=1e-3)
    torch.testing.assert_close(logits(ours, inputs), logits(peer, inputs), rtol=0, atol=1e-6)
    del inputs["attention_mask"]
    torch.testing.assert_close(logits(ours, inputs), logits(peer, inputs), rtol=0, atol=1e-6)
    if TASKS[family] != "SEQ_CLS":
        for settings in ({}, {"num_beams": 2}):
            assert torch.equal(generated(ours, batch(family), **settings), generated(peer, batch(family), **settings))


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_both_ways_through_folders(family: str, projection: bool, layers: int, tmp_path: Path) -> None:
    """PEFT deals a prefix out to T5's decoder layers in a way of its own, by the parity of their number."""
    base, inputs = model(family, layers=layers), batch(family)
    width: dict[str, Any] = {"encoder_hidden_size": 16} if projection else {}
    peer = theirs(base, family, prefix_projection=projection, **width)
    peer.save_pretrained(str(tmp_path / "theirs"))
    ours = with_learned(base, from_prompt(ld.read_adapter(tmp_path / "theirs").prompts["model"]))
    torch.testing.assert_close(logits(ours, inputs), logits(peer, inputs), rtol=0, atol=1e-6)

    ours, head = copy.deepcopy(base), ["classifier"] if family == "bert" else None
    config = ld.PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=projection, modules_to_save=head, **width)
    ld.add_adapter(ours, config)
    prompt = to_prompt(learned_of(ours))
    written = Adapter({}, prompts={"model": prompt}, copies=ld.get_adapter(ours).copies)
    write_adapter(written, tmp_path / "ours", format="peft")
    peer = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(peer, inputs), logits(ours, inputs), rtol=0, atol=1e-6)
    if family != "bert":
        assert torch.equal(generated(peer, inputs), generated(ours, inputs))
    assert torch.equal(from_prompt(prompt).tensors["embedding"], flat(learned_of(ours).tensors))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_loading_and_saving_do_it_by_themselves(family: str, tmp_path: Path) -> None:
    base, inputs = model(family), batch(family)
    peer = theirs(base, family)
    peer.save_pretrained(str(tmp_path / "theirs"))
    ours = copy.deepcopy(base)
    report = ld.load_adapter(ours, tmp_path / "theirs", "loaded")
    assert report.methods == {"model": ["prefix_tuning"]}
    torch.testing.assert_close(logits(ours, inputs), logits(peer, inputs), rtol=0, atol=1e-6)
    ld.save_adapter(ours, tmp_path / "ours", "loaded", format="peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again, inputs), logits(peer, inputs), rtol=0, atol=1e-6)


def test_a_wide_t5_whose_heads_are_not_its_width(tmp_path: Path) -> None:
    """mT5-small's shape, on which PEFT's own prefixes fail; the folder says the true widths, and PEFT obeys."""
    base = model("mt5", d_kv=10)
    ours, inputs = copy.deepcopy(base), batch("mt5")
    ld.add_adapter(ours, ld.PrefixTuningConfig(num_virtual_tokens=3))
    write_adapter(Adapter({}, prompts={"model": to_prompt(learned_of(ours))}), tmp_path / "a", format="peft")
    peer = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(peer, inputs), logits(ours, inputs), rtol=0, atol=1e-6)


def test_to_prompt_asks_the_model_for_what_the_config_lacks() -> None:
    target = model("llama")
    ld.add_adapter(target, ld.PrefixTuningConfig(num_virtual_tokens=3))
    bare = Learned(ld.PrefixTuningConfig(num_virtual_tokens=3), learned_of(target).tensors)
    assert to_prompt(bare, target).fields == to_prompt(learned_of(target)).fields
    assert to_prompt(bare, target).fields["token_dim"] == 16, "the keys' width, not the queries'"
    with pytest.raises(ld.AdapterFormatError, match="token_dim, num_attention_heads, num_layers"):
        to_prompt(bare)


def test_tensors_of_another_shape_are_refused_before_anything_is_made() -> None:
    target = model("llama")
    ld.add_adapter(target, ld.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True))
    good = learned_of(target)
    check_given(good, target)
    assert isinstance(good.config, ld.PrefixTuningConfig)
    bad = Learned(dataclasses.replace(good.config, num_virtual_tokens=8000), good.tensors)
    for refused in (lambda: to_prompt(bad), lambda: check_given(bad, target)):
        with pytest.raises(ld.AdapterMismatchError, match=r"'embedding' has shape \(3, 16\); by its config"):
            refused()
    with pytest.raises(ld.AdapterMismatchError, match="'stray' has shape"):
        to_prompt(Learned(good.config, {**good.tensors, "stray": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (Prompt("P_TUNING", torch.zeros(3, 8)), "P_TUNING"),
        (Prompt("PREFIX_TUNING", torch.zeros(3)), r"shape \[3\]"),
        (Prompt("PREFIX_TUNING", torch.zeros(3, 8), {"token_dim": 4, "num_layers": 2}), "8 columns"),
    ],
)
def test_what_is_no_prefix_is_refused(prompt: Prompt, said: str) -> None:
    with pytest.raises(ld.AdapterFormatError, match=said):
        from_prompt(prompt)
