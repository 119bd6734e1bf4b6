"""The dialect of diffusers' attention processors, `pytorch_lora_weights` of 2023 (diffusers 0.12 to 0.21).

The factors lay in the attention's processor: `unet.….attn1.processor.to_q_lora.down.weight` (rank, in) and
`….to_q_lora.up.weight` (out, rank), with to_k, to_v, to_out, and add_k_proj and add_v_proj where the text has keys and
values of its own. `save_attn_procs` left `unet.` out; such a file loads into diffusers without effect.

Text encoders had the same names on CLIP's attention (`text_encoder.….self_attn.to_q_lora.down.weight`, to_q for q_proj
and so on), later `….q_proj.lora_linear_layer.down.weight`. Beside the attention: `….ff.net.2.lora.down.weight`.

There are no alpha tensors: the scale is 1.
"""

from __future__ import annotations

import re

from ..adapter import Adapter, inferred_config
from ..components import COMPONENTS, canonical_path
from .pairs import Half, read_pairs
from .source import Source

NAME = "attn-processor"

_SIDES = {"down": "a", "up": "b"}
_IN_PROCESSOR = re.compile(
    r"(.+?)(\.processor)?\.(to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)_lora\.(down|up)\.weight"
)
_BESIDE = re.compile(r"(.+)\.(?:lora|lora_linear_layer)\.(down|up)\.weight")
_IN_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def recognise(file: Source) -> bool:
    return any(_IN_PROCESSOR.fullmatch(name) for name in file.tensors)


def read(file: Source) -> Adapter:
    """Raises AdapterFormatError for names that are not understood (nothing is skipped)."""
    halves: dict[str, Half] = {}
    for name in file.tensors:
        half = _half(name)
        if half is None:
            raise file.error(f"has a tensor that is not understood in the {NAME} dialect: {name}")
        halves[name] = half
    components = read_pairs(file, halves, lambda component, path, rank: 1.0)
    return Adapter(components, {component: inferred_config(layers) for component, layers in components.items()})


def _half(name: str) -> Half | None:
    head, _, rest = name.partition(".")
    component, rest = (head, rest) if head in COMPONENTS else ("unet", name)
    match = _IN_PROCESSOR.fullmatch(rest)
    if match is not None:
        path, in_processor, projection, direction = match.groups()
        clip = component.startswith("text_encoder") and in_processor is None
        if clip and projection not in _IN_CLIP:
            return None
        last = _IN_CLIP[projection] if clip else {"to_out": "to_out.0"}.get(projection, projection)
        return Half(component, canonical_path(component, f"{path}.{last}"), _SIDES[direction])
    match = _BESIDE.fullmatch(rest)
    return None if match is None else Half(component, canonical_path(component, match[1]), _SIDES[match[2]])
