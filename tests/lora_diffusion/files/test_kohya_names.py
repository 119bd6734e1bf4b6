"""kohya's module names, over every weight of the real architectures (on the meta device: names only)."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_diffusion.components import canonical_path
from lora_diffusion.files.kohya_names import parse, spell

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {
    "SD1.5": {"cross_attention_dim": 768},
    "SD2.1": {"cross_attention_dim": 1024, "use_linear_projection": True},
    "SDXL": SDXL,
}
OPEN_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def linears_and_convolutions(module: nn.Module) -> list[str]:
    return [path for path, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d) and path]


def unet_paths(family: str) -> list[str]:
    with torch.device("meta"):
        return linears_and_convolutions(UNet2DConditionModel(**UNETS[family]))


@pytest.mark.parametrize("family", UNETS)
def test_every_name_of_a_unet_comes_back(family: str) -> None:
    """Under diffusers' names, as kohya has them for SD1 and SD2, and under those that we write for the family."""
    paths = unet_paths(family)
    assert len(paths) > 250
    for path in paths:
        assert parse("lora_unet_" + path.replace(".", "_")) == ("unet", path)
        name = spell("unet", path, sdxl=family == "SDXL")
        assert name is not None
        assert parse(name) == ("unet", path)
    assert len({spell("unet", path, sdxl=family == "SDXL") for path in paths}) == len(paths)


@pytest.mark.parametrize(
    ("component", "sdxl", "prefix"),
    [("text_encoder", False, "lora_te_"), ("text_encoder", True, "lora_te1_"), ("text_encoder_2", True, "lora_te2_")],
)
def test_every_name_of_a_text_encoder_comes_back(component: str, sdxl: bool, prefix: str) -> None:
    """Whatever the installed transformers calls the modules, the name has `text_model_` and so has the path."""
    with torch.device("meta"):
        if component == "text_encoder":
            model: nn.Module = CLIPTextModel(CLIPTextConfig())
        else:
            model = CLIPTextModelWithProjection(CLIPTextConfig(**OPEN_CLIP_G))
    paths = linears_and_convolutions(model)
    assert len(paths) >= 72
    for path in paths:
        wanted = canonical_path(component, path)
        name = spell(component, path, sdxl)
        assert name == prefix + wanted.replace(".", "_")
        assert parse(name) == (component, wanted)
        assert parse(prefix + path.replace(".", "_")) == (component, wanted)


@pytest.mark.parametrize(
    ("sgm", "path"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks_2_0_emb_layers_1", "down_blocks.0.resnets.1.time_emb_proj"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_4_0_skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("input_blocks_8_1_proj_in", "down_blocks.2.attentions.1.proj_in"),
        ("middle_block_0_out_layers_3", "mid_block.resnets.0.conv2"),
        (
            "middle_block_1_transformer_blocks_9_ff_net_0_proj",
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
        ),
        ("middle_block_2_in_layers_2", "mid_block.resnets.1.conv1"),
        (
            "output_blocks_0_1_transformer_blocks_3_attn2_to_out_0",
            "up_blocks.0.attentions.0.transformer_blocks.3.attn2.to_out.0",
        ),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_5_1_proj_out", "up_blocks.1.attentions.2.proj_out"),
        ("output_blocks_8_0_out_layers_3", "up_blocks.2.resnets.2.conv2"),
        ("time_embed_0", "time_embedding.linear_1"),
        ("time_embed_2", "time_embedding.linear_2"),
        ("label_emb_0_0", "add_embedding.linear_1"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("out_2", "conv_out"),
    ],
)
def test_sdxl_has_the_names_of_stabilitys_code(sgm: str, path: str) -> None:
    """Worked out by hand from the layout: levels 0, 1, 2 with two resnets each, attention at levels 1 and 2."""
    assert parse(f"lora_unet_{sgm}") == ("unet", path)
    assert spell("unet", path, sdxl=True) == f"lora_unet_{sgm}"


@pytest.mark.parametrize(
    ("sgm", "path"),
    [
        ("input_blocks_1_1_proj_in", "down_blocks.0.attentions.0.proj_in"),
        ("input_blocks_9_0_op", "down_blocks.2.downsamplers.0.conv"),
        ("input_blocks_11_0_in_layers_2", "down_blocks.3.resnets.1.conv1"),
        ("output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),
        (
            "output_blocks_3_1_transformer_blocks_0_attn1_to_q",
            "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("output_blocks_11_1_proj_out", "up_blocks.3.attentions.2.proj_out"),
    ],
)
def test_the_four_levels_of_sd1_in_stabilitys_names(sgm: str, path: str) -> None:
    assert parse(f"lora_unet_{sgm}") == ("unet", path)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("lycoris_unet_mid_block_attentions_0_proj_in", ("unet", "mid_block.attentions.0.proj_in")),
        ("lycoris_te_text_model_encoder_layers_0_mlp_fc1", ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")),
        ("lora_te2_encoder_layers_0_mlp_fc1", ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1")),
        ("lora_te2_text_projection", ("text_encoder_2", "text_projection")),
        ("lora_unet_down_blocks.0.resnets.0.conv1", ("unet", "down_blocks.0.resnets.0.conv1")),
    ],
)
def test_other_spellings(name: str, place: tuple[str, str]) -> None:
    assert parse(name) == place


@pytest.mark.parametrize(
    "name",
    [
        "",
        "unet_mid_block_attentions_0_proj_in",
        "lora_unet_",
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_mid_block_attentions_0_proj_inn",
        "lora_unet_mid_block_attentions_0_proj_in_",
        "lora_unet_mid_block__attentions_0",
        "lora_unet_mid_block_attentions_00_proj_in",
        "lora_unet_mid_block_attentions_²_proj_in",
        "lora_unet_input_blocks_0_1_proj_in",
        "lora_unet_input_blocks_3_1_proj_in",
        "lora_unet_input_blocks_99_1_proj_in",
        "lora_unet_input_blocks_1_0_to_q",
        "lora_unet_middle_block_3_proj_in",
        "lora_te_text_model_embeddings_token_embedding",
        "lora_te_q_proj_proj_in",
    ],
)
def test_unknown_names(name: str) -> None:
    assert parse(name) is None


@pytest.mark.parametrize(
    ("component", "path", "sdxl"),
    [
        ("transformer", "proj_in", False),
        ("model", "proj_in", False),
        ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", False),
        ("text_encoder", "text_model.embeddings.token_embedding", False),
        ("unet", "mid_block.attentions.0.own_thing", False),
        ("unet", "mid_block_attentions.0.proj_in", False),
        ("unet", "down_blocks.3.resnets.0.conv1", True),
        ("unet", "down_blocks.1.attentions.2.proj_in", True),
        ("unet", "mid_block.attentions.1.proj_in", True),
    ],
)
def test_what_has_no_name(component: str, path: str, sdxl: bool) -> None:
    assert spell(component, path, sdxl) is None
