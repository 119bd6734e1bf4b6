"""The dialect of cloneofsimo/lora, the first LoRA for Stable Diffusion (from December 2022 on).

Names are `<component>:<n>:up` (out, rank) and `<component>:<n>:down` (rank, in), or (out, rank, 1, 1) and
(rank, in, kh, kw) beside a convolution. A layer's only identity is n, its position when the modules of the diffusers
and transformers of those days were walked through: every module whose class is named in the metadata under the
component (a JSON list), in the order of `modules()`, and all linear layers in it, with the convolutions where the file
has any. There is no alpha: the scale is 1.

The old modules are built here as bare names and widths, for Stable Diffusion 1 and 2, in both orders that a transformer
block has had (diffusers < 0.15: attn1, ff, attn2; later: attn1, attn2, ff). Every width has to fit, or the file is
refused: one layer more or less, and all behind it would be at the wrong place.

Learned words are tensors (dim,) under their own name, with "<embed>" in the metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import torch

from ..adapter import Adapter, inferred_config
from .cloneofsimo_layout import old_models, places
from .pairs import Half, read_pairs
from .source import Source

NAME = "cloneofsimo"
EMBED = "<embed>"
COMPONENTS = ("unet", "text_encoder")

_Places = list[tuple[str, tuple[int, ...]]]
_NAME = re.compile(r"(unet|text_encoder):(0|[1-9]\d{0,4}):(up|down)")
# Without metadata (a bare list): what the tool's versions took, one after the other, and its extended form.
_USUAL_CLASSES = {
    "unet": (
        ["CrossAttention", "Attention", "GEGLU"],
        ["CrossAttention", "Attention"],
        ["ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"],
    ),
    "text_encoder": (["CLIPAttention"],),
}


def recognise(file: Source) -> bool:
    return any(_NAME.fullmatch(name) for name in file.tensors) or any(_words(file))


def used_metadata(file: Source) -> set[str]:
    """Names of metadata that `read` uses up: classes, ranks, words."""
    ranks = {f"{name.rpartition(':')[0]}:rank" for name in file.tensors}
    return {*COMPONENTS, *ranks, *_words(file)}


def read(file: Source) -> Adapter:
    """Raises AdapterFormatError for positions that are missing or too many, widths that are not those of the layer at
    that position, and names that are not understood."""
    words = list(_words(file))
    positions: dict[str, dict[tuple[int, str], str]] = {}
    for name in file.tensors:
        match = _NAME.fullmatch(name)
        if match is not None:
            positions.setdefault(match[1], {})[int(match[2]), match[3]] = name
        elif name not in words:
            raise file.error(f"has a tensor that is not understood in the cloneofsimo dialect: {name}")
    halves: dict[str, Half] = {}
    text_width = None
    for component, names in positions.items():
        layout = _fitting_layout(file, component, names)
        for (n, side), name in sorted(names.items()):
            path, weight = layout[n]
            halves[name] = Half(component, path, "a" if side == "down" else "b")
            if component == "text_encoder" or path.endswith("attn2.to_k"):
                text_width = weight[1]
    _check_words(file, words, text_width)
    components = read_pairs(file, halves, lambda component, path, rank: 1.0) if halves else {}
    values = file.read(words)
    return Adapter(
        components,
        {component: inferred_config(layers) for component, layers in components.items()},
        tokens={word: {"text_encoder": torch.atleast_2d(values[word])} for word in words},
    )


def _words(file: Source) -> Iterator[str]:
    return (name for name in file.tensors if file.metadata.get(name) == EMBED)


def _check_words(file: Source, words: Sequence[str], text_width: int | None) -> None:
    for word in words:
        shape = file.tensors[word].shape
        if len(shape) not in (1, 2) or 0 in shape:
            raise file.error(f"has the word {word} with shape {list(shape)}, where a vector belongs")
        if text_width is not None and shape[-1] != text_width:
            raise file.error(f"has the word {word} with {shape[-1]} numbers, for a text encoder of width {text_width}")


def _fitting_layout(file: Source, component: str, names: dict[tuple[int, str], str]) -> _Places:
    """The one layout that every layer of the component fits. Raises AdapterFormatError, with the first misfit."""
    weights = _weights(file, component, names)
    choices = [_classes(file, component)] if component in file.metadata else _USUAL_CLASSES[component]
    convolutions = any(len(weight) == 4 for weight in weights)
    fits: dict[tuple[str, ...], _Places] = {}
    misfits: list[tuple[int, str]] = []
    for model, words in old_models(component, weights):
        for classes in choices:
            layout = list(places(model, classes, convolutions))
            paths = tuple(path for path, _ in layout)
            if len(set(paths)) != len(paths):
                raise file.error(f"names classes that lie in one another ({_listed(classes)}): positions are ambiguous")
            fitting = next((n for n, (old, new) in enumerate(zip(layout, weights)) if old[1] != new), None)
            if fitting is not None:
                (path, old), new = layout[fitting], weights[fitting]
                what = f"has {component}:{fitting} for a weight {list(new)}, where {words} has {path}, {list(old)}"
                misfits.append((fitting, what))
            elif len(weights) != len(layout):
                what = f"has {len(weights)} layers of the {component}, where {words} has {len(layout)}"
                misfits.append((min(len(weights), len(layout)), f"{what} ({_listed(classes)})"))
            else:
                fits[paths] = layout
    if not fits:
        raise file.error(max(misfits, key=lambda misfit: misfit[0])[1])
    if len(fits) > 1:
        raise file.error(f"has layers of the {component} that fit more than one order of modules")
    return next(iter(fits.values()))


def _weights(file: Source, component: str, names: dict[tuple[int, str], str]) -> list[tuple[int, ...]]:
    """The shape of the weight that each position's factors are for."""
    count = max(n for n, _ in names) + 1
    weights = []
    for n in range(count):
        if (n, "up") not in names or (n, "down") not in names:
            missing = f"{component}:{n}:{'down' if (n, 'up') in names else 'up'}"
            raise file.error(f"has no {missing}: a layer is missing, or one half of it")
        up, down = (file.tensors[names[n, side]].shape for side in ("up", "down"))
        if len(up) != len(down) or len(up) not in (2, 4):
            raise file.error(f"has factors that do not fit each other at {component}:{n}: {list(up)}, {list(down)}")
        said = file.metadata.get(f"{component}:{n}:rank")
        if said is not None and said != str(down[0]):
            raise file.error(f"says rank {said[:20]!a} at {component}:{n}, where its factors have {down[0]:,}")
        weights.append((up[0], *down[1:]))
    return weights


def _classes(file: Source, component: str) -> list[str]:
    try:
        value = json.loads(file.metadata[component])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise file.error(f"has metadata under {component!r} that is no list of class names")
    return value


def _listed(classes: Sequence[str]) -> str:
    return ascii(", ".join(classes))[1:-1][:120]
