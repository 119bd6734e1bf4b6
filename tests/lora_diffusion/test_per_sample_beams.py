"""Rows of different adapters under beam search: each row's beams keep its adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import lora_diffusion as ld

CONFIGS: dict[str, Any] = {
    "lora": ld.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False),
    "prefix": ld.PrefixTuningConfig(num_virtual_tokens=3),
    "bottleneck": ld.BottleneckConfig(placement="houlsby", bottleneck_size=8),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_every_beam_keeps_its_rows_adapter(kind: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=59)
    model = GPT2LMHeadModel(config).eval()
    for name in "ab":
        ld.add_adapter(model, CONFIGS[kind], name, generator=torch.Generator().manual_seed(ord(name)))
        with torch.no_grad():
            for parameter in ld.adapter_parameters(model, name)["model"]:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(ord(name))))
    ids = torch.tensor([[3, 7, 9, 11], [3, 7, 9, 11], [5, 2, 8, 30]])
    rows = ["a", "b", None]
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    with ld.adapters_per_sample(model, rows):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    times = options.get("num_return_sequences", 1)
    for k, name in enumerate(rows):
        ld.set_adapters(model, [] if name is None else [name])
        alone = model.generate(ids[k : k + 1], attention_mask=torch.ones_like(ids[k : k + 1]), **settings)
        mine = together[k * times : (k + 1) * times]
        width = min(mine.shape[1], alone.shape[1])
        assert torch.equal(mine[:, :width], alone[:, :width])
    assert not torch.equal(together[0], together[times]), "the adapters differ"
