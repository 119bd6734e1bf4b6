"""Prompt tuning beside other adapters of the same embedding."""

from __future__ import annotations

import torch

import lora_diffusion as ld


def test_lora_on_the_embedding_beside_virtual_tokens() -> None:
    """Ids beyond the table have vectors and no low-rank row; those of the table have both."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    ids = torch.tensor([[3, 7, 9]])
    with torch.no_grad():
        base = model(ids).logits
        ld.add_adapter(model, ld.PromptTuningConfig(num_virtual_tokens=2), "prompt")
        ld.add_adapter(model, ld.LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False), "lora")
        batch = ld.prepend_prompt(model, {"input_ids": ids})
        said = model(**batch).logits
        assert said.shape[1] == 5 and torch.isfinite(said).all()
        ld.unload(model)
        assert torch.equal(model(ids).logits, base)
