"""Well-known architectures as data, so that a plan needs no file: where they differ from their classes' defaults.

Sources: the config.json files of stable-diffusion-v1-5, stable-diffusion-2-1, stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from typing import Any

Component = tuple[str, str, dict[str, Any]]  # library, class, config

_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512,
}
_CLIP_L: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768,
}  # fmt: skip

# name → pipeline class, {component: what it is}, what its index says beside that
ARCHITECTURES: dict[str, tuple[str, dict[str, Component], dict[str, Any]]] = {
    "sd15": (
        "StableDiffusionPipeline",
        {
            "unet": (
                "diffusers",
                "UNet2DConditionModel",
                {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
            ),
            "vae": ("diffusers", "AutoencoderKL", _VAE),
            "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
        },
        {},
    ),
    "sd21": (
        "StableDiffusionPipeline",
        {
            "unet": (
                "diffusers",
                "UNet2DConditionModel",
                {
                    "sample_size": 96,
                    "cross_attention_dim": 1024,
                    "attention_head_dim": (5, 10, 20, 20),
                    "use_linear_projection": True,
                },
            ),
            "vae": ("diffusers", "AutoencoderKL", {**_VAE, "sample_size": 768}),
            "text_encoder": (
                "transformers",
                "CLIPTextModel",
                {
                    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
                    "projection_dim": 512, "hidden_act": "gelu",
                },
            ),
        },
        {},
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {
            "unet": (
                "diffusers",
                "UNet2DConditionModel",
                {
                    "sample_size": 128,
                    "block_out_channels": (320, 640, 1280),
                    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                    "transformer_layers_per_block": (1, 2, 10),
                    "attention_head_dim": (5, 10, 20),
                    "cross_attention_dim": 2048,
                    "use_linear_projection": True,
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": 2816,
                },
            ),
            "vae": ("diffusers", "AutoencoderKL", {**_VAE, "sample_size": 1024, "force_upcast": True}),
            "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
            "text_encoder_2": (
                "transformers",
                "CLIPTextModelWithProjection",
                {
                    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
                    "projection_dim": 1280, "hidden_act": "gelu",
                },
            ),
        },
        {"force_zeros_for_empty_prompt": True},
    ),
}  # fmt: skip
