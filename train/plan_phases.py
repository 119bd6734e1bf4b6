"""The phases of a DreamBooth run and what each takes at its peak: the run's own order, with fake tensors.

What is on a GPU when follows `train.dreambooth_run` and `train.preview`: everything once, after loading; the
autoencoder alone while pictures are encoded; what is trained while it is trained; and while pictures are drawn the
denoiser beside the text encoders, then alone, then the autoencoder alone. On the CPU everything stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_diffusion.planning.fake_copy import fake_copy
from lora_diffusion.planning.live_bytes import LiveBytes
from lora_diffusion.planning.plan import (
    OPTIMIZER,
    WEIGHTS,
    Plan,
    checkpoint_activations,
    measure,
    planning,
    state_sizes,
)
from lora_diffusion.planning.workspace import CUBLAS
from train.buckets import bucket_sizes
from train.dreambooth_config import DreamBoothConfig, learns_text, optimizer_name
from train.dreambooth_learn import build_learner
from train.families import Prompts
from train.latents import ENCODE_BATCH
from train.models import PRECISIONS
from train.packed import can_be_packed, packed_sizes, packs
from train.plan_models import Blueprint

LOADING, CLASS_PICTURES, ENCODING, TRAINING, PREVIEWS, SAVING = PHASES = (
    "loading", "class pictures", "encoding", "training", "previews", "saving",
)  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """A stretch of a run and the memory at its peak."""

    name: str
    plan: Plan


@dataclass(frozen=True)
class Situation:
    """What a plan has to know beside the settings.

    Attributes:
        device: "cuda" or "cpu".
        cublas: bytes of cuBLAS's workspaces; Hopper's are larger.
        texts: how many different texts a batch may have.
        pictures: pictures to encode at once at the most.
        missing_class_pictures: whether class pictures will be drawn.
    """

    device: str = "cuda"
    cublas: int = CUBLAS
    texts: int = 1
    pictures: int = ENCODE_BATCH
    missing_class_pictures: bool = True


def phases_of(config: DreamBoothConfig, model: Blueprint, situation: Situation) -> list[Phase]:
    """All phases that a run with this config has, in order.

    config: resolved (resolution, mixed_precision); see `train.plan.resolved`.
    model: on the meta device; or real, then with its own precision and quantisation.
    """
    with planning() as mode:
        work = _Work(config, model, situation, mode)
        makers: dict[str, Callable[[], Plan]] = {LOADING: work.loading}
        pictures = config.with_prior_preservation and config.prior_mode == "pictures"
        if pictures and situation.missing_class_pictures:
            makers[CLASS_PICTURES] = work.class_pictures
        makers |= {ENCODING: work.encoding, TRAINING: work.training}
        if config.validation_prompt is not None:
            makers[PREVIEWS] = work.previews
        makers[SAVING] = work.saving
        return [Phase(name, make()) for name, make in makers.items()]


class _Work:
    """Fake copies of the modules, and the phases run with them."""

    def __init__(self, config: DreamBoothConfig, model: Blueprint, situation: Situation, mode: Any) -> None:
        self.config, self.model, self.situation, self.mode = config, model, situation, mode
        self.family = model.family
        self.real = any(not p.is_meta for p in model.modules[self.family.denoiser].parameters())
        self.precision = PRECISIONS[config.mixed_precision]
        self.side = config.resolution or model.native
        self.on_gpu = situation.device == "cuda"
        self.modules = self._fakes(self.precision)
        self.pipe = model.pipe(self.modules)
        self.vae = self._vae(torch.float32)
        self.learned: list[nn.Parameter] = []
        self.packed: list[int] = []  # frozen convolutions' other layouts, which training on the CPU makes

    def loading(self) -> Plan:
        return self._measure(lambda: None, list(self.modules.values()))

    def class_pictures(self) -> Plan:
        wanted = self.config.prior_generation_precision
        count, side = self.config.sample_batch_size, self.model.native
        if wanted is None or PRECISIONS[wanted] == self.precision:
            return self._draw(self.pipe, count, side, self.precision)
        second = self._fakes(PRECISIONS[wanted], own=True)  # a pipeline of its own, beside the first
        first = [module for name, module in self.modules.items() if name != "vae" or not self.on_gpu]
        return self._draw_at_once(self.model.pipe(second), [*first, *second.values()], count, side, PRECISIONS[wanted])

    def encoding(self) -> Plan:
        width, height = self._largest()
        self.vae.use_slicing = self.on_gpu

        def work() -> None:
            with torch.no_grad():
                posterior = self.vae.encode(torch.empty(self.situation.pictures, 3, height, width)).latent_dist
                _ = posterior.mean, posterior.std

        others = [module for name, module in self.modules.items() if name != "vae"]
        return self._measure(work, [self.vae] if self.on_gpu else [*others, self.vae])

    def training(self) -> Plan:
        config, family = self.config, self.family
        self._add_adapter()
        denoiser = self.modules[family.denoiser]
        trained = [self.modules[name] for name in family.trained(text_encoders=learns_text(config))]
        for module in trained:
            module.train()
            if config.gradient_checkpointing:
                checkpoint_activations(module)
        size, channels = config.train_batch_size, denoiser.config.in_channels
        factor, (width, height) = self.model.scale, self._largest()
        kept = None
        if not learns_text(config):
            with self.mode, LiveBytes(), torch.no_grad():
                kept = self._states(self.pipe, size, height, width)
        if config.gradient_accumulation_steps > 1 or config.with_prior_preservation:
            with self.mode:  # what the micro-batch before has left
                for parameter in self.learned:
                    parameter.grad = torch.empty_like(parameter)

        def work() -> None:
            conditioning = self._states(self.pipe, size, height, width) if kept is None else kept
            noise = torch.empty(size, channels, height // factor, width // factor)
            noisy = torch.empty_like(noise).to(self.precision)
            said = denoiser(noisy, torch.zeros(size, dtype=torch.int64), **conditioning, return_dict=False)[0]
            (said.to(torch.float32) - noise).square().mean(dim=(1, 2, 3)).mean().backward()

        if not self.on_gpu and packs(config):
            self.packed = packed_sizes(denoiser)
        modules = trained if self.on_gpu else list(self.modules.values())
        plan = self._measure(work, modules, blocks=self._moving(), inputs=kept)
        for parameter in self.learned:
            parameter.grad = None
        for module in trained:
            module.eval()
        return plan

    def previews(self) -> Plan:
        count = 1 if self.on_gpu else self.config.num_validation_images
        return self._draw(self.pipe, count, self.side, self.precision)

    def saving(self) -> Plan:
        names = self.family.trained(text_encoders=learns_text(self.config))
        modules = [self.modules[name] for name in names] if self.on_gpu else list(self.modules.values())

        def work() -> None:
            with torch.no_grad():
                shown = [p.detach().clone() for p in self.learned] if self.config.use_ema else []
                finite = torch.stack([parameter.detach().isfinite().all() for parameter in self.learned])
                del shown, finite

        return self._measure(work, modules, blocks=self._moving())

    def _draw(self, pipe: Any, count: int, side: int, precision: torch.dtype) -> Plan:
        """Pictures drawn at once, with classifier-free guidance, by the run's own pipeline."""
        if not self.on_gpu:
            return self._draw_at_once(pipe, list(self.modules.values()), count, side, precision)
        denoiser, encoders = getattr(pipe, self.family.denoiser), [*self.family.encoders_of(pipe).values()]
        vae = self._decoder(pipe)
        vae.use_slicing = True
        kept: dict[str, Any] = {}

        def read() -> None:
            kept.update(self._states(pipe, 2 * count, side, side))

        blocks = self._moving()
        stages = [self._measure(_without_grad(read), [denoiser, *encoders], blocks=blocks)]
        stages.append(
            self._measure(
                _without_grad(lambda: self._denoise(denoiser, kept, count, side, precision)),
                [denoiser], blocks=blocks, inputs=kept,
            )
        )  # fmt: skip
        decode = _without_grad(lambda: self._decode(vae, self._latents(denoiser, count, side, precision)))
        stages.append(self._measure(decode, [vae], blocks=blocks))
        largest = max(stages, key=lambda stage: stage.peak)
        return replace(largest, reserved=max(stage.reserved for stage in stages))

    def _draw_at_once(self, pipe: Any, modules: list[nn.Module], count: int, side: int, precision: torch.dtype) -> Plan:
        """The same with all modules in place."""
        denoiser, vae = getattr(pipe, self.family.denoiser), self._decoder(pipe)
        vae.use_slicing = False

        def work() -> None:
            conditioning = self._states(pipe, 2 * count, side, side)
            self._decode(vae, self._denoise(denoiser, conditioning, count, side, precision))

        modules = [vae if module is pipe.vae else module for module in modules]
        return self._measure(_without_grad(work), modules, blocks=self._moving())

    def _denoise(
        self, denoiser: Any, conditioning: dict[str, Any], count: int, side: int, precision: torch.dtype
    ) -> torch.Tensor:
        latents = self._latents(denoiser, count, side, precision)
        both = torch.cat([latents] * 2)
        said = denoiser(both, torch.zeros((), dtype=torch.int64), **conditioning, return_dict=False)[0]
        plain, guided = said.chunk(2)
        return plain + 7.5 * (guided - plain)

    def _latents(self, denoiser: Any, count: int, side: int, precision: torch.dtype) -> torch.Tensor:
        latent = side // self.model.scale
        return torch.empty(count, denoiser.config.in_channels, latent, latent, dtype=precision)

    def _decode(self, vae: Any, latents: torch.Tensor) -> None:
        dtype = next(parameter.dtype for parameter in vae.parameters())
        (vae.decode(latents.to(dtype), return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1)

    def _decoder(self, pipe: Any) -> Any:
        """The VAE as it decodes: in fp32 where the pipeline upcasts it because it would overflow in fp16."""
        dtype = next(parameter.dtype for parameter in pipe.vae.parameters())
        upcast = dtype == torch.float16 and getattr(pipe.vae.config, "force_upcast", False)
        return self.vae if upcast and self.family.pipeline == "StableDiffusionXLPipeline" else pipe.vae

    def _largest(self) -> tuple[int, int]:
        """Width and height of the largest pictures that are trained on."""
        return max(bucket_sizes(self.config, self.side, self.model.scale), key=lambda size: size[0] * size[1])

    def _measure(
        self, work: Callable[[], None], modules: list[nn.Module], *, blocks: Any = None, inputs: Any = None
    ) -> Plan:
        return measure(
            self.mode, work, modules=modules, learned=self.learned, inputs=inputs, blocks=blocks,
            cublas=self.situation.cublas, device=self.situation.device,
        )  # fmt: skip

    def _moving(self) -> dict[str, list[int]]:
        """What training adds: the optimizer's state, the copy to step back to, the average, packed convolutions."""
        copies = [4 * parameter.numel() for parameter in self.learned] * (2 if self.config.use_ema else 1)
        moving = [*state_sizes(self.learned, optimizer_name(self.config)), *copies]
        return {OPTIMIZER: moving, WEIGHTS: self.packed}

    def _states(self, pipe: Any, rows: int, height: int, width: int) -> dict[str, Any]:
        """The denoiser's keyword arguments for `rows` prompts, from the text encoders as they are."""
        distinct = min(rows, self.situation.texts)
        ids = [
            torch.ones(distinct, self.config.tokenizer_max_length or encoder.config.max_position_embeddings).long()
            for encoder in self.family.encoders_of(pipe).values()
        ]
        prompts = Prompts(["a photo"] * distinct, ids, ids, self.config.text_encoder_use_attention_mask)
        rows_of = torch.zeros(rows, dtype=torch.int64)
        states = {name: one.index_select(0, rows_of) for name, one in self.family.states(pipe, prompts).items()}
        return self.family.conditioning(states, [(height, width, 0, 0, height, width)] * rows)

    def _add_adapter(self) -> None:
        plain: dict[str, Any] = {
            "optimizer": "adamw",
            "use_8bit_adam": False,
            "use_ema": False,
            "placeholder_token": None,
        }
        config = replace(self.config, **plain)
        with self.mode:
            self.learned = [] if config.only_token else build_learner(config, self.pipe, torch.device("cpu")).parameters
            if self.config.placeholder_token is not None:
                for encoder in self.family.encoders_of(self.pipe).values():
                    self.learned.append(_learn_word(encoder, config.num_vectors))

    def _fakes(self, precision: torch.dtype, *, own: bool = False) -> dict[str, nn.Module]:
        """Fake copies of all modules. own: without the run's quantisation."""
        quantize = None if own or self.real else self.config.quantize
        stored = self.family.trained(text_encoders=self.config.train_text_encoder) if quantize else []
        kept = self.real and not own

        def copy_of(name: str, channels_last: bool) -> nn.Module:
            dtype, bits = None if kept else precision, quantize if name in stored else None
            return fake_copy(self.model.modules[name], self.mode, dtype, bits, channels_last=channels_last)

        fakes = {name: copy_of(name, not self.on_gpu and name == "vae") for name in self.model.modules}
        denoiser = self.family.denoiser
        if not self.on_gpu and not any(map(can_be_packed, fakes[denoiser].modules())):
            fakes[denoiser] = copy_of(denoiser, True)
        return fakes

    def _vae(self, dtype: torch.dtype) -> Any:
        return fake_copy(self.model.modules["vae"], self.mode, dtype, channels_last=not self.on_gpu)


def _without_grad(work: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            work()

    return run


def _learn_word(encoder: Any, count: int) -> nn.Parameter:
    """Vectors of a new word at a text encoder: what reads them has a gradient from the embedding on."""
    embedding = encoder.get_input_embeddings()
    vectors = nn.Parameter(torch.empty(count, embedding.embedding_dim))
    embedding.register_parameter("word", vectors)
    embedding.register_forward_hook(lambda module, inputs, rows: rows + vectors.sum(0).to(rows.dtype))
    return vectors
