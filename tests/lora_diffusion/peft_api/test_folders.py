"""Folders: ours in PEFT, PEFT's here, the same logits; and a model from its adapter's folder alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lora_diffusion as ld

peft = pytest.importorskip("peft")

CASES = [
    ("Bert", "ForSequenceClassification", "SEQ_CLS"),
    ("Roberta", "ForTokenClassification", "TOKEN_CLS"),
    ("Bert", "ForQuestionAnswering", "QUESTION_ANS"),
    ("GPT2", "LMHeadModel", "CAUSAL_LM"),
    ("Llama", "ForCausalLM", "CAUSAL_LM"),
    ("T5", "ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("Bert", "ForMaskedLM", None),
]


@torch.no_grad()
def answer(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model says, whatever its head."""
    batch = {**batch, "labels": batch["input_ids"]} if "T5" in type(model.get_base_model()).__name__ else batch
    out = model(**batch)
    return torch.cat([out.start_logits, out.end_logits]) if "start_logits" in out else out.logits


@pytest.mark.parametrize(("family", "head", "task"), CASES)
def test_both_ways(
    family: str,
    head: str,
    task: str | None,
    tiny: Callable[..., Any],
    scramble: Callable[[Any], Any],
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    ours = scramble(ld.get_peft_model(tiny(family, head), ld.LoraConfig(task_type=task, r=4, lora_alpha=7))).eval()
    wanted = answer(ours, batch)
    assert not torch.equal(wanted, answer(ld.PeftModel(tiny(family, head)), batch))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(family, head), str(tmp_path / "ours"))
    assert type(theirs).__name__ == type(ours).__name__
    assert torch.allclose(answer(theirs, batch), wanted, atol=1e-6)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for folder in ("ours", "theirs"):
        again = ld.PeftModel.from_pretrained(tiny(family, head), tmp_path / folder)
        assert type(again) is type(ours) and not again.training and again.active_adapter == "default"
        assert torch.equal(answer(again, batch), wanted)
        assert again.get_nb_trainable_parameters()[0] == 0


def test_training_on(tiny: Callable[..., Any], scramble: Callable[[Any], Any], tmp_path: Path) -> None:
    """is_trainable brings gradients and the dropout of the config back."""
    made = ld.get_peft_model(tiny("GPT2", "LMHeadModel"), ld.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.3))
    scramble(made).save_pretrained(tmp_path)
    again = ld.PeftModel.from_pretrained(tiny("GPT2", "LMHeadModel"), tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters() == made.get_nb_trainable_parameters()
    layer = again.get_base_model().transformer.h[0].attn.c_attn
    assert layer.part("default").dropout == 0.3


def test_several_adapters_and_what_else_lies_in_the_folder(
    tiny: Callable[..., Any], scramble: Callable[[Any], Any], batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """ "default" lies in the folder, others in one of their name, as PEFT has it; other files stay."""
    model = scramble(ld.get_peft_model(tiny("GPT2", "LMHeadModel"), ld.LoraConfig(task_type="CAUSAL_LM", r=4)))
    model.add_adapter("other", ld.LoraConfig(r=2))
    model.set_adapter("other")
    scramble(model).eval()
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "other", "tokenizer.json"
    ]  # fmt: skip
    assert (tmp_path / "README.md").read_text() == "mine"
    theirs = peft.PeftModel.from_pretrained(tiny("GPT2", "LMHeadModel"), str(tmp_path))
    theirs.load_adapter(str(tmp_path / "other"), "other")
    again = ld.PeftModel.from_pretrained(tiny("GPT2", "LMHeadModel"), tmp_path)
    again.load_adapter(tmp_path, "other", subfolder="other")
    for name in ("default", "other"):
        for one in (model, theirs, again):
            one.set_adapter(name)
        assert torch.allclose(answer(theirs, batch), answer(model, batch), atol=1e-6)
        assert torch.equal(answer(again, batch), answer(model, batch))
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["other"]


def test_loading_again_keeps_the_optimizer_s_parameters(
    tiny: Callable[..., Any], scramble: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = scramble(ld.get_peft_model(tiny("GPT2", "LMHeadModel"), ld.LoraConfig(task_type="CAUSAL_LM", r=4)))
    model.save_pretrained(tmp_path)
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.data.zero_()
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(a is b for a, b in zip(parameters, [p for p in model.parameters() if p.requires_grad]))
    assert all(torch.equal(a, b) for a, b in zip(parameters, kept))


def test_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = ld.get_peft_model(tiny("Bert", "ForMaskedLM"), ld.LoraConfig(r=2))
    with pytest.raises(ld.ConfigError, match="pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ld.ConfigError, match="no adapter 'dog'"):
        model.save_pretrained(tmp_path, selected_adapters=["dog"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ld.AdapterMismatchError):
        ld.PeftModel.from_pretrained(tiny("GPT2", "LMHeadModel"), tmp_path)
    with pytest.raises(ld.ModelNotFoundError, match="no folder here"):
        ld.PeftModel.from_pretrained(tiny("Bert", "ForMaskedLM"), str(tmp_path / "not there"))


def test_auto_classes(
    tiny: Callable[..., Any], scramble: Callable[[Any], Any], batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Base, head and adapter from the folder; a folder for another task is refused with the right class's name."""
    for family, head, task in CASES[:-1]:
        base, folder = tmp_path / f"{task}-base", tmp_path / f"{task}"
        tiny(family, head).save_pretrained(base)
        auto = next(
            getattr(ld, name) for name in ld.__all__ if name.startswith("Auto") and getattr(ld, name).task == task
        )
        model = getattr(transformers, auto.base).from_pretrained(base).eval()
        made = scramble(ld.get_peft_model(model, ld.LoraConfig(task_type=task, r=2)))
        made.save_pretrained(folder)
        again = auto.from_pretrained(folder)
        assert torch.equal(answer(again, batch), answer(made, batch))
        assert again.peft_config["default"].base_model_name_or_path == str(base)
    with pytest.raises(ld.ConfigError, match="load it with AutoPeftModelForSeq2SeqLM, not AutoPeftModelForCausalLM"):
        ld.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "SEQ_2_SEQ_LM")
    with pytest.raises(ld.ConfigError, match="trust_remote_code"):
        ld.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "CAUSAL_LM", trust_remote_code=True)
    config = tmp_path / "CAUSAL_LM" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ld.ModelNotFoundError, match="cannot be loaded"):
        ld.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "CAUSAL_LM")


def test_a_real_folder(monkeypatch: pytest.MonkeyPatch, batch: dict[str, torch.Tensor]) -> None:
    """A LoRA for GPT-2's sequence classification from the Hub: its own base, as wide and as deep, of random weights."""
    folder = Path(__file__).parents[4] / "shared" / "data" / "adapters" / "peft_gpt2"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    config = transformers.GPT2Config(vocab_size=99, n_positions=32, n_inner=64, pad_token_id=0)

    def build(name: str, num_labels: int) -> Any:
        assert name == "gpt2"
        config.num_labels = num_labels
        torch.manual_seed(0)
        return transformers.GPT2ForSequenceClassification(config).eval()

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", build)
    ours = ld.AutoPeftModelForSequenceClassification.from_pretrained(folder)
    assert isinstance(ours, ld.PeftModelForSequenceClassification)
    assert ours.config.num_labels == 6
    theirs = peft.PeftModel.from_pretrained(build("gpt2", 6), str(folder))
    assert torch.allclose(answer(ours, batch), answer(theirs, batch), atol=1e-5)
    with ours.disable_adapter():
        assert torch.equal(answer(ours, batch), build("gpt2", 6)(**batch).logits)
