"""OneTrainer's bundles: an adapter in another dialect, and words of its own in the same file.

`bundle_emb.<word>.clip_l` and `.clip_g` are (vectors, dim) for the first and second text encoder; `…_out` are vectors
for the text encoder's output, which no other tool has a place for.
"""

from __future__ import annotations

import re

import torch

from ..adapter import Adapter
from .source import Source, Subset

NAME = "onetrainer"
MAX_VECTORS = 1024

_BUNDLED = re.compile(r"bundle_emb\.(.+)\.(clip_l|clip_g|t5)(_out)?")
_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}


def recognise(source: Source) -> bool:
    return any(name.startswith("bundle_emb.") for name in source.tensors)


def read(source: Source) -> Adapter:
    """Raises AdapterFormatError for words of impossible shape, and what the dialect of the rest raises."""
    from .registry import read_source  # the rest of the file is in any dialect

    bundled = [name for name in source.tensors if name.startswith("bundle_emb.")]
    places = {name: _BUNDLED.fullmatch(name) for name in bundled}
    for name, place in places.items():
        shape = source.tensors[name].shape
        if place is None:
            raise source.error(f"has a bundled word that is not understood: {name}")
        if len(shape) != 2 or not 1 <= shape[0] <= MAX_VECTORS or shape[1] < 1:
            raise source.error(f"has {name} with shape {list(shape)}; (vectors, dim) with up to {MAX_VECTORS} is known")
    rest = [name for name in source.tensors if name not in places]
    adapter = read_source(Subset(source, rest)) if rest else Adapter({})
    adapter.dialect = f"{NAME} ({adapter.dialect})" if rest else NAME
    values = source.read(bundled)
    words: dict[str, dict[str, torch.Tensor]] = {}
    for name, place in places.items():
        assert place is not None, "refused above"
        if place[3]:
            adapter.notes.append(f"{name} changes the text encoder's output, which is not supported, and was left out")
        else:
            words.setdefault(place[1], {})[_ENCODERS[place[2]]] = values[name]
    adapter.tokens = {**adapter.tokens, **words}
    return adapter
