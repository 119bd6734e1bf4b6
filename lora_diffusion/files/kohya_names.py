"""kohya's module names: a module's path with its dots turned into underscores, behind a prefix for its component.

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
    unet      down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q

The underscores are undone with the words that occur in diffusers' UNets and in CLIP, the longest first. No model and no
other name of the file is needed.

For SDXL the UNet's modules carry the names that they have in Stability's own code (sgm), which counts all blocks
through. Stable Diffusion 1, 2 and XL alike have two resnets and one change of size per level, so one reckoning holds
for all: input block n ≥ 1 is level (n-1) // 3, entry (n-1) % 3, and the third entry is the downsampler; output block n
is level n // 3, resnet n % 3. Within a block, entry 0 is the resnet and 1 the attention; the upsampler, which comes
last (1, or 2 after an attention, as always in SDXL), is known by its `conv`.
"""

from __future__ import annotations

import re

from ..components import canonical_path

UNET = "unet"
TEXT = "text_encoder"
TEXT_2 = "text_encoder_2"

# lora_te_ is Stable Diffusion 1 and 2, whose only text encoder it is; lycoris_ is how LyCORIS names what it wraps.
PREFIXES = {
    "lora_unet_": UNET,
    "lora_te_": TEXT,
    "lora_te1_": TEXT,
    "lora_te2_": TEXT_2,
    "lycoris_unet_": UNET,
    "lycoris_te_": TEXT,
    "lycoris_te1_": TEXT,
    "lycoris_te2_": TEXT_2,
}

_SD1_PREFIXES = {UNET: "lora_unet_", TEXT: "lora_te_"}

_UNET_WORDS = (
    "conv_in time_embedding add_embedding class_embedding linear_1 linear_2 conv_norm_out conv_out "
    "down_blocks mid_block up_blocks resnets attentions downsamplers upsamplers "
    "norm norm1 norm2 norm3 conv conv1 conv2 conv_shortcut time_emb_proj "
    "proj_in proj_out transformer_blocks attn1 attn2 to_q to_k to_v to_out ff net proj"
)
_TEXT_WORDS = (
    "text_model encoder layers self_attn q_proj k_proj v_proj out_proj layer_norm1 layer_norm2 mlp fc1 fc2 "
    "final_layer_norm text_projection"
)
_NUMBER = "(?:0|[1-9][0-9]{0,2})"

_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MODULES = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
    **{f"input_blocks_{3 * n + 3}_0_op": f"down_blocks.{n}.downsamplers.0.conv" for n in range(3)},
    **{f"output_blocks_{3 * n + 2}_{i}_conv": f"up_blocks.{n}.upsamplers.0.conv" for n in range(3) for i in (1, 2)},
}
_KINDS = ("resnets", "attentions")
_PARTS = {
    "middle_block_0": "mid_block.resnets.0",
    "middle_block_1": "mid_block.attentions.0",
    "middle_block_2": "mid_block.resnets.1",
    **{
        f"input_blocks_{3 * n + i + 1}_{k}": f"down_blocks.{n}.{kind}.{i}"
        for n in range(4)
        for i in range(2)
        for k, kind in enumerate(_KINDS)
    },
    **{
        f"output_blocks_{3 * n + i}_{k}": f"up_blocks.{n}.{kind}.{i}"
        for n in range(4)
        for i in range(3)
        for k, kind in enumerate(_KINDS)
    },
}
_INSIDE_SGM = re.compile(r"((?:in|out)put_blocks_[0-9]+_[01]|middle_block_[012])_(.+)")
_INSIDE = re.compile(r"((?:(?:down|up)_blocks\.[012]|mid_block)\.(?:resnets|attentions)\.[012])\.(.+)")


def parse(name: str) -> tuple[str, str] | None:
    """(component, module path) of a module's name, or None where it is no name that is known.

    Names whose dots were left in are taken as well.
    """
    name = name.replace(".", "_")
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None:
        return None
    component, flat = PREFIXES[prefix], name.removeprefix(prefix)
    path = _unet_path(flat) if component == UNET else _unflattened(flat, _TEXT)
    return None if path is None else (component, canonical_path(component, path))


def spell(component: str, path: str, sdxl: bool) -> str | None:
    """The name that kohya's tools give the module; None where they have none for it.

    sdxl: whether the adapter is for Stable Diffusion XL, whose names are others. `parse` of the name gives the path.
    """
    prefixes = {UNET: "lora_unet_", TEXT: "lora_te1_", TEXT_2: "lora_te2_"} if sdxl else _SD1_PREFIXES
    path = canonical_path(component, path)
    flat = _sgm_name(path) if sdxl and component == UNET else path.replace(".", "_")
    name = f"{prefixes.get(component)}{flat}"
    return name if parse(name) == (component, path) else None


def _grammar(words: str) -> re.Pattern[str]:
    """One step: a known word or a number, up to the next underscore or the end."""
    return re.compile(rf"({'|'.join(sorted(words.split(), key=len, reverse=True))}|{_NUMBER})(?:_|$)")


_UNET = _grammar(_UNET_WORDS)
_TEXT = _grammar(_TEXT_WORDS)


def _unflattened(flat: str, grammar: re.Pattern[str]) -> str | None:
    """`attn1_to_out_0` -> `attn1.to_out.0`; None where a word is unknown."""
    parts, at = [], 0
    while at < len(flat):
        step = grammar.match(flat, at)
        if step is None:
            return None
        parts.append(step[1])
        at = step.end()
    return None if not parts or flat.endswith("_") else ".".join(parts)


def _unet_path(flat: str) -> str | None:
    if flat in _MODULES:
        return _MODULES[flat]
    part = _INSIDE_SGM.fullmatch(flat)
    if part is None:
        return _unflattened(flat, _UNET)
    where = _PARTS.get(part[1], "")
    inner = _RESNET.get(part[2]) if ".resnets." in where else _unflattened(part[2], _UNET)
    return f"{where}.{inner}" if where and inner else None


def _sgm_name(path: str) -> str | None:
    """The name in sgm's UNet of Stable Diffusion XL, which has three levels. Attentions look alike in both."""
    modules, parts, resnet = ({there: here for here, there in t.items()} for t in (_MODULES, _PARTS, _RESNET))
    part = _INSIDE.fullmatch(path)
    if part is None:
        return modules.get(path)
    inner = resnet.get(part[2]) if ".resnets." in part[1] else part[2].replace(".", "_")
    return f"{parts.get(part[1])}_{inner}"
