"""What a DreamBooth run learns and from what: the adapter in the pipeline, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import lora_diffusion as ld
from train.dreambooth_config import DreamBoothConfig
from train.dreambooth_data import Data
from train.latents import LatentBank, Sample
from train.learner import Group, Learner, OptimizerSettings
from train.objective import NoiseSchedule, losses
from train.randomness import Draws, derive_seed
from train.text_states import TextStates


def build_learner(config: DreamBoothConfig, pipe: Any, device: torch.device) -> Learner:
    """Put a new adapter into the pipeline and make what trains it."""
    targets: str | list[str] = config.target_modules
    if "," in config.target_modules:
        targets = [name.strip() for name in config.target_modules.split(",") if name.strip()]
    lora = ld.LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha or config.rank,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
    )
    components = ["unet", "text_encoder"] if config.train_text_encoder else ["unet"]
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "adapter"))
    ld.add_adapter(pipe, dict.fromkeys(components, lora), generator=generator)
    factor = config.train_batch_size * config.gradient_accumulation_steps if config.scale_lr else 1
    rates = {"unet": config.learning_rate * factor, "text_encoder": config.text_encoder_lr * factor}
    groups = []
    for component, parameters in ld.adapter_parameters(pipe).items():
        names = {id(parameter): name for name, parameter in getattr(pipe, component).named_parameters()}
        groups.append(Group(component, {names[id(p)]: p for p in parameters}, rates[component]))
    settings = OptimizerSettings(
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        epsilon=config.adam_epsilon,
        eight_bit=config.use_8bit_adam,
        schedule=config.lr_scheduler,
        warmup_steps=config.lr_warmup_steps,
        total_steps=config.max_train_steps or 1,
        cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    return Learner(groups, settings, scale_gradients=config.mixed_precision == "fp16")


class BatchLoss:
    """From the position of a micro-batch to its losses.

    A micro-batch holds `train_batch_size` photos; with prior preservation as many class pictures follow it, as a batch
    of their own, so that they take no memory on top. Sample number k of the run is the same however samples are
    grouped, so accumulation equals a bigger batch up to rounding.
    """

    def __init__(
        self,
        config: DreamBoothConfig,
        unet: Any,
        schedule: NoiseSchedule,
        data: Data,
        texts: TextStates,
        device: torch.device,
    ) -> None:
        self.config, self.unet, self.data, self.texts, self.device = config, unet, data, texts, device
        self.schedule = schedule.to(device)
        self.draws = Draws(config.seed)

    def __call__(self, position: int) -> Iterator[torch.Tensor]:
        """Scalars with a graph each, whose sum is the loss of micro-batch `position`; backward goes between them."""
        size = self.config.train_batch_size
        yield self._mean(self._samples(self.data.instance, position, size))
        if self.data.prior is not None:
            yield self.config.prior_loss_weight * self._mean(self._samples(self.data.prior, position, size))

    def _mean(self, samples: list[Sample]) -> torch.Tensor:
        each = losses(
            self.unet,
            self.schedule,
            torch.stack([sample.latents for sample in samples]).to(self.device),
            torch.stack([sample.noise for sample in samples]).to(self.device),
            torch.tensor([sample.timestep for sample in samples], device=self.device),
            self.texts.states([sample.caption for sample in samples]),
            snr_gamma=self.config.snr_gamma,
        )
        return each.mean()

    def _samples(self, bank: LatentBank, position: int, size: int) -> list[Sample]:
        return [
            bank.draw(self.draws, position * size + row, len(self.schedule), self.config.noise_offset)
            for row in range(size)
        ]


def text_states(config: DreamBoothConfig, pipe: Any) -> TextStates:
    """The states of a run's prompts. A validation prompt is not among them, but is checked along with them.

    Raises:
        ConfigError: one of them is too long.
    """
    if config.validation_prompt is not None:
        TextStates(pipe).add([config.validation_prompt])
    texts = TextStates(pipe, max_length=config.tokenizer_max_length, use_mask=config.text_encoder_use_attention_mask)
    texts.add([config.instance_prompt, *([config.class_prompt or ""] if config.with_prior_preservation else [])])
    return texts
