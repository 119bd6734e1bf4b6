"""Switch time: from one loaded adapter to another in the UNet and text encoder of Stable Diffusion 1.5.

The base is of the right shapes, and zero where it is called. A switch could leave its work to the next call, so a
second row has every adapted layer called once, with one token, after each switch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import peft
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import set_adapters_for_text_encoder
from engine_cases import CLIP_TARGETS, SD_TARGETS
from engine_common import Setting, markdown, notes, sections
from engine_contestants import ALPHA, RANK, our_factors, peft_factors
from engine_timing import take_turns
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import lora_diffusion as ld

NAMES = ("dog", "cup")
DTYPE = torch.bfloat16
Layers = dict[str, nn.Module]  # by path, in the order of `named_modules()`


def measure(setting: Setting) -> list[dict]:
    """Rows: UNet alone, UNet and text encoder, each without and with a call of every adapted layer."""
    rows = []
    for name, parts in (("UNet", ("unet",)), ("UNet and text encoder", ("unet", "text_encoder"))):
        ours, theirs, wrapped = (_pipeline(parts, setting.device) for _ in range(3))
        try:
            ours_layers = _add_ours(ours, parts)
        except ld.LoraDiffusionError as error:
            rows.append({"name": name, "skipped": str(error)})
            continue
        theirs_layers = _add_diffusers(theirs)
        wrapped_layers = _add_peft(wrapped)
        switches = {
            "ours": (lambda to, it=ours: ld.set_adapters(it, to), ours_layers),
            "diffusers": (lambda to, it=theirs: _diffusers_switch(it, to), theirs_layers),
            "PEFT": (lambda to, it=wrapped: _peft_switch(it, to), wrapped_layers),
        }
        for _, layers in switches.values():
            _clear(layers.values())
        wrong = _difference(ours, theirs, switches)
        if wrong is not None:
            rows.append({"name": name, "disagrees": wrong})
            continue
        facts = {"layers": len(ours_layers), "rank": RANK}
        for words, calls in (("", False), (", then each layer once", True)):
            runs = {who: _alternating(switch, layers if calls else {}) for who, (switch, layers) in switches.items()}
            if calls:
                runs["(no switch, each layer once)"] = _alternating(lambda to: None, ours_layers)
            timing = take_turns(runs, setting.device, setting.repetitions, host=True)
            row = {"name": name + words, **facts, "seconds": {who: timing.median(who) for who in runs}}
            rows.append(row | {"diffusers_to_ours": timing.ratio("diffusers", "ours"), "figures": timing.figures()})
    return rows


def _pipeline(parts: tuple[str, ...], device: torch.device) -> SimpleNamespace:
    with torch.device("meta"):
        models: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        }
        if "text_encoder" in parts:
            models["text_encoder"] = CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
            )
    for model in models.values():
        for module in model.eval().modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=DTYPE, device=device)
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    return SimpleNamespace(**models)


def _clear(layers: Iterable[nn.Module]) -> None:
    """Zero the base of the layers that are called; the others' memory is never written, hence never taken."""
    for layer in layers:
        base = getattr(layer, "base_layer", layer)
        for parameter in (base.weight, base.bias):
            if parameter is not None:
                parameter.zero_()


def _targets(part: str) -> list[str]:
    return list(SD_TARGETS if part == "unet" else CLIP_TARGETS)


def _add_ours(pipeline: SimpleNamespace, parts: tuple[str, ...]) -> Layers:
    configs = {part: ld.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=_targets(part)) for part in parts}
    for name in NAMES:
        found = ld.add_adapter(pipeline, configs, name)
    return {f"{part}.{path}": getattr(pipeline, part).get_submodule(path) for part in parts for path in found[part]}


def _peft_config(part: str) -> peft.LoraConfig:
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=_targets(part))


def _add_diffusers(pipeline: SimpleNamespace) -> Layers:
    """As `load_lora_weights` does it: PEFT's layers inside the models, switched by diffusers."""
    for part, model in vars(pipeline).items():
        for name in NAMES:
            model.add_adapter(_peft_config(part), name)
    return _lora_layers(pipeline)


def _add_peft(pipeline: SimpleNamespace) -> Layers:
    """PEFT by itself: the models wrapped, switched by PEFT."""
    for part, model in list(vars(pipeline).items()):
        wrapper = peft.get_peft_model(model, _peft_config(part), adapter_name=NAMES[0])
        wrapper.add_adapter(NAMES[1], _peft_config(part))
        setattr(pipeline, part, wrapper)
    return _lora_layers(pipeline)


def _lora_layers(pipeline: SimpleNamespace) -> Layers:
    return {
        f"{part}.{path}": layer
        for part, model in vars(pipeline).items()
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _diffusers_switch(pipeline: SimpleNamespace, to: str) -> None:
    pipeline.unet.set_adapters(to)
    if hasattr(pipeline, "text_encoder"):
        set_adapters_for_text_encoder(to, pipeline.text_encoder)


def _peft_switch(pipeline: SimpleNamespace, to: str) -> None:
    for model in vars(pipeline).values():
        model.set_adapter(to)


def _alternating(switch: Callable[[str], object], layers: Layers) -> Callable[[], None]:
    """Switch, then call `layers`, in order; those of one parent and width read the same tensor, as q, k and v do."""
    names = itertools.cycle(NAMES)
    inputs: dict[tuple[str, int], torch.Tensor] = {}
    calls = []
    for path, layer in layers.items():
        weight = getattr(layer, "base_layer", layer).weight
        key = (path.rpartition(".")[0], weight.shape[1])
        row = inputs.setdefault(key, torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device))
        calls.append((layer, row))

    @torch.no_grad()
    def run() -> None:
        switch(next(names))
        for layer, row in calls:
            layer(row)

    return run


@torch.no_grad()
def _difference(ours: Any, theirs: Any, switches: dict[str, tuple[Callable[[str], object], Layers]]) -> str | None:
    """What is wrong when the first, a middle and the last layer are called after a switch; None if nothing is."""
    ours_layers, theirs_layers = (list(switches[who][1].values()) for who in ("ours", "diffusers"))
    draw = torch.Generator().manual_seed(5)
    for name in NAMES:
        mine = our_factors(ours, name)
        peers = [factor for model in vars(theirs).values() for factor in peft_factors(model, name)]
        if [factor.shape for factor in mine] != [factor.shape for factor in peers]:
            return "the adapted layers differ"
        for a, b in zip(mine, peers):
            a.copy_(torch.randn(a.shape, generator=draw))
            b.copy_(a)
    for to in (*NAMES, NAMES[0]):
        for who in ("ours", "diffusers"):
            switches[who][0](to)
        if list(ld.active_adapters(ours)) != [to]:
            return f"active after the switch to {to!r}: {list(ld.active_adapters(ours))}"
        for index in (0, len(ours_layers) // 2, -1):
            weight = theirs_layers[index].base_layer.weight
            x = torch.randn(3, weight.shape[1], generator=draw).to(weight.device, weight.dtype)
            found, expected = ours_layers[index](x).float(), theirs_layers[index](x).float()
            if not (found - expected).norm() <= 2e-2 * expected.norm():
                return f"after the switch to {to!r} the outputs of layer {index} differ"
    return None


def report(rows: list[dict]) -> str:
    timed = [row for row in rows if "seconds" in row]
    names = list(dict.fromkeys(name for row in timed for name in row["seconds"]))
    header = ["two adapters, one active", "layers", *(f"{name}, ms" for name in names), "diffusers / ours"]
    lines = [
        [
            row["name"], row["layers"],
            *(f"{row['seconds'][name] * 1e3:.3g}" if name in row["seconds"] else "–" for name in names),
            f"{row['diffusers_to_ours']:.1f}",
        ]
        for row in timed
    ]  # fmt: skip
    title = f"### Switch time: SD 1.5, rank {RANK}"
    return sections(title, markdown(header, lines) if lines else "", notes(rows))
