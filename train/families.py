"""Families of models: what a pipeline is made of and how it reads a prompt.

All of `train` that differs between families is in one entry of `FAMILIES` each. What a model learns to say follows from
its scheduler, not from here: see `train.objective.objective_of`, which knows flows, too. A new entry (SD3, Flux) needs

* `pipeline`, its class in diffusers, and with `options` what that is to be loaded without;
* `denoiser`, "transformer" there, and `text_encoders`, each with its tokenizer (SD3 has a third, a T5);
* `states`, from tokens to tensors with one row for each prompt. They are kept for the whole run where the encoders are
  frozen, so whatever depends on the picture is left to
* `conditioning`, from those rows and the sizes of the pictures to the denoiser's keyword arguments beside latents and
  time (SD3: `encoder_hidden_states` and `pooled_projections`; Flux also the places of its patches, and guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_diffusion.errors import ConfigError

Sizes = tuple[int, int, int, int, int, int]  # original height and width, top, left, target height and width


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a pipeline.

    Attributes:
        component, tokenizer: names of the pipeline's attributes.
        unread: how many of its last layers do not reach the denoiser; an adapter there would never learn.
    """

    component: str
    tokenizer: str
    unread: int = 0


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts.

    Attributes:
        texts: as they were written.
        ids: for each text encoder (prompts, tokens).
        masks: the masks of the padding, likewise.
        use_masks: give them to the encoders, also where the family goes without.
    """

    texts: Sequence[str]
    ids: Sequence[torch.Tensor]
    masks: Sequence[torch.Tensor]
    use_masks: bool = False


@dataclass(frozen=True)
class Family:
    """See the head of this file."""

    title: str
    pipeline: str
    denoiser: str
    text_encoders: tuple[TextEncoder, ...]
    states: Callable[[Any, Prompts], dict[str, torch.Tensor]]
    conditioning: Callable[[dict[str, torch.Tensor], Sequence[Sizes]], dict[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)

    def denoiser_of(self, pipe: Any) -> Any:
        return getattr(pipe, self.denoiser)

    def encoders_of(self, pipe: Any) -> dict[str, Any]:
        """{"text_encoder": module, …} in the family's order."""
        return {one.component: getattr(pipe, one.component) for one in self.text_encoders}

    def trained(self, *, text_encoders: bool) -> list[str]:
        """The names of the components that get an adapter, the denoiser first."""
        return [self.denoiser, *([one.component for one in self.text_encoders] if text_encoders else [])]

    def unread_layers(self, pipe: Any, component: str) -> str | None:
        """A regex for the modules of a text encoder that do not reach the denoiser; None where all do."""
        unread = next((one.unread for one in self.text_encoders if one.component == component), 0)
        if not unread:
            return None
        count = getattr(pipe, component).config.num_hidden_layers
        return rf"(.*\.)?layers\.({'|'.join(str(count - 1 - back) for back in range(unread))})\..*"


def family_of(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        ConfigError: it is of none that is known.
    """
    for kind in type(pipe).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    raise ConfigError(f"a {type(pipe).__name__} is not supported; {supported()} are")


def supported() -> str:
    return " and ".join(f"{family.title} ({family.pipeline})" for family in FAMILIES.values())


def _last_states(pipe: Any, prompts: Prompts) -> dict[str, torch.Tensor]:
    """Stable Diffusion reads what its encoder says last."""
    encoder = pipe.text_encoder
    masked = prompts.use_masks or getattr(encoder.config, "use_attention_mask", False)
    return {"encoder_hidden_states": encoder(prompts.ids[0], attention_mask=prompts.masks[0] if masked else None)[0]}


def _as_they_are(states: dict[str, torch.Tensor], sizes: Sequence[Sizes]) -> dict[str, Any]:
    return states


def _penultimate_states(pipe: Any, prompts: Prompts) -> dict[str, torch.Tensor]:
    """SDXL reads the layer before the last of both encoders, side by side, and the pooled text of the second
    (Podell et al., 2023, section 2.1).

    The empty prompt is all zeros where the pipeline's config says so: that is how these models learned to do without a
    prompt, and what they are shown while drawing.
    """
    said = [
        encoder(ids, attention_mask=mask if prompts.use_masks else None, output_hidden_states=True)
        for encoder, ids, mask in zip((pipe.text_encoder, pipe.text_encoder_2), prompts.ids, prompts.masks)
    ]
    hidden = torch.cat([one.hidden_states[-2] for one in said], dim=-1)
    pooled = said[-1].text_embeds
    if pipe.config.force_zeros_for_empty_prompt and not all(prompts.texts):
        keep = torch.tensor([float(bool(text)) for text in prompts.texts], dtype=hidden.dtype, device=hidden.device)
        hidden, pooled = hidden * keep[:, None, None], pooled * keep[:, None]
    return {"encoder_hidden_states": hidden, "text_embeds": pooled}


def _with_sizes(states: dict[str, torch.Tensor], sizes: Sequence[Sizes]) -> dict[str, Any]:
    """SDXL is told how large a picture was, what was cut off and how large it is (the paper's section 2.2)."""
    pooled = states["text_embeds"]
    times = torch.tensor(list(sizes), dtype=torch.float32, device=pooled.device)
    return {
        "encoder_hidden_states": states["encoder_hidden_states"],
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times},
    }


FAMILIES = {
    family.pipeline: family
    for family in (
        Family(
            title="Stable Diffusion 1.x and 2.x",
            pipeline="StableDiffusionPipeline",
            denoiser="unet",
            text_encoders=(TextEncoder("text_encoder", "tokenizer"),),
            states=_last_states,
            conditioning=_as_they_are,
            options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        ),
        Family(
            title="Stable Diffusion XL",
            pipeline="StableDiffusionXLPipeline",
            denoiser="unet",
            text_encoders=(
                TextEncoder("text_encoder", "tokenizer", unread=1),
                TextEncoder("text_encoder_2", "tokenizer_2"),
            ),
            states=_penultimate_states,
            conditioning=_with_sizes,
            # The watermark would get into class pictures, and from there into the adapter.
            options={"image_encoder": None, "feature_extractor": None, "add_watermarker": False},
        ),
    )
}
