"""Prefix tuning (Li & Liang 2021) and P-tuning v2 (Liu et al. 2022): learned keys and values in front of every layer's.

PEFT's files hold the bare keys and values; `from_prompt` and `to_prompt` go between those and ours, which keep the
network that made them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..adapter import Learned, Prompt
from ..errors import AdapterFormatError, AdapterMismatchError, ConfigError
from .piece import Piece
from .prefix_attention import attach
from .prefix_encoder import PrefixEncoder, flat
from .prefix_plan import ATTRIBUTE, Prefixes
from .prefix_site import Site, find_site
from .prefix_tuning_config import PrefixTuningConfig

_SHAPE = ("token_dim", "num_attention_heads", "num_layers")
_TWO_STACKS = "SEQ_2_SEQ_LM"
# PEFT's words, by how a class of transformers is called.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": _TWO_STACKS,
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class PrefixTuning(Piece):
    """One adapter's prefix in one component."""

    config: PrefixTuningConfig

    def __init__(self, config: PrefixTuningConfig, name: str, component: nn.Module, prefixes: Prefixes) -> None:
        super().__init__(config, name)
        self._component, self._prefixes = component, prefixes

    def modules(self) -> Iterator[nn.Module]:
        yield self._prefixes.encoders[self.name]

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self._prefixes.encoders[self.name].named_parameters())

    def check_weight(self, weight: float) -> None:
        if weight not in (0.0, 1.0):
            raise ConfigError(f"weight {weight:g} for adapter {self.name!r}: a prefix is there or not, give it 1 or 0")

    def act(self, weight: float) -> None:
        self._prefixes.weights[self.name] = weight
        self._prefixes.by_row.pop(self.name, None)
        self._prefixes.arrange()

    def act_in_rows(self, weights: Sequence[float] | None) -> None:
        for weight in weights or ():
            self.check_weight(weight)
        if weights is None:
            self._prefixes.by_row.pop(self.name, None)
        else:
            self._prefixes.by_row[self.name] = list(weights)
        self._prefixes.arrange()

    def remove(self) -> None:
        for known in (self._prefixes.encoders, self._prefixes.weights, self._prefixes.by_row):
            known.pop(self.name, None)
        self._prefixes.arrange()
        delattr(self._component, f"{self.kind}_{self.name}")
        if not self._prefixes.encoders:
            self._prefixes.unhook()
            delattr(self._component, ATTRIBUTE)


def build(
    component: nn.Module,
    config: PrefixTuningConfig,
    name: str,
    *,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> PrefixTuning:
    """Attach a prefix, not acting. The piece's config has what was read off the model filled in.

    dtype: of what learns. generator: for initial values, a CPU generator.
    Raises AdapterMismatchError for a model that cannot have a prefix, or another shape than the config says.
    """
    prefixes: Prefixes | None = component.__dict__.get(ATTRIBUTE)
    site = find_site(component) if prefixes is None else prefixes.site
    config = _completed(config, component, site)
    device = next(site.attention[0].parameters()).device
    encoder = PrefixEncoder(
        config, len(site.attention), site.heads, site.heads * site.size, generator, device=device, dtype=dtype
    )
    if prefixes is None:
        prefixes = attach(site)
        setattr(component, ATTRIBUTE, prefixes)
    component.add_module(f"{config.kind}_{name}", encoder.train(component.training))
    prefixes.encoders[name] = encoder
    return PrefixTuning(config, name, component, prefixes)


def from_prompt(prompt: Prompt) -> Learned:
    """PEFT's prefix, (tokens, 2 · layers · width), as what this method learns; its network PEFT has not saved.

    Raises AdapterFormatError for another kind of prompt, and for embeddings that the fields do not fit.
    """
    if prompt.kind != "PREFIX_TUNING" or prompt.embeddings.ndim != 2:
        shape = list(prompt.embeddings.shape)
        raise AdapterFormatError(f"no prefix of prefix tuning: kind {prompt.kind[:40]!a}, embeddings of shape {shape}")
    fields: dict[str, Any] = {name: prompt.fields.get(name) for name in _SHAPE}
    tokens, columns = prompt.embeddings.shape
    width, layers = fields["token_dim"], fields["num_layers"]
    if width and layers and columns != 2 * layers * width:
        raise AdapterFormatError(
            f"the prefix has {columns} columns, by its fields (num_layers {layers}, token_dim {width}) they are "
            f"{2 * layers * width}"
        )
    task, embeddings = prompt.fields.get("task_type"), prompt.embeddings
    if task == _TWO_STACKS and layers:
        embeddings = _from_two_stacks(embeddings.unflatten(1, (layers, -1))).flatten(1)
        fields["num_layers"] = layers * embeddings.shape[1] // columns
    config = PrefixTuningConfig(num_virtual_tokens=tokens, task_type=task, **fields)
    return Learned(config, {"embedding": embeddings})


def to_prompt(learned: Learned, component: nn.Module | None = None) -> Prompt:
    """The bare keys and values of a prefix, and the fields that PEFT needs; a network that made them is left behind.

    component: the model that it is for, asked for what the config does not say: the model's shape, its task.
    Raises AdapterFormatError where the shape is not known, AdapterMismatchError where the tensors have another.
    """
    config = _config_of(learned)
    if component is not None:
        config = _completed(config, component, find_site(component))
    fields = {name: getattr(config, name) for name in _SHAPE}
    unknown = [name for name, value in fields.items() if value is None]
    if unknown:
        raise AdapterFormatError(f"the prefix does not say its {', '.join(unknown)}: give the model that it is for")
    fields["num_virtual_tokens"] = config.num_virtual_tokens
    fields["num_transformer_submodules"] = 2 if config.task_type == _TWO_STACKS else 1
    _check_shapes(config, learned.tensors)
    embeddings = flat(learned.tensors).detach()
    if config.task_type == _TWO_STACKS:
        embeddings = embeddings.unflatten(1, (fields["num_layers"], -1)).repeat_interleave(2, dim=1).flatten(1)
        fields["num_layers"] *= 2
    return Prompt("PREFIX_TUNING", embeddings, {**fields, "task_type": config.task_type})


def check_given(learned: Learned, component: nn.Module) -> None:
    """Raises AdapterMismatchError where tensors, of a file say, are not those that their config makes in this model;
    nothing of the size that the config names has been allocated."""
    _check_shapes(_completed(_config_of(learned), component, find_site(component)), learned.tensors)


def _check_shapes(config: PrefixTuningConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """config: with the model's shape. Raises AdapterMismatchError."""
    assert config.num_layers and config.num_attention_heads and config.token_dim, "completed by the model's"
    with torch.device("meta"):
        encoder = PrefixEncoder(config, config.num_layers, config.num_attention_heads, config.token_dim, device="meta")
    wanted = {name: tuple(parameter.shape) for name, parameter in encoder.named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(set(wanted) | set(given)):
        if wanted.get(name) != given.get(name):
            raise AdapterMismatchError(
                f"{config.kind}: {name[:80]!a} has shape {given.get(name, 'none')}; by its config it is "
                f"{wanted.get(name, 'none')}"
            )


def _config_of(learned: Learned) -> PrefixTuningConfig:
    assert isinstance(learned.config, PrefixTuningConfig), "asked for this method only"
    return learned.config


def _from_two_stacks(layers: torch.Tensor) -> torch.Tensor:
    """What the decoder's layers get of PEFT's (tokens, layers, 2 · width) for a model of two stacks.

    PEFT writes the layers down twice, deals them out two by two, for self-attention and cross-attention, and drops what
    is for the latter: decoder layer i gets layer 2i mod the number of layers, and two decoder layers may share one.
    `to_prompt` therefore gives each layer twice over, which is undone here.
    """
    count = layers.shape[1]
    if count % 2 == 0 and torch.equal(layers[:, ::2], layers[:, 1::2]):
        return layers[:, ::2]
    return layers[:, torch.arange(0, 2 * count, 2) % count]


def _completed(config: PrefixTuningConfig, component: nn.Module, site: Site) -> PrefixTuningConfig:
    """The config with the model's shape and task. Raises AdapterMismatchError where it says another shape."""
    shape: dict[str, Any] = dict(zip(_SHAPE, (site.heads * site.size, site.heads, len(site.attention))))
    for name, value in shape.items():
        if getattr(config, name) not in (None, value):
            raise AdapterMismatchError(
                f"{name}={getattr(config, name)}: {type(component).__name__} has {value}; leave it out to take that"
            )
    class_name = type(component).__name__
    task = next((task for ending, task in _TASKS.items() if class_name.endswith(ending)), "FEATURE_EXTRACTION")
    return dataclasses.replace(config, task_type=config.task_type or task, **shape)
