"""Prompts whose vectors are given, by a file: checked before anything of the size that it names is allocated."""

from __future__ import annotations

import dataclasses
from typing import TypeGuard

import torch
from torch import nn

from ..adapter import Learned
from ..errors import AdapterMismatchError
from .config import MethodConfig
from .prefix_tuning import check_given
from .prompt_encoder_config import PromptEncoderConfig
from .prompt_networks import EncodedVectors
from .prompt_piece import prompt_hosts
from .prompt_tuning_config import PromptConfig, PromptTuningConfig


def config_of_given(learned: Learned, component: nn.Module) -> MethodConfig:
    """The config to build from, where tensors follow: without an initial text, whose tokenizer would be loaded from
    wherever a file says. Other methods' configs are returned as they are.

    Raises AdapterMismatchError where the tensors are not those that the config makes in this model.
    """
    config = learned.config
    if config.kind == "prefix_tuning":
        check_given(learned, component)
    if not isinstance(config, PromptConfig):
        return config
    dim = prompt_hosts(component, config)[0].weight.shape[1]
    check_tensors(learned, dim)
    if isinstance(config, PromptTuningConfig) and config.prompt_tuning_init != "RANDOM":
        return dataclasses.replace(config, prompt_tuning_init="RANDOM", tokenizer_kwargs=None)
    return config


def rows_of(learned: Learned) -> torch.Tensor:
    """(tokens, dim): the vectors of a prompt, out of its encoder where it has one.

    Raises AdapterMismatchError where the tensors are not those that the config makes.
    """
    config, tensors = learned.config, learned.tensors
    first = tensors.get("vectors", tensors.get("embedding.weight"))
    check_tensors(learned, first.shape[-1] if first is not None and first.ndim else 0)
    if not _encoded(config):
        return tensors["vectors"].detach()
    with torch.device("meta"):
        encoder = EncodedVectors(config, tensors["embedding.weight"].shape[1])
    encoder.load_state_dict(dict(tensors), assign=True)
    with torch.no_grad():
        return encoder.eval()()


def check_tensors(learned: Learned, dim: int) -> None:
    """Raises AdapterMismatchError where names or shapes are not those of the config for an embedding of width `dim`."""
    config = learned.config
    assert isinstance(config, PromptConfig), "asked for prompts only"
    wanted: dict[str, tuple[int, ...]] = {"vectors": (config.rows, dim)}
    if _encoded(config):
        with torch.device("meta"):
            wanted = {name: tuple(p.shape) for name, p in EncodedVectors(config, max(1, dim)).named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in learned.tensors.items()}
    for name in sorted(set(wanted) | set(given)):
        if wanted.get(name) != given.get(name):
            raise AdapterMismatchError(
                f"{config.kind}: {name[:80]!a} has shape {given.get(name, 'none')}; a prompt of this config in a model "
                f"with tokens of width {dim} needs {wanted.get(name, 'none')}"
            )


def _encoded(config: MethodConfig) -> TypeGuard[PromptEncoderConfig]:
    return isinstance(config, PromptEncoderConfig) and config.encoder_reparameterization_type != "NONE"
