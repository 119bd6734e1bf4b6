"""The modules of the diffusers and transformers of early 2023, as bare names and widths in the order of `modules()`.

cloneofsimo's files know a layer only by its position there. Stable Diffusion 1 and 2, and CLIP's text towers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_WIDTHS = (320, 640, 1280, 1280)
_TIME = 1280
# The attention's class and the order in a transformer block: diffusers < 0.15, and later.
_BLOCKS = (("CrossAttention", ("attn1", "ff", "attn2")), ("Attention", ("attn1", "attn2", "ff")))
_PER_TEXT_LAYER = (4, 6, 2)  # linear layers of CLIP's attention, of a whole layer, of its MLP


@dataclass(frozen=True)
class OldModule:
    """An old module: its class, the weight's shape of a leaf, its children in the order of their registration."""

    kind: str
    weight: tuple[int, ...] = ()
    children: dict[str, OldModule] = field(default_factory=dict)

    def walk(self, path: str = "") -> Iterator[tuple[str, OldModule]]:
        """`named_modules()`."""
        yield path, self
        for name, child in self.children.items():
            yield from child.walk(f"{path}.{name}" if path else name)


def places(model: OldModule, classes: Sequence[str], convolutions: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(path, weight's shape) by position: of every module of the named classes, every leaf in it."""
    search = ("Linear", "Conv2d") if convolutions else ("Linear",)
    for path, module in model.walk():
        if module.kind in classes:
            yield from ((where, leaf.weight) for where, leaf in module.walk(path) if leaf.kind in search)


def old_models(component: str, weights: Sequence[tuple[int, ...]]) -> Iterator[tuple[OldModule, str]]:
    """The old models that may be meant, each with its name. How many layers a text encoder has, the file decides."""
    if component == "unet":
        for words, text, linear in (("Stable Diffusion 1", 768, False), ("Stable Diffusion 2", 1024, True)):
            for attention, order in _BLOCKS:
                yield _unet(text, linear, attention, order), words
        return
    for per_layer in _PER_TEXT_LAYER:
        layers = len(weights) // per_layer
        yield _text_encoder(weights[0][1], layers), f"a CLIP text encoder with {layers} layers"


def _linear(inputs: int, outputs: int) -> OldModule:
    return OldModule("Linear", (outputs, inputs))


def _conv(inputs: int, outputs: int, size: int = 3) -> OldModule:
    return OldModule("Conv2d", (outputs, inputs, size, size))


def _list(*modules: OldModule) -> OldModule:
    return OldModule("ModuleList", children={str(n): module for n, module in enumerate(modules)})


def _attention(kind: str, width: int, context: int) -> OldModule:
    children = {
        "to_q": _linear(width, width),
        "to_k": _linear(context, width),
        "to_v": _linear(context, width),
        "to_out": _list(_linear(width, width), OldModule("Dropout")),
    }
    return OldModule(kind, children=children)


def _transformer(width: int, text: int, linear: bool, attention: str, order: Sequence[str]) -> OldModule:
    gate = OldModule("GEGLU", children={"proj": _linear(width, 8 * width)})
    parts = {
        "attn1": _attention(attention, width, width),
        "ff": OldModule("FeedForward", children={"net": _list(gate, OldModule("Dropout"), _linear(4 * width, width))}),
        "attn2": _attention(attention, width, text),
    }
    block = OldModule("BasicTransformerBlock", children={name: parts[name] for name in order})
    project = _linear(width, width) if linear else _conv(width, width, 1)
    children = {"proj_in": project, "transformer_blocks": _list(block), "proj_out": project}
    return OldModule("Transformer2DModel", children=children)


def _resnet(inputs: int, outputs: int) -> OldModule:
    children = {
        "conv1": _conv(inputs, outputs),
        "time_emb_proj": _linear(_TIME, outputs),
        "conv2": _conv(outputs, outputs),
    }
    if inputs != outputs:
        children["conv_shortcut"] = _conv(inputs, outputs, 1)
    return OldModule("ResnetBlock2D", children=children)


def _unet(text: int, linear: bool, attention: str, order: Sequence[str]) -> OldModule:
    """UNet2DConditionModel of Stable Diffusion; its mid block was registered last."""

    def transformers(width: int, count: int) -> dict[str, OldModule]:
        one = _transformer(width, text, linear, attention, order)
        return {"attentions": _list(*(one for _ in range(count)))}

    downs, ups = [], []
    skips = [_WIDTHS[0]]
    before = _WIDTHS[0]
    for n, width in enumerate(_WIDTHS):
        last = n == len(_WIDTHS) - 1
        children = {} if last else transformers(width, 2)
        children["resnets"] = _list(_resnet(before, width), _resnet(width, width))
        skips += [width, width] if last else [width, width, width]
        if not last:
            sampler = OldModule("Downsample2D", children={"conv": _conv(width, width)})
            children["downsamplers"] = _list(sampler)
        downs.append(OldModule("DownBlock2D" if last else "CrossAttnDownBlock2D", children=children))
        before = width
    for n, width in enumerate(reversed(_WIDTHS)):
        children = {} if n == 0 else transformers(width, 3)
        inputs = [before, width, width]
        children["resnets"] = _list(*(_resnet(wide + skips.pop(), width) for wide in inputs))
        if n < len(_WIDTHS) - 1:
            sampler = OldModule("Upsample2D", children={"conv": _conv(width, width)})
            children["upsamplers"] = _list(sampler)
        ups.append(OldModule("UpBlock2D" if n == 0 else "CrossAttnUpBlock2D", children=children))
        before = width
    mid = transformers(_TIME, 1) | {"resnets": _list(_resnet(_TIME, _TIME), _resnet(_TIME, _TIME))}
    embedding = {"linear_1": _linear(_WIDTHS[0], _TIME), "linear_2": _linear(_TIME, _TIME)}
    children = {
        "conv_in": _conv(4, _WIDTHS[0]),
        "time_embedding": OldModule("TimestepEmbedding", children=embedding),
        "down_blocks": _list(*downs),
        "up_blocks": _list(*ups),
        "mid_block": OldModule("UNetMidBlock2DCrossAttn", children=mid),
        "conv_out": _conv(_WIDTHS[0], 4),
    }
    return OldModule("UNet2DConditionModel", children=children)


def _text_encoder(width: int, layers: int) -> OldModule:
    """CLIPTextModel, which registered the keys' projection first."""
    names = ("k_proj", "v_proj", "q_proj", "out_proj")
    attention = OldModule("CLIPAttention", children={name: _linear(width, width) for name in names})
    mlp = OldModule("CLIPMLP", children={"fc1": _linear(width, 4 * width), "fc2": _linear(4 * width, width)})
    layer = OldModule("CLIPEncoderLayer", children={"self_attn": attention, "mlp": mlp})
    encoder = OldModule("CLIPEncoder", children={"layers": _list(*(layer for _ in range(layers)))})
    return OldModule(
        "CLIPTextModel", children={"text_model": OldModule("CLIPTextTransformer", children={"encoder": encoder})}
    )
