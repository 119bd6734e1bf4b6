"""Two processes on gloo: data parallel and fully sharded trainings learn what one process learns."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import lora_diffusion as ld

STEPS = 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("to_q", "to_k", "to_v", "to_out"):
            self.add_module(name, nn.Linear(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.to_out(F.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x)))


def build(dora: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    config = ld.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out"], use_dora=dora
    )
    ld.add_adapter(model, config)
    return model


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(step))


def learn(model: nn.Module, parameters: list[Any], rows: slice) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(STEPS):
        model(batch(step)[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def worker(rank: int, mode: str, dora: bool, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = build(dora)
    parameters = ld.adapter_parameters(model)["model"]
    rows = slice(2 * rank, 2 * rank + 2)
    if mode == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        learn(wrapped, parameters, rows)
        adapter = ld.get_adapter(wrapped).flat()
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        parameters = ld.adapter_parameters(model)["model"]
        learn(model, parameters, rows)
        adapter = {name: p.full_tensor() for name, p in model.named_parameters() if "lora_" in name}
    if rank == 0:
        torch.save({name: value.detach().clone() for name, value in adapter.items()}, f"{folder}/learned.pt")
    dist.barrier()
    time.sleep(0.5)  # until the other has left the barrier too
    os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down in order; all is saved by now


@pytest.mark.parametrize(("mode", "dora"), [("ddp", False), ("fsdp2", False), ("ddp", True)])
def test_two_processes_learn_what_one_does(mode: str, dora: bool, tmp_path: Path) -> None:
    mp.spawn(worker, args=(mode, dora, str(tmp_path)), nprocs=2)
    learned = torch.load(tmp_path / "learned.pt", weights_only=True)
    model = build(dora)
    learn(model, ld.adapter_parameters(model)["model"], slice(0, 4))
    wanted = dict(ld.get_adapter(model).flat()) if mode == "ddp" else dict(model.named_parameters())
    assert learned
    for name, value in learned.items():
        torch.testing.assert_close(value, wanted[name].detach(), rtol=1e-4, atol=1e-6)
