"""The README.md beside an adapter: what it is, how it was made, how to load it. Hub front matter included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.dreambooth_config import DreamBoothConfig


def dreambooth_card(config: DreamBoothConfig, *, steps: int, samples: list[Path]) -> str:
    """The model card of a DreamBooth run (Markdown). The same run always gives the same card."""
    model = config.pretrained_model_name_or_path
    front = [
        "---",
        "library_name: diffusers",
        "tags: [lora, dreambooth, stable-diffusion, text-to-image]",
    ]
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        front.append(f"base_model: {json.dumps(model)}")
    front += [f"instance_prompt: {json.dumps(config.instance_prompt)}", "---", ""]
    parts = "UNet and text encoder" if config.train_text_encoder else "UNet"
    rows: list[tuple[str, Any]] = [
        ("base model", f"`{model}`"),
        ("prompt", f"`{config.instance_prompt}`"),
        ("class prompt", f"`{config.class_prompt}`" if config.with_prior_preservation else "none"),
        ("adapter", f"LoRA on the {parts}, rank {config.rank}, alpha {config.lora_alpha:g}"),
        ("steps", f"{steps} × batch {config.train_batch_size} × accumulation {config.gradient_accumulation_steps}"),
        ("learning rate", f"{config.learning_rate:g}" + _text_rate(config)),
        ("resolution", f"{config.resolution} px"),
        *_noise_schedule(config),
        ("precision of the base", {"no": "fp32"}.get(config.mixed_precision, config.mixed_precision)),
        ("seed", config.seed),
    ]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    pictures = [f"![preview](samples/{path.name})" for path in samples[:4]]
    return "\n".join(
        [
            *front,
            f"# A LoRA for {config.instance_prompt!r}",
            "",
            *table,
            "",
            *pictures,
            *([""] if pictures else []),
            "```python",
            f"from diffusers import {'DDIMScheduler, ' * config.rescale_betas_zero_snr}DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({_loadable(model)})",
            *_sampler(config),
            'pipe.load_lora_weights(".", weight_name="adapter.safetensors")  # "." is the folder of this file',
            f"pipe({config.instance_prompt!r}).images[0]",
            "```",
            "",
            "Made with lora_diffusion; `config.json` has every setting.",
            "",
        ]
    )


def _text_rate(config: DreamBoothConfig) -> str:
    return f", text encoder {config.text_encoder_lr:g}" if config.train_text_encoder else ""


def _noise_schedule(config: DreamBoothConfig) -> list[tuple[str, Any]]:
    return [("noise schedule", "ends in pure noise (zero-terminal SNR)")] if config.rescale_betas_zero_snr else []


def _sampler(config: DreamBoothConfig) -> list[str]:
    """A model that was trained on a bent schedule has to draw on it, too."""
    if not config.rescale_betas_zero_snr:
        return []
    return [
        "pipe.scheduler = DDIMScheduler.from_config(",
        '    pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False',
        ")",
    ]


def _loadable(model: str) -> str:
    if model == "pocket":
        return '"…/train/_pocket/model"'
    return json.dumps(model)
