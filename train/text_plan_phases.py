"""The phases of a text run and what each takes at its peak: the run's own order, with fake tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_diffusion.inject import add_adapter
from lora_diffusion.planning.fake_copy import fake_copy
from lora_diffusion.planning.plan import OPTIMIZER, Plan, checkpoint_activations, measure, planning, state_sizes
from lora_diffusion.planning.stored import store
from lora_diffusion.planning.workspace import CUBLAS
from train.plan_phases import Phase
from train.text_plan_autocast import CudaAutocast, backward
from train.text_plan_parts import measure_in_parts

LOADING, TRAINING, VALIDATION, SAVING = "loading", "training", "validation", "saving"

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class TextJob:
    """What a text run does with a model, as far as memory goes.

    Attributes:
        loss: (model, batch) → scalar, as the run calls it.
        batch: the largest one of training; only shapes and dtypes count.
        validation: the largest one of validation; None: there is none.
        configs: what `add_adapter` gets; None: the model has its adapter. For a model on meta, as are the next two.
        precision: of the base; None: as it is.
        quantize: store the base in fewer bits.
        autocast: the precision in which a base in half precision computes with what is learned in fp32.
        copies: fp32 copies of what is learned: that to step back to, and the average with EMA.
        accumulates: gradients of a micro-batch before are there.
        processes: where above 0, the base is in parts (FSDP2) over so many of them.
        offload: and the parts are in main memory.
    """

    loss: Loss
    batch: Batch
    validation: Batch | None = None
    configs: Any = None
    precision: torch.dtype | None = None
    quantize: str | None = None
    autocast: torch.dtype | None = None
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    copies: int = 1
    accumulates: bool = False
    processes: int = 0
    offload: bool = False


def phases_of_text(model: nn.Module, job: TextJob, *, device: str = "cuda", cublas: int = CUBLAS) -> list[Phase]:
    """All phases of such a run, in order. model: real or on the meta device; it is not changed."""
    with planning() as mode:
        work = _Work(model, job, mode, device, cublas)
        phases = [Phase(LOADING, work.loading()), Phase(TRAINING, work.training())]
        if job.validation is not None:
            phases.append(Phase(VALIDATION, work.validation(job.validation)))
        return [*phases, Phase(SAVING, work.saving())]


class _Work:
    """A fake copy of the model, and the phases run with it."""

    def __init__(self, model: nn.Module, job: TextJob, mode: Any, device: str, cublas: int) -> None:
        self.job, self.mode, self.device, self.cublas = job, mode, device, cublas
        real = any(not parameter.is_meta for parameter in model.parameters())
        self.model = fake_copy(model if real else _prepared(model, job), mode)
        if not real and job.quantize is not None:
            with mode:
                store(self.model, job.quantize, job.precision or torch.float32)
        self.learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def loading(self) -> Plan:
        """The whole base: it is taken apart when it is there."""
        return self._measure(lambda: None, loading=True)

    def training(self) -> Plan:
        job, model = self.job, self.model
        model.train()
        if job.gradient_checkpointing:
            checkpoint_activations(model)
        batch = self._batch(job.batch)
        if job.accumulates:
            with self.mode:
                for parameter in self.learned:
                    parameter.grad = torch.empty_like(parameter)

        def work() -> None:
            with CudaAutocast(self.device == "cuda"):
                with self._computing():
                    loss = job.loss(model, batch)
                backward(loss)

        plan = self._measure(work, batch)
        for parameter in self.learned:
            parameter.grad = None
        model.eval()
        return plan

    def validation(self, given: Batch) -> Plan:
        batch = self._batch(given)

        def work() -> None:
            with torch.no_grad(), CudaAutocast(self.device == "cuda"), self._computing():
                self.job.loss(self.model, batch)

        return self._measure(work, batch)

    def saving(self) -> Plan:
        def work() -> None:
            with torch.no_grad():
                torch.stack([parameter.detach().isfinite().all() for parameter in self.learned])

        return self._measure(work)

    def _batch(self, given: Batch) -> dict[str, torch.Tensor]:
        with self.mode:
            return {name: torch.empty(value.shape, dtype=value.dtype) for name, value in given.items()}

    def _computing(self) -> AbstractContextManager[Any]:
        """As the run's own `computing`: a base in half precision computes under autocast."""
        if self.job.autocast is None:
            return nullcontext()
        return torch.autocast("cpu", dtype=self.job.autocast)

    def _measure(self, work: Callable[[], None], inputs: Any = None, *, loading: bool = False) -> Plan:
        options: dict[str, Any] = {"blocks": {} if loading else self._moving()}
        options |= {"cublas": self.cublas, "device": self.device}
        if self.job.processes and not loading:
            options |= {"processes": self.job.processes, "offload": self.job.offload}
            return measure_in_parts(self.mode, work, self.model, self.learned, **options)
        return measure(self.mode, work, modules=[self.model], learned=self.learned, inputs=inputs, **options)

    def _moving(self) -> dict[str, list[int]]:
        """What training adds: the optimizer's state, and the copies."""
        copies = [parameter.numel() * parameter.element_size() for parameter in self.learned] * self.job.copies
        return {OPTIMIZER: [*state_sizes(self.learned, self.job.optimizer), *copies]}


def _prepared(model: nn.Module, job: TextJob) -> nn.Module:
    """A copy on the meta device in the run's precision, with the adapter in it."""
    made: nn.Module = copy.deepcopy(model)
    if job.precision is not None:
        made.to(job.precision)
    if job.precision == torch.float16:
        for module in _kept(made):
            module.to(torch.float32)
    if job.configs is not None:
        add_adapter(made, job.configs, "planned", generator=torch.Generator())
    return made


def _kept(model: Any) -> list[nn.Module]:
    """Modules that overflow in fp16, by transformers' own list of them."""
    names = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [module for path, module in model.named_modules() if path.rpartition(".")[2] in names]
