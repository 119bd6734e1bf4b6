"""Everything learns: transformers' Trainer, a loop with accelerate, quantised-base preparation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch.utils.data import DataLoader, Dataset

import lora_diffusion as ld

CASES: dict[str, tuple[str, str, str, Callable[[], Any]]] = {
    "classes": ("Bert", "ForSequenceClassification", "SEQ_CLS", lambda: ld.LoraConfig(task_type="SEQ_CLS", r=4)),
    "causal": ("GPT2", "LMHeadModel", "CAUSAL_LM", lambda: ld.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1)),
    "no task": ("Bert", "ForMaskedLM", "", lambda: ld.LoraConfig(r=4)),
    "seq2seq": ("T5", "ForConditionalGeneration", "SEQ_2_SEQ_LM",
                lambda: ld.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4)),
    "p-tuning": ("GPT2", "LMHeadModel", "CAUSAL_LM",
                 lambda: ld.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix": ("Bert", "ForTokenClassification", "TOKEN_CLS",
               lambda: ld.PrefixTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=3)),
}  # fmt: skip


class Rows(Dataset[Any]):
    """Twelve rows; column "text_id" is one that no model takes."""

    def __init__(self, task: str) -> None:
        self.task = task

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(3, 99, (9,), generator=torch.Generator().manual_seed(index))
        labels: Any = index % 3 if self.task == "SEQ_CLS" else ids % 3 if self.task == "TOKEN_CLS" else ids
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "text_id": index}
        return {**row, "token_type_ids": torch.zeros_like(ids)} if self.task in ("SEQ_CLS", "TOKEN_CLS") else row


def arguments(folder: Path) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_trainer(case: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Only the adapter changes, its checkpoints hold nothing else, and a run resumes from one with the same result."""
    family, head, task, config = CASES[case]
    torch.manual_seed(0)
    model = ld.get_peft_model(tiny(family, head), config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = transformers.Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(task))
    assert trainer.label_names == ["labels"]
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= {name for name, p in model.named_parameters() if p.requires_grad} and changed
    kept = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert set(kept) == {name for name, p in model.named_parameters() if p.requires_grad}

    torch.manual_seed(0)
    again = ld.get_peft_model(tiny(family, head), config())
    transformers.Trainer(model=again, args=arguments(tmp_path), train_dataset=Rows(task)).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_trainer_with_gradient_checkpointing(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = ld.get_peft_model(tiny("Llama", "ForCausalLM"), ld.LoraConfig(task_type="CAUSAL_LM", r=4))
    model.gradient_checkpointing_enable()
    transformers.Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows("CAUSAL_LM")).train()
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert factors and all(p.abs().max() > 0 for p in factors), "every B has learned"


def test_accelerate(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """The loop of PEFT's examples; the folder of the result gives the same model."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = ld.get_peft_model(tiny("GPT2", "LMHeadModel"), ld.LoraConfig(task_type="CAUSAL_LM", r=4))
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Rows("CAUSAL_LM"), batch_size=4))
    losses = []
    for _ in range(4):
        for batch in loader:
            batch.pop("text_id")
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    made = accelerator.unwrap_model(model).eval()
    made.save_pretrained(tmp_path, is_main_process=accelerator.is_main_process)
    again = ld.PeftModel.from_pretrained(tiny("GPT2", "LMHeadModel"), tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).logits, made(ids).logits)


def test_state_dict_is_the_adapter_s(tiny: Callable[..., Any]) -> None:
    """Alone and as a part of something else; loading it back misses nothing, and a stranger's name is still refused."""
    model = ld.get_peft_model(tiny("Bert", "ForSequenceClassification"), ld.LoraConfig(task_type="SEQ_CLS", r=4))
    ours = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(model.state_dict()) == ours
    outer = torch.nn.ModuleDict({"model": model, "other": torch.nn.Linear(2, 2)})
    assert set(outer.state_dict()) == {f"model.{name}" for name in ours} | {"other.weight", "other.bias"}
    outer.load_state_dict(outer.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict({**model.state_dict(), "strange": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing"):
        model.load_state_dict({name: value for name, value in model.state_dict().items() if "lora_A" not in name})
    assert len(model.base_model.state_dict()) > len(ours)


def test_prepare_model_for_kbit_training(tiny: Callable[..., Any]) -> None:
    base = ld.prepare_model_for_kbit_training(tiny("Llama", "ForCausalLM").half())
    assert {p.dtype for p in base.parameters()} == {torch.float32} and not any(
        p.requires_grad for p in base.parameters()
    )
    assert not base.is_gradient_checkpointing, "as in PEFT, only for quantised weights"


def test_quantised_base(tmp_path: Path) -> None:
    """Llama in NF4: prepared, adapted, trained for a step; the counts are PEFT's."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=99
        )
    ).save_pretrained(tmp_path)
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def build() -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, dtype=torch.bfloat16)

    model = ld.get_peft_model(ld.prepare_model_for_kbit_training(build()), ld.LoraConfig(task_type="CAUSAL_LM", r=4))
    theirs = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(build()), peft.LoraConfig(task_type="CAUSAL_LM", r=4)
    )
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ids = torch.randint(3, 99, (2, 8))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
