"""Texts that share a row and do not see one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import lora_diffusion as ld
from tests.train.text_models import SENTENCES, model, tokenizer
from train.text_bad_rows import BadRows
from train.text_batches import Batches
from train.text_packing import check_packing, collate_packed, pack
from train.text_rows import Row
from train.text_tasks.causal_lm import CausalLM
from train.text_tasks.masked_lm import MaskedLM
from train.text_template import PLAIN, TextTemplate


def task_and_examples(family: str = "gpt2") -> Any:
    task = CausalLM(tokenizer(family), template=PLAIN)
    texts = [text[:cut] for text in SENTENCES for cut in (9, 30, 200)]
    return task, task.prepare([Row({"text": text}, f"line {n}") for n, text in enumerate(texts)], BadRows())


def test_rows_are_full_and_nothing_is_lost() -> None:
    _, examples = task_and_examples()
    packs = pack(examples, 48)
    assert sorted(id(one) for each in packs for one in each.examples) == sorted(map(id, examples))
    assert all(each.length <= 48 for each in packs)
    assert len(packs) <= -(-sum(one.length for one in examples) // 48) + 1
    assert pack(examples, 48) == packs
    with pytest.raises(ld.ConfigError, match="do not go into packs of 8"):
        pack(examples, 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_loss_and_its_gradient_are_those_of_the_texts_alone(family: str, attention: str) -> None:
    task, examples = task_and_examples(family)
    made = model(family, "ForCausalLM", attn_implementation=attention)
    check_packing(made, task)
    packs = pack(examples, 64)
    assert len(packs) < len(examples) / 2
    gradients = []
    for batch in (collate_packed(packs, task, multiple=8), task.collate(examples)):
        made.zero_grad()
        loss = task.loss(made, batch)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)])
    for ours, apart in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, apart, rtol=1e-4, atol=1e-6)


def test_packs_make_batches_like_examples() -> None:
    task, examples = task_and_examples()
    batches = Batches(task, pack(examples, 64), batch_size=2, seed=0, group=2)
    batch = batches.batch(0)
    assert set(batch) == {"input_ids", "position_ids", "labels", "positions", "targets"}
    assert batches.share(0) + batches.share(1) == pytest.approx(2)
    assert batch["targets"].shape[0] == sum(batches.examples[index].counted for index in batches.indices(0))


SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 400,
}  # fmt: skip


@pytest.mark.parametrize(
    "network",
    [
        lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=3)),
        lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)),
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    ],
)
def test_families_that_can(network: Any) -> None:
    torch.manual_seed(0)
    made = network().train()
    check_packing(made, task_and_examples()[0])
    assert made.training


def test_families_that_cannot_are_refused_with_the_reason() -> None:
    task = task_and_examples()[0]
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(ld.ConfigError, match=r"packing cannot be used: a MambaForCausalLM .*; group by length"):
        check_packing(mamba, task)

    class Leaky(nn.Module):
        """A model that masks nothing but the future."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model("gpt2", "ForCausalLM")
            self.config = self.inner.config

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> Any:
            mask = torch.ones_like(input_ids)
            return self.inner(input_ids=input_ids, position_ids=position_ids, attention_mask=mask, **kwargs)

    with pytest.raises(ld.ConfigError, match="lets a text see the one before it"):
        check_packing(Leaky(), task)
    masked = MaskedLM(tokenizer("bert"), template=TextTemplate("{x} {mask}", "{y}"))
    with pytest.raises(ld.ConfigError, match="masked-lm is no causal language model"):
        check_packing(model("bert", "ForMaskedLM"), masked)
