"""Prompts and prefixes by PEFT's names: the same answers as PEFT's for the same tensors, and more kinds of calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_diffusion as ld

peft = pytest.importorskip("peft")

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
    "lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PrefixTuningConfig", {}),
    "projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 16}),
}
CASES = [
    ("Bert", "ForSequenceClassification", "SEQ_CLS"),
    ("Roberta", "ForTokenClassification", "TOKEN_CLS"),
    ("Bert", "ForQuestionAnswering", "QUESTION_ANS"),
    ("GPT2", "LMHeadModel", "CAUSAL_LM"),
    ("Llama", "ForCausalLM", "CAUSAL_LM"),
    ("T5", "ForConditionalGeneration", "SEQ_2_SEQ_LM"),
]
TOKENS = 5


@pytest.fixture(autouse=True)
def quiet_peer() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(peft|transformers)\b")
        yield


def settings(method: str, task: str) -> tuple[str, dict[str, Any]]:
    name, more = METHODS[method]
    return name, {"task_type": task, "num_virtual_tokens": TOKENS, **more}


@torch.no_grad()
def answer(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(rows, columns, numbers) or (rows, numbers); zeros where the batch has padding."""
    decoder = "T5" in type(model.get_base_model()).__name__
    out = model(**batch, **({"decoder_input_ids": batch["input_ids"][:, :4]} if decoder else {}))
    logits = torch.stack([out.start_logits, out.end_logits], -1) if "start_logits" in out else out.logits
    if logits.ndim == 2 or decoder:
        return logits
    mask = batch["attention_mask"]
    front = mask.new_ones(len(mask), logits.shape[1] - mask.shape[1])
    return logits * torch.cat([front, mask], 1).unsqueeze(-1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "head", "task"), CASES)
def test_as_peft_and_back(
    method: str,
    family: str,
    head: str,
    task: str,
    tiny: Callable[..., Any],
    scramble: Callable[[Any], Any],
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    """PEFT's folder answers here as there, ours there as here; logits are as long as PEFT's."""
    name, fields = settings(method, task)
    theirs = scramble(peft.get_peft_model(tiny(family, head), getattr(peft, name)(**fields))).eval()
    wanted = answer(theirs, batch)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    loaded = ld.PeftModel.from_pretrained(tiny(family, head), tmp_path / "theirs")
    assert loaded.peft_type == theirs.peft_type.value and type(loaded).__name__ == type(theirs).__name__
    assert torch.allclose(answer(loaded, batch), wanted, atol=1e-5)
    assert not torch.allclose(answer(ld.PeftModel(tiny(family, head)), batch), wanted[:, -7:], atol=1e-3)

    ours = scramble(ld.get_peft_model(tiny(family, head), getattr(ld, name)(**fields))).eval()
    wanted = answer(ours, batch)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny(family, head), str(tmp_path / "ours")).eval()
    assert torch.allclose(answer(again, batch), wanted, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "head", "task"), CASES)
def test_disabled_and_unloaded_bit_for_bit(
    method: str,
    family: str,
    head: str,
    task: str,
    tiny: Callable[..., Any],
    scramble: Callable[[Any], Any],
    batch: dict[str, torch.Tensor],
) -> None:
    """For encoders too, where PEFT's disable_adapter fails."""
    name, fields = settings(method, task)
    base = answer(ld.PeftModel(tiny(family, head)), batch)
    ours = scramble(ld.get_peft_model(tiny(family, head), getattr(ld, name)(**fields))).eval()
    with ours.disable_adapter():
        assert torch.equal(answer(ours, batch), base)
    assert not torch.equal(answer(ours, batch)[:, -base.shape[1] :], base)
    model, fresh = ours.unload(), tiny(family, head)
    assert torch.equal(answer(ld.PeftModel(model), batch), base)
    assert list(model.state_dict()) == list(fresh.state_dict()) and type(model) is type(fresh)


def test_peft_fails_where_ours_does_not(tiny: Callable[..., Any], batch: dict[str, torch.Tensor]) -> None:
    """The reason for the test above; when PEFT can, this says so."""
    theirs = peft.get_peft_model(
        tiny("Bert", "ForSequenceClassification"), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    )
    with pytest.raises(UnboundLocalError), theirs.disable_adapter():
        theirs(**batch)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "head", "task"), CASES[3:])
def test_generate_as_peft(
    method: str,
    family: str,
    head: str,
    task: str,
    tiny: Callable[..., Any],
    scramble: Callable[[Any], Any],
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    name, fields = settings(method, task)
    theirs = scramble(peft.get_peft_model(tiny(family, head), getattr(peft, name)(**fields))).eval()
    theirs.save_pretrained(str(tmp_path))
    ours = ld.PeftModel.from_pretrained(tiny(family, head), tmp_path)
    call = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    wanted = theirs.generate(**call, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.generate(**call, max_new_tokens=6, do_sample=False), wanted)
    if task == "CAUSAL_LM":
        positional = ours.generate(call.pop("input_ids"), **call, max_new_tokens=6, do_sample=False)
        assert torch.equal(positional, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_losses(method: str, tiny: Callable[..., Any], batch: dict[str, torch.Tensor]) -> None:
    """Labels of tokens and positions of answers move along with the tokens, which PEFT leaves to its caller."""
    name, fields = settings(method, "TOKEN_CLS")
    ids, labels = batch["input_ids"], batch["input_ids"] % 3
    model = ld.get_peft_model(tiny("Bert", "ForTokenClassification"), getattr(ld, name)(**fields)).eval()
    out = model(**batch, labels=labels)
    own = torch.nn.functional.cross_entropy(out.logits[:, -7:].reshape(-1, 3), labels.reshape(-1))
    assert torch.allclose(out.loss, own)
    model = ld.get_peft_model(
        tiny("Bert", "ForQuestionAnswering"), getattr(ld, name)(**settings(method, "QUESTION_ANS")[1])
    ).eval()
    out = model(ids, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 3]))
    first, last = out.start_logits[:, -7:], out.end_logits[:, -7:]
    front = out.start_logits.shape[1] - 7
    begun = torch.nn.functional.cross_entropy(out.start_logits, torch.tensor([1, 2]) + front)
    ended = torch.nn.functional.cross_entropy(out.end_logits, torch.tensor([3, 3]) + front)
    assert torch.allclose(out.loss, (begun + ended) / 2) and first.shape == last.shape == (2, 7)
    out.loss.backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert learning and all(p.grad is not None for p in learning)


def test_lora_and_prompt_together(
    tiny: Callable[..., Any], scramble: Callable[[Any], Any], batch: dict[str, torch.Tensor]
) -> None:
    """PEFT refuses adapters of two kinds in one model."""
    model = ld.get_peft_model(tiny("GPT2", "LMHeadModel"), ld.LoraConfig(task_type="CAUSAL_LM", r=2))
    model.add_adapter("words", ld.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    scramble(model)
    alone = answer(model.eval(), batch)
    assert alone.shape[1] == 7
    model.set_adapter(["default", "words"])
    assert answer(scramble(model), batch).shape[1] == 7 + TOKENS and model.active_adapters == ["default", "words"]
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.delete_adapter("words")
    assert model.active_adapter == "default" and answer(model, batch).shape[1] == 7


def test_training_on(tiny: Callable[..., Any], scramble: Callable[[Any], Any], tmp_path: Path) -> None:
    """Our folder keeps P-tuning's encoder beside what PEFT reads; PEFT's keeps bare vectors, and those learn on."""
    name, fields = settings("mlp", "CAUSAL_LM")
    made = scramble(ld.get_peft_model(tiny("GPT2", "LMHeadModel"), getattr(ld, name)(**fields)))
    made.save_pretrained(tmp_path / "ours")
    again = ld.PeftModel.from_pretrained(tiny("GPT2", "LMHeadModel"), tmp_path / "ours", is_trainable=True)
    learning = {key: p for key, p in made.named_parameters() if p.requires_grad}
    loaded = {key: p for key, p in again.named_parameters() if p.requires_grad}
    assert list(learning) == list(loaded) and all(torch.equal(learning[key], loaded[key]) for key in learning)
    theirs = peft.get_peft_model(tiny("GPT2", "LMHeadModel"), getattr(peft, name)(**fields))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(tiny("GPT2", "LMHeadModel"), str(tmp_path / "theirs"), is_trainable=True)
    bare = ld.PeftModel.from_pretrained(tiny("GPT2", "LMHeadModel"), tmp_path / "theirs", is_trainable=True)
    assert bare.get_nb_trainable_parameters()[0] == TOKENS * 32


def test_rows_with_prompts_of_their_own(
    tiny: Callable[..., Any], scramble: Callable[[Any], Any], batch: dict[str, torch.Tensor]
) -> None:
    """A prompt of five tokens, one of two and none, in one batch: each row answers as on its own."""
    config = {"task_type": "SEQ_CLS", "num_virtual_tokens": TOKENS}
    model = scramble(ld.get_peft_model(tiny("Bert", "ForSequenceClassification"), ld.PromptTuningConfig(**config)))
    model.add_adapter("short", ld.PromptTuningConfig(num_virtual_tokens=2))
    model.set_adapter("short")
    scramble(model).eval()
    both = {key: torch.cat([value, value[:1]]) for key, value in batch.items()}
    with torch.no_grad():
        rows = model(**both, adapter_names=["short", "short", "__base__"]).logits
        assert torch.allclose(rows[:2], model(**batch).logits, atol=1e-6)
        with model.disable_adapter():
            assert torch.allclose(rows[2:], model(**batch).logits[:1], atol=1e-6)
