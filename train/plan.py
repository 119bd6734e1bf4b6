"""How much memory a DreamBooth run will take, before anything of it is allocated.

    lora-diffusion plan --model sd15 --gradient_checkpointing --mixed_precision fp16 --gpu t4

The phases of the run are gone through with fake tensors (`train.plan_phases`); the largest of them is what the run
takes. A run does the same when it starts, and compares in its last event.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_diffusion.planning.plan import PARTS
from lora_diffusion.planning.workspace import CUBLAS, CUBLAS_HOPPER
from train.dreambooth_config import DreamBoothConfig
from train.memory import MemoryMeter
from train.plan_cards import CONTEXT, Card
from train.plan_models import Blueprint, of_pipeline
from train.plan_phases import Phase, Situation, phases_of

PROCESS = 480 * 2**20  # Python with PyTorch, diffusers and transformers loaded, on the CPU
GROWTH = 24 * 2**20  # what a process takes once it computes: compiled kernels, threads, the heap's gaps


@dataclass(frozen=True)
class RunPlan:
    """The memory of a run, by phase.

    Attributes:
        phases: in the order in which the run has them.
        device: "cuda" or "cpu".
        aside: bytes that are taken beside the tensors: the CUDA context, or on the CPU the process itself.
        before: what was measured before the plan was made; a peak is no less.
    """

    phases: tuple[Phase, ...]
    device: str
    aside: int
    before: int = 0

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.plan.peak)

    @property
    def peak(self) -> int:
        """What a run measures as its peak: on CUDA `torch.cuda.max_memory_allocated`, on the CPU the whole process."""
        return max(self.before, self.largest.plan.peak + (self.aside if self.device == "cpu" else 0))

    @property
    def needed(self) -> int:
        """What the device has to have: on CUDA with what the allocator keeps in hand, and the context."""
        return max(phase.plan.reserved for phase in self.phases) + self.aside

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; all figures in bytes."""
        return {
            "device": self.device,
            "peak": self.peak,
            "needed": self.needed,
            "aside": self.aside,
            "phase": self.largest.name,
            "parts": dict(self.largest.plan.parts),
            "phases": {
                phase.name: {"peak": phase.plan.peak, "reserved": phase.plan.reserved, "parts": dict(phase.plan.parts)}
                for phase in self.phases
            },
        }


def plan_run(
    config: DreamBoothConfig, model: Blueprint, *, device: str = "cuda", card: Card | None = None, texts: int = 1
) -> RunPlan:
    """The plan of a run with this config.

    Args:
        config: as `resolved` gives it.
        model: see `train.plan_models.blueprint`.
        card: the card it is for, where it is known.
        texts: how many different texts a batch may have.
    """
    cublas = CUBLAS_HOPPER if card is not None and card.hopper else CUBLAS
    phases = phases_of(config, model, Situation(device, cublas, texts))
    return RunPlan(tuple(phases), device, CONTEXT if device == "cuda" else PROCESS)


def resolved(config: DreamBoothConfig, model: Blueprint, *, device: str, card: Card | None = None) -> DreamBoothConfig:
    """The config with its defaults filled in as the run would do it on that device or card.

    Raises:
        ConfigError: a resolution that the model cannot have.
    """
    from train.dreambooth import resolve

    precision = config.mixed_precision
    if precision == "auto":
        precision = "no" if device == "cpu" else "bf16" if card is None or card.bf16 else "fp16"
    return resolve(replace(config, mixed_precision=precision), model.pipe(model.modules), 1)


def plan_of_run(
    config: DreamBoothConfig, pipe: Any, device: torch.device, meter: MemoryMeter, *, texts: int = 1, drawn: bool = True
) -> RunPlan:
    """The plan of a run whose pipeline is loaded.

    Args:
        meter: on the CPU it says what the process takes as it is, base weights included; the plan goes on from there.
        texts: how many different texts a batch may have.
        drawn: whether class pictures are missing and will be drawn.
    """
    model = of_pipeline(pipe, config.pretrained_model_name_or_path)
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    kind = "cuda" if device.type == "cuda" else "cpu"
    situation = Situation(kind, CUBLAS_HOPPER if hopper else CUBLAS, texts, missing_class_pictures=drawn)
    phases = phases_of(config, model, situation)
    aside = CONTEXT if kind == "cuda" else max(0, meter.now() - phases[0].plan.peak) + GROWTH
    return RunPlan(tuple(phases), kind, aside, meter.peak())


__all__ = ["PARTS", "RunPlan", "plan_of_run", "plan_run", "resolved"]
