"""Files of one learned word, as textual inversion's tools keep them; the word is in the file's name, or the tensor's.

{"<dog>": (n, dim)}                          diffusers; one text encoder
{"emb_params": (n, dim)}                     A1111, ComfyUI; the word is the file's name
{"clip_l": (n, 768), "clip_g": (n, 1280)}    the same for SDXL's two text encoders
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..adapter import Adapter
from .safetensors_file import write_tensor_file
from .source import Source

NAME = "textual inversion"
MAX_VECTORS = 1024

_PARAMS = "emb_params"
_UNSAFE = re.compile(r"[^\w<>-]+")
_PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


def recognise(source: Source) -> bool:
    names = set(source.tensors)
    if not names or len(names) > 2:
        return False
    if names <= {_PARAMS} or names <= set(_PARTS):
        return True
    (first, *others) = names
    return not others and "." not in first and ":" not in first and len(source.tensors[first].shape) in (1, 2)


def read(source: Source) -> Adapter:
    """Raises AdapterFormatError for vectors of impossible shape."""
    for name, info in source.tensors.items():
        if len(info.shape) not in (1, 2) or not 1 <= info.shape[0] <= MAX_VECTORS * (1 if len(info.shape) == 2 else 64):
            raise source.error(f"has {name} with shape {list(info.shape)}; (n, dim) with up to {MAX_VECTORS} is known")
    values = {name: v.view(1, -1) if v.ndim == 1 else v for name, v in source.read(list(source.tensors)).items()}
    (first, *_) = values
    word = Path(source.path).stem if first == _PARAMS or first in _PARTS else first
    vectors = {_PARTS.get(name, "text_encoder"): value for name, value in values.items()}
    return Adapter({}, tokens={word: vectors})


def write_embeddings(adapter: Adapter, folder: Path) -> list[Path]:
    """One file for each word of an adapter, for `load_textual_inversion` and for web UIs (which go by the file's name).

    A word with a vector for one text encoder is written in diffusers' form, which web UIs read as well.
    """
    written = []
    for word, vectors in adapter.tokens.items():
        path = folder / (_UNSAFE.sub("_", word) + ".safetensors")
        parts = {name: vectors[component] for name, component in _PARTS.items() if component in vectors}
        tensors: dict[str, torch.Tensor] = {word: parts["clip_l"]} if set(parts) == {"clip_l"} else parts
        write_tensor_file(path, tensors, {"format": "pt"})
        written.append(path)
    return written
