"""Adapters in, out, beside each other, and in the weights, by PEFT's names."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_diffusion as ld


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits


@pytest.fixture
def classifier(tiny: Callable[..., Any], scramble: Callable[[Any], Any]) -> Any:
    """BERT with a LoRA and a learned head."""
    made = ld.get_peft_model(tiny("Bert", "ForSequenceClassification"), ld.LoraConfig(task_type="SEQ_CLS", r=4))
    return scramble(made).eval()


def test_the_model_is_held_not_wrapped(tiny: Callable[..., Any], batch: dict[str, torch.Tensor]) -> None:
    base = tiny("Bert", "ForSequenceClassification")
    names, wanted = list(base.state_dict()), base(**batch).logits
    model = ld.get_peft_model(base, ld.LoraConfig(task_type="SEQ_CLS", r=4)).eval()
    assert model.get_base_model() is base is model.base_model.model
    assert model.config is base.config and model.device == base.device and model.num_labels == 3
    assert [name for name in base.state_dict() if "adapter_" not in name and "copy_" not in name] == names
    assert torch.equal(logits(model, batch), wanted), "a new adapter changes nothing"
    assert model.modules_to_save == {"classifier"} and model.active_peft_config.r == 4
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = model.nothing_like_it
    assert not model.training and ld.PeftModel(base.train()).training


def test_disable_and_unload(classifier: Any, tiny: Callable[..., Any], batch: dict[str, torch.Tensor]) -> None:
    fresh = tiny("Bert", "ForSequenceClassification")
    base, adapted = logits(fresh, batch), logits(classifier, batch)
    with classifier.disable_adapter():
        assert torch.equal(logits(classifier, batch), base)
        with classifier.disable_adapter():
            pass
        assert torch.equal(logits(classifier, batch), base)
    assert torch.equal(logits(classifier, batch), adapted) and not torch.equal(adapted, base)
    model = classifier.unload()
    assert type(model) is type(fresh) and list(model.state_dict()) == list(fresh.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))
    assert all(p.requires_grad for p in model.parameters()) and not classifier.peft_config


def test_merge_and_unload_takes_the_head_over(
    classifier: Any, tiny: Callable[..., Any], batch: dict[str, torch.Tensor]
) -> None:
    wanted = logits(classifier, batch)
    model = classifier.merge_and_unload()
    fresh = tiny("Bert", "ForSequenceClassification")
    assert type(model) is type(fresh) and list(model.state_dict()) == list(fresh.state_dict())
    assert torch.allclose(logits(model, batch), wanted, atol=1e-5)
    assert not torch.equal(model.classifier.weight, fresh.classifier.weight)


def test_merge_and_unmerge(
    tiny: Callable[..., Any], scramble: Callable[[Any], Any], batch: dict[str, torch.Tensor]
) -> None:
    model = scramble(ld.get_peft_model(tiny("Llama", "ForCausalLM"), ld.LoraConfig(task_type="CAUSAL_LM", r=4))).eval()
    before = {name: value.clone() for name, value in model.get_base_model().state_dict().items()}
    wanted = logits(model, batch)
    model.merge_adapter()
    assert torch.allclose(logits(model, batch), wanted, atol=1e-5) and model.active_adapter == "default"
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch), wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.get_base_model().state_dict().items())
    model.merge_adapter(["default"])
    assert torch.allclose(logits(model.merge_and_unload(), batch), wanted, atol=1e-5)


def test_merging_that_fails_changes_nothing(classifier: Any, batch: dict[str, torch.Tensor]) -> None:
    """An update beyond what the weight's dtype can hold."""
    classifier.add_adapter("huge", ld.LoraConfig(r=2))
    classifier.set_adapter(["default", "huge"])
    for parameter in ld.adapter_parameters(classifier.get_base_model(), "huge")["model"]:
        parameter.data.fill_(1e30)
    with pytest.raises(ld.AdapterMismatchError, match="range"):
        classifier.merge_and_unload()
    assert classifier.active_adapters == ["default", "huge"]
    assert ld.list_adapters(classifier.get_base_model()) == {"default": ["model"], "huge": ["model"]}
    with pytest.raises(ld.ConfigError, match="whole module of its own"):
        classifier.merge_adapter(["default"])


def test_several_adapters(
    tiny: Callable[..., Any], scramble: Callable[[Any], Any], batch: dict[str, torch.Tensor]
) -> None:
    model = scramble(ld.get_peft_model(tiny("GPT2", "LMHeadModel"), ld.LoraConfig(r=4), "dog")).eval()
    dog = logits(model, batch)
    model.add_adapter("cat", ld.LoraConfig(r=2))
    assert model.active_adapters == ["dog"] and torch.equal(logits(model, batch), dog)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learning and all("adapter_dog" in name for name in learning)
    model.set_adapter("cat")
    scramble(model)
    cat = logits(model, batch)
    assert model.active_adapter == "cat" and not torch.equal(cat, dog)
    assert all("adapter_cat" in name for name, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("dog", inference_mode=True)
    assert torch.equal(logits(model, batch), dog) and model.get_nb_trainable_parameters()[0] == 0
    model.set_adapter(["dog", "cat"])
    assert model.active_adapter == ["dog", "cat"]
    model.delete_adapter("dog")
    assert model.active_adapter == "cat" and list(model.peft_config) == ["cat"]
    assert torch.equal(logits(model, batch), cat)
    model.add_adapter("dog", ld.LoraConfig(r=4))
    model.delete_adapter("cat")
    assert model.active_adapter == "dog"
    for wrong in (lambda: model.set_adapter("cow"), lambda: model.delete_adapter("cow"),
                  lambda: model.add_adapter("dog", ld.LoraConfig(r=2))):  # fmt: skip
        with pytest.raises(ld.ConfigError, match=r"'cow'|'dog'"):
            wrong()


def test_each_row_its_own(
    tiny: Callable[..., Any], scramble: Callable[[Any], Any], batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """adapter_names as in PEFT, with the same answers; and here with gradients too."""
    peft = pytest.importorskip("peft")
    model = scramble(ld.get_peft_model(tiny("Llama", "ForCausalLM"), ld.LoraConfig(task_type="CAUSAL_LM", r=4))).eval()
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("Llama", "ForCausalLM"), str(tmp_path))
    rows = ["__base__", "default"]
    wanted = theirs(**batch, adapter_names=rows).logits
    assert torch.allclose(model(**batch, adapter_names=rows).logits, wanted, atol=1e-5)
    call = {**batch, "attention_mask": torch.ones_like(batch["input_ids"]), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**call, adapter_names=rows), theirs.generate(**call, adapter_names=rows))
    model.train()(**batch, labels=batch["input_ids"], adapter_names=rows).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ld.ConfigError, match="'cow'"):
        model(**batch, adapter_names=["cow", "default"])


def test_targets_that_were_named_stay(tiny: Callable[..., Any]) -> None:
    model = ld.get_peft_model(tiny("Bert", "ForMaskedLM"), ld.LoraConfig(r=2, target_modules=["key"]))
    assert model.peft_config["default"].target_modules == ["key"]
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"key"}
    whole = ld.get_peft_model(tiny("Bert", "ForMaskedLM"), ld.LoraConfig(r=2, target_modules="all-linear"))
    assert whole.get_nb_trainable_parameters()[0] > model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: ld.LoraConfig(task_type="CHAT"), "task_type='CHAT'"),
        (lambda: ld.LoraConfig(target_modules=["quary"]), "the nearest names are query"),
        (lambda: {"r": 8}, "give a LoraConfig"),
    ],
)
def test_refused(config: Callable[[], Any], words: str, tiny: Callable[..., Any]) -> None:
    base = tiny("Bert", "ForMaskedLM")
    names = list(base.state_dict())
    with pytest.raises(ld.LoraDiffusionError, match=words) as caught:
        ld.get_peft_model(base, config())
    assert "\n" not in str(caught.value) and list(base.state_dict()) == names
    assert all(p.requires_grad for p in base.parameters())


def test_twice_is_refused(classifier: Any) -> None:
    with pytest.raises(ld.ConfigError, match="a PeftModel already"):
        ld.get_peft_model(classifier, ld.LoraConfig())
    with pytest.raises(ld.ConfigError, match="an adapter 'default' is there already"):
        ld.get_peft_model(classifier.get_base_model(), ld.LoraConfig())


def test_copies_and_pickles(classifier: Any, batch: dict[str, torch.Tensor]) -> None:
    wanted = logits(classifier, batch)
    for twin in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert torch.equal(logits(twin, batch), wanted) and twin.active_adapter == "default"
        twin.unload()
    assert torch.equal(logits(classifier, batch), wanted)


def test_other_methods_by_the_same_names(tiny: Callable[..., Any], batch: dict[str, torch.Tensor]) -> None:
    """BitFit is none of PEFT's methods; the names are for it too, and its head comes along."""
    base = tiny("Bert", "ForSequenceClassification")
    wanted = logits(base, batch)
    model = ld.get_peft_model(base, ld.BitFitConfig(task_type="SEQ_CLS")).eval()
    assert model.peft_type == "BITFIT" and model.modules_to_save == {"classifier"}
    model(**batch, labels=torch.tensor([0, 1])).loss.backward()
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), wanted)
