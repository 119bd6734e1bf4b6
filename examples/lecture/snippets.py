"""The lecture's code for PEFT, with its import line changed: python examples/lecture/snippets.py

Runs offline in seconds: mT5-large stands on the meta device (names and shapes, no numbers), the models that train are
tiny and of random weights. `from lora_diffusion import …` is all that differs from `from peft import …`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import MT5Config, MT5ForConditionalGeneration, OPTConfig, OPTForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lora_diffusion import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    TaskType,
    get_peft_config,
    get_peft_model,
)

MT5_LARGE = MT5Config(d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, vocab_size=250112)
LECTURE_TRAINABLE, LECTURE_TOTAL = 2_359_296, 1_231_940_608


def count_parameters() -> tuple[int, int]:
    """The lecture's first snippet: LoRA on mT5-large, and what of it learns. Returns both counts."""
    peft_config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=8, lora_alpha=32, lora_dropout=0.1)
    with torch.device("meta"):
        model = MT5ForConditionalGeneration(MT5_LARGE)
    model = get_peft_model(model, peft_config)
    model.print_trainable_parameters()
    trainable, total = model.get_nb_trainable_parameters()
    untied = total + MT5_LARGE.vocab_size * MT5_LARGE.d_model
    print(
        f"  the lecture's line says all params: {LECTURE_TOTAL:,d}. It is from the time when transformers gave mT5 a\n"
        "  head of its own; transformers 5 always ties the head to the embedding, which then counts once. With the\n"
        f"  head beside it there are {total:,d} + {MT5_LARGE.vocab_size:,d} · {MT5_LARGE.d_model:,d} = {untied:,d}."
    )
    return trainable, total


def train_and_save(folder: Path) -> None:
    """The lecture's second snippet: learn, save the adapter alone, load it onto the same base."""
    base = folder / "opt-tiny"
    torch.manual_seed(0)
    OPTForCausalLM(tiny_opt()).save_pretrained(base)

    model = OPTForCausalLM.from_pretrained(base)
    peft_config = get_peft_config({"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": False, "r": 8})
    model = get_peft_model(model, peft_config)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    ids = torch.randint(4, 128, (4, 16))
    for step in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 19):
            print(f"  step {step + 1}: loss {loss.item():.3f}")
    model.save_pretrained(folder / "opt-tiny-lora")

    config = PeftConfig.from_pretrained(folder / "opt-tiny-lora")
    again = OPTForCausalLM.from_pretrained(config.base_model_name_or_path)
    again = PeftModel.from_pretrained(again, folder / "opt-tiny-lora")
    size = (folder / "opt-tiny-lora" / "adapter_model.safetensors").stat().st_size
    print(f"  the adapter's file: {size:,d} bytes; loss when loaded again: {again(input_ids=ids, labels=ids).loss:.3f}")


def generate(folder: Path) -> torch.Tensor:
    """The lecture's third snippet: the base and the adapter from the adapter's folder alone. Returns the new ids."""
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "opt-tiny-lora")
    model.eval()
    prompt = torch.tensor([list(b"Preheat the oven to 350 degrees and place the cookie dough")])
    outputs = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8)
    print("  new ids:", outputs[0, prompt.shape[1] :].tolist())
    return outputs


def learn_a_prompt(folder: Path) -> None:
    """P-tuning by the same names: twenty virtual tokens from an encoder, in front of every input."""
    model = OPTForCausalLM.from_pretrained(folder / "opt-tiny")
    peft_config = PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=20, encoder_hidden_size=128)
    model = get_peft_model(model, peft_config)
    model.print_trainable_parameters()
    ids = torch.randint(4, 128, (4, 16))
    print("  logits for 16 tokens:", tuple(model(input_ids=ids).logits.shape))
    with model.disable_adapter():
        print("  and without the prompt:", tuple(model(input_ids=ids).logits.shape))


def tiny_opt() -> OPTConfig:
    """An OPT that bytes are the tokens of."""
    return OPTConfig(
        vocab_size=256,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
    )


def main() -> None:
    print("mT5-large, LoRA r=8")
    count_parameters()
    with tempfile.TemporaryDirectory() as folder:
        print("OPT, tiny: LoRA, twenty steps")
        train_and_save(Path(folder))
        print("OPT, tiny: AutoPeftModelForCausalLM")
        generate(Path(folder))
        print("OPT, tiny: P-tuning")
        learn_a_prompt(Path(folder))


if __name__ == "__main__":
    main()
