"""What a DreamBooth run learns and from what: the adapter in the pipeline, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

import lora_diffusion as ld
from lora_diffusion.layers.virtual_tokens import TokenVectors
from train.dreambooth_config import DreamBoothConfig, optimizer_name
from train.dreambooth_data import Data, Photos
from train.families import family_of
from train.latents import LatentBank, Sample
from train.learner import Group, Learner, OptimizerSettings
from train.noise import perturbation, pyramid
from train.objective import Objective, losses, predicted
from train.optimizers import lora_plus
from train.randomness import Draws, derive_seed
from train.text_states import TextStates
from train.weighting import Weighting


def build_learner(config: DreamBoothConfig, pipe: Any, device: torch.device, processes: int = 1) -> Learner:
    """Put a new adapter into the pipeline and make what trains it, in each of `processes`."""
    targets: str | list[str] = config.target_modules
    if "," in config.target_modules:
        targets = [name.strip() for name in config.target_modules.split(",") if name.strip()]
    lora = ld.LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha or config.rank,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        init_lora_weights=config.init_lora_weights if config.init_lora_weights != "kaiming" else True,
    )
    family = family_of(pipe)
    components = family.trained(text_encoders=config.train_text_encoder)
    configs = {name: replace(lora, exclude_modules=family.unread_layers(pipe, name)) for name in components}
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "adapter"))
    ld.add_adapter(pipe, None if config.only_token else configs, tokens=_words(config), generator=generator)
    factor = config.train_batch_size * config.gradient_accumulation_steps * processes if config.scale_lr else 1
    rates = {
        family.denoiser: config.learning_rate * factor,
        "text_encoder": config.text_encoder_lr * factor,
        "text_encoder_2": (config.text_encoder_2_lr or config.text_encoder_lr) * factor,
    }
    groups = []
    for component, parameters in ld.adapter_parameters(pipe).items():
        names = {id(parameter): name for name, parameter in getattr(pipe, component).named_parameters()}
        named = {names[id(p)]: p for p in parameters}
        vectors = {name: p for name, p in named.items() if name.endswith(".vectors")}
        layers = {name: p for name, p in named.items() if name not in vectors}
        if layers:
            groups += lora_plus(Group(component, layers, rates[component]), config.loraplus_lr_ratio)
        if vectors:
            groups.append(Group(component, vectors, config.token_learning_rate * factor, "word"))
    settings = OptimizerSettings(
        optimizer_name(config),
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        epsilon=config.adam_epsilon,
        schedule=config.lr_scheduler,
        warmup_steps=config.lr_warmup_steps,
        total_steps=config.max_train_steps or 1,
        cycles=config.lr_num_cycles,
        power=config.lr_power,
        ema_decay=config.ema_decay if config.use_ema else None,
        ema_warmup=config.ema_warmup,
    )
    return Learner(groups, settings, scale_gradients=config.mixed_precision == "fp16")


def _words(config: DreamBoothConfig) -> list[ld.TextualInversionConfig]:
    if config.placeholder_token is None:
        return []
    return [ld.TextualInversionConfig(config.placeholder_token, config.initializer_token, config.num_vectors)]


def rest_word(config: DreamBoothConfig, pipe: Any, step: int) -> None:
    """After `step` steps, let the new word's vectors learn on, or rest where their share of the steps is over."""
    resting = step >= config.train_text_encoder_ti_frac * (config.max_train_steps or 1)
    for encoder in family_of(pipe).encoders_of(pipe).values() if config.placeholder_token is not None else ():
        for module in encoder.modules():
            if isinstance(module, TokenVectors):
                module.vectors.requires_grad_(not resting)


class BatchLoss:
    """From the position of a micro-batch to its losses.

    A micro-batch holds `train_batch_size` photos; with prior preservation as many class pictures follow it, as a batch
    of their own, so that they take no memory on top. With the base as teacher, the same photos come again under the
    class prompt, and what the model says of them is to stay what the base says. Sample number k of the run is the same
    however samples are grouped, so accumulation equals a bigger batch up to rounding.
    """

    def __init__(
        self,
        config: DreamBoothConfig,
        unet: Any,
        objective: Objective,
        data: Data,
        texts: TextStates,
        device: torch.device,
        *,
        base: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`base` is a context within which the models are what they were without the adapter."""
        self.config, self.unet, self.data, self.texts, self.device = config, unet, data, texts, device
        self.objective = objective.to(device)
        self.weighting = weighting_of(config)
        self.draws = Draws(config.seed)
        self.base = base

    def __call__(self, position: int) -> Iterator[torch.Tensor]:
        """Scalars with a graph each, whose sum is the loss of micro-batch `position`; backward goes between them."""
        size = self.config.train_batch_size
        photos = self._samples(self.data.instance, position, size)
        yield self._mean(photos, "instance", position)
        weight = self.config.prior_loss_weight
        if self.config.prior_mode == "teacher":
            again = [replace(sample, caption=self.config.class_prompt or "") for sample in photos]
            yield weight * self._mean(again, "instance", position, taught=True)
        elif self.data.prior is not None:
            yield weight * self._mean(self._samples(self.data.prior, position, size), "prior", position)

    def _mean(self, samples: list[Sample], stream: str, position: int, *, taught: bool = False) -> torch.Tensor:
        latents = torch.stack([sample.latents for sample in samples]).to(self.device)
        noise = torch.stack([sample.noise for sample in samples]).to(self.device)
        times = self.objective.times(torch.tensor([sample.timestep for sample in samples], device=self.device))
        captions, sizes = [sample.caption for sample in samples], [sample.sizes for sample in samples]
        extra = None
        if self.config.input_perturbation:
            first = position * len(samples)
            extra = perturbation(self.draws, stream, first, noise, self.config.input_perturbation)
        said_by_base = None
        if taught:
            with torch.no_grad(), self.base():
                shown = self.objective.noised(latents, noise if extra is None else noise + extra, times)
                said_by_base = predicted(self.unet, self.objective, shown, times, self.texts.states(captions, sizes))
        each = losses(
            self.unet,
            self.objective,
            latents,
            noise,
            times,
            self.texts.states(captions, sizes),
            weighting=self.weighting,
            masks=None if taught else self._masks(samples),
            perturbation=extra,
            target=said_by_base,
        )
        return each.mean()

    def _masks(self, samples: list[Sample]) -> torch.Tensor | None:
        """(batch, 1, height, width) fp32. Photos have masks or have none, all of them."""
        masks = [sample.mask for sample in samples if sample.mask is not None]
        return torch.stack(masks).to(self.device) if masks else None

    def _samples(self, bank: LatentBank, position: int, size: int) -> list[Sample]:
        numbers = range(position * size, (position + 1) * size)
        return [self._coarser(bank.stream, number, self._drawn(bank, number)) for number in numbers]

    def _drawn(self, bank: LatentBank, number: int) -> Sample:
        return bank.draw(self.draws, number, len(self.objective), self.config.noise_offset)

    def _coarser(self, stream: str, number: int, sample: Sample) -> Sample:
        levels, discount = self.config.multires_noise_iterations, self.config.multires_noise_discount
        if not levels:
            return sample
        generator = self.draws.at(f"{stream}/multires", number)
        return replace(sample, noise=pyramid(sample.noise, generator, levels, discount))


def advice(config: DreamBoothConfig) -> list[str]:
    """Warnings about settings that can be meant, but seldom are."""
    if config.optimizer == "prodigy" and config.learning_rate < 0.1:
        return [
            "--optimizer prodigy finds the learning rate by itself and multiplies it by --learning_rate, "
            f"{config.learning_rate:g} here; 1 is usual"
        ]
    return []


def rank_beyond_width(pipe: Any) -> str | None:
    """A warning where the adapter's rank is more than some of its layers are wide; None where it is not."""
    widths = {
        f"{component}.{path}": min(layer.a[0].numel(), layer.b.shape[0])
        for component, layers in ld.get_adapter(pipe).components.items()
        for path, layer in layers.items()
        if layer.rank > min(layer.a[0].numel(), layer.b.shape[0])
    }
    if not widths:
        return None
    name = min(widths, key=lambda name: widths[name])
    return (
        f"--rank is more than {len(widths)} of the adapted layers are wide ({name} is {widths[name]}): beyond that it "
        "only makes the file larger"
    )


def weighting_of(config: DreamBoothConfig) -> Weighting:
    """How errors count in a run."""
    return Weighting(
        config.snr_gamma,
        config.soft_min_snr,
        config.debiased_estimation_loss,
        config.loss_type,
        config.huber_c,
        config.huber_schedule,
    )


def text_states(config: DreamBoothConfig, pipe: Any, photos: Photos | None = None) -> TextStates:
    """The states of a run's prompts and captions. A validation prompt is not among them, but is checked like them.

    Raises:
        ConfigError: a prompt is too long.
        DatasetError: a caption is.
    """
    if config.validation_prompt is not None:
        TextStates(pipe).add([config.validation_prompt])
    texts = TextStates(
        pipe, max_length=config.tokenizer_max_length, use_mask=config.text_encoder_use_attention_mask,
        resolution=config.resolution,
    )  # fmt: skip
    texts.add([config.instance_prompt, *([config.class_prompt or ""] if config.with_prior_preservation else [])])
    if photos is not None:
        photos.add_texts(texts)
    return texts
