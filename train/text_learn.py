"""What a text run learns and from what: the adapter in the model, its virtual tokens in the rows, a batch's loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

import lora_diffusion as ld
from lora_diffusion.errors import ConfigError
from lora_diffusion.methods.prompt_tuning_config import PromptTuningConfig
from lora_diffusion.state import Installed, state_of
from train.learner import Group, Learner, OptimizerSettings
from train.models import PRECISIONS
from train.optimizers import lora_plus
from train.randomness import derive_seed
from train.text_batches import Batches
from train.text_config import PROMPTS, TextConfig, learning_rate_of, methods_of
from train.text_methods import EXISTING, KINDS, configs_of
from train.text_models import resolve_text_model
from train.text_tasks.task import IGNORED, Batch, Example, Task

NAME = "default"
PER_TOKEN = ("causal-lm", "token-classification")  # labels are one for each token of the input
_PREFIXES = ("prompt_tuning", "p_tuning", "pre_layer")


def head_modules(config: TextConfig, new: Sequence[str]) -> list[str]:
    """The modules that are learned whole: new ones of the task, and what `--modules_to_save` names."""
    named = [name.strip() for name in (config.modules_to_save or "").split(",") if name.strip()]
    return list(dict.fromkeys([*(new if config.train_head else ()), *named]))


def add_adapter(config: TextConfig, model: nn.Module, task_type: str | None, modules: Sequence[str]) -> None:
    """Put a new adapter into the model. Raises ConfigError or AdapterMismatchError."""
    place = resolve_text_model(config.pretrained_model_name_or_path)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "adapter"))
    ld.add_adapter(model, configs_of(config, task_type, modules, place), NAME, generator=generator)
    for piece in installed(model).pieces.values():
        if isinstance(piece.config, PromptTuningConfig):  # what it began as is done with, and a path private
            piece.config = dataclasses.replace(
                piece.config, prompt_tuning_init="RANDOM", prompt_tuning_init_text=None, tokenizer_name_or_path=None
            )


def installed(model: nn.Module) -> Installed:
    state = state_of(model)
    assert state is not None, "add_adapter() was called"
    return state.adapters[NAME]


def build_learner(config: TextConfig, model: nn.Module) -> Learner:
    """What trains the adapter that is in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[Group] = []
    for method in methods_of(config):
        rate = learning_rate_of(config, method)
        for parameters in _of_method(method, model, names):
            group = Group("model", parameters, rate, "" if not groups else method)
            groups += lora_plus(group, config.loraplus_lr_ratio) if method == "lora" else [group]
    head = _named((p for module in installed(model).copies.values() for p in module.learned(NAME).parameters()), names)
    if head:
        first = next((one for one in methods_of(config) if one not in PROMPTS), methods_of(config)[0])
        rate = config.head_learning_rate or learning_rate_of(config, first)
        groups.append(Group("model", head, rate, "head" if groups else ""))
    settings = OptimizerSettings(
        config.optimizer,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        epsilon=config.adam_epsilon,
        schedule=config.lr_scheduler,
        warmup_steps=config.lr_warmup_steps,
        total_steps=config.max_train_steps or 1,
        cycles=config.lr_num_cycles,
        power=config.lr_power,
        ema_decay=config.ema_decay if config.use_ema else None,
    )
    return Learner(groups, settings, scale_gradients=config.mixed_precision == "fp16")


def _of_method(method: str, model: nn.Module, names: Mapping[int, str]) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters that one method learns; none where it learns a head alone.

    Biases of a module that is learned whole are not among BitFit's: nothing reaches the base's own.
    """
    inside = installed(model)
    if method == "lora":
        found = _named((p for layer in inside.layers.values() for p in layer.part(NAME).parameters()), names)
    else:
        found = _named(inside.pieces[KINDS[method]].parameters(), names)
    if method in EXISTING:
        whole = tuple(f"{path}." for path in inside.copies)
        found = {name: p for name, p in found.items() if not name.startswith(whole)} if whole else found
    if found:
        yield found


def _named(parameters: Any, names: Mapping[int, str]) -> dict[str, nn.Parameter]:
    return {names[id(parameter)]: parameter for parameter in parameters}


def first_virtual_ids(config: TextConfig, words: int) -> dict[str, list[int]]:
    """{kind: the ids that its virtual tokens will have}, in a model of so many words, before there is a model."""
    found: dict[str, list[int]] = {}
    for one in configs_of(config, None, ["head"], "the model's own"):
        kind = getattr(one, "kind", "lora")
        if kind in _PREFIXES:
            count = int(getattr(one, "tokens", 0) or getattr(one, "prefix_length", 0))
            found[kind] = list(range(words, words + count))
            words += count
    return found


def check_virtual_ids(model: nn.Module, expected: Mapping[str, Sequence[int]]) -> None:
    """Raises ConfigError where the model's embedding is of another size than its config says."""
    for kind, ids in expected.items():
        piece: Any = installed(model).pieces[kind]
        if list(piece.ids) != list(ids):
            raise ConfigError(
                f"the model's embedding has {piece.ids[0]:,} words and its config says {ids[0]:,}; correct config.json"
            )


def in_front(examples: Sequence[Example], ids: Sequence[int], task: Task) -> list[Example]:
    """Examples with virtual tokens in front of everything, which the loss does not count."""
    if not ids:
        return list(examples)
    return [_with_ids(example, list(ids), task.name) for example in examples]


def _with_ids(example: Example, ids: list[int], task: str) -> Example:
    inputs = {name: [*(ids if name == "input_ids" else [0] * len(ids)), *values]
              for name, values in example.inputs.items()}  # fmt: skip
    labels, reference = example.labels, example.reference
    if task in PER_TOKEN:
        labels = [*[IGNORED] * len(ids), *labels]
    elif task == "question-answering":
        labels = tuple(place + len(ids) if place else 0 for place in labels)
        reference = dataclasses.replace(reference, offsets=(*[None] * len(ids), *reference.offsets))
    return dataclasses.replace(example, inputs=inputs, labels=labels, reference=reference)


class BatchLoss:
    """From the position of a micro-batch to its loss: the mean over all that its step counts, not its own alone."""

    def __init__(self, config: TextConfig, model: nn.Module, task: Task, batches: Batches, device: torch.device):
        self.config, self.model, self.task, self.batches, self.device = config, model, task, batches, device

    def __call__(self, position: int) -> Iterator[torch.Tensor]:
        """One scalar with a graph."""
        batch = {name: tensor.to(self.device) for name, tensor in self.batches.batch(position).items()}
        yield task_loss(self.config, self.task, self.device, self.model, batch) * self.batches.share(position)


def task_loss(config: TextConfig, task: Task, device: torch.device, model: Any, batch: Batch) -> torch.Tensor:
    """The mean over what counts in a batch, in the run's precision."""
    with computing(config, device):
        return task.loss(model, batch)


def computing(config: TextConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Within it a half-precision base and what is learned beside it in fp32 compute together."""
    precision = PRECISIONS[config.mixed_precision]
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision)
