"""Two processes on gloo: data parallel and fully sharded, a prompt beside LoRA gets the gradients of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers as tf

import lora_diffusion as ld


def build(family: str) -> Any:
    torch.manual_seed(0)
    if family == "gpt2":
        config = tf.GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        model = tf.GPT2LMHeadModel(config).eval()
    else:
        model = tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ).eval()
    prompt = ld.PromptEncoderConfig(num_virtual_tokens=3, encoder_reparameterization_type="LSTM")
    ld.add_adapter(model, [ld.LoraConfig(r=2), prompt], generator=torch.Generator().manual_seed(0))
    return model


def gradients(model: Any, parameters: list[Any]) -> list[torch.Tensor]:
    ids = torch.randint(2, 48, (2, 5), generator=torch.Generator().manual_seed(1))
    model(**ld.prepend_prompt(model, {"input_ids": ids, "labels": ids})).loss.backward()
    return [getattr(p.grad, "full_tensor", lambda p=p: p.grad)().clone() for p in parameters]


def worker(rank: int, family: str, mode: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = build(family)
    wanted = gradients(model, ld.adapter_parameters(model)["model"])
    model = build(family)
    wrapped: Any = model
    if mode == "sharded":
        from torch.distributed.fsdp import fully_shard

        blocks = model.transformer.h if family == "gpt2" else [*model.encoder.block, *model.decoder.block]
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
    else:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    found = gradients(wrapped, ld.adapter_parameters(model)["model"])
    for a, b in zip(wanted, found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert all(bool(gradient.abs().sum() > 0) for gradient in wanted[-3:])
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("mode", ["parallel", "sharded"])
def test_the_gradients_of_one_process(family: str, mode: str, tmp_path: Path) -> None:
    mp.spawn(worker, (family, mode, str(tmp_path)), nprocs=2)
