"""`PeftModel`: a model and its adapters as one module, with PEFT's methods."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import nn

from ..errors import ConfigError
from ..inject import adapter_parameters, add_adapter, delete_adapter, unload
from ..merge import merge_adapters, unmerge_adapters
from ..per_sample import adapters_per_sample
from ..report import LoadReport
from ..state import adapter_names, holders, states
from ..switch import active_adapters, disable_adapters, set_adapters
from .checkpoint import keep_adapters_only
from .config import Method, PeftConfig, method_of, read_peft_config
from .counts import counts_line, parameter_counts
from .defaults import completed
from .folder import read_into, write_folders
from .hub import adapter_folder
from .merging import merge_for_good
from .prompts import generated, with_prompts
from .tuner import Tuner

BASE = "__base__"  # what PEFT calls a row without an adapter


class PeftModel(nn.Module):
    """A model with adapters, by PEFT's names. What it is not asked itself, the model answers (`config`, `device` …).

    The model is held, not wrapped: it keeps its class, its names and its bits, and the functions of this library
    (`set_adapters`, `merge_adapters`, `save_adapter` …) work on `get_base_model()` at the same time.
    `base_model` is a thin module with the model in it as `model`; for prompts it is the model, as in PEFT.

    Different from PEFT:
        adapters of different methods can be beside each other, and a LoRA can act together with a prompt;
        `unload` gives back the model bit for bit, its own head included;
        `state_dict` has what the adapters learned and nothing of the base (see `checkpoint.py`);
        `merge_adapter` refuses adapters with learned heads; `merge_and_unload` takes the heads over.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: Method | PeftConfig | None = None,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """peft_config: of a first adapter, new and active; None for none. autocast_adapter_dtype: whether it learns in
        fp32 whatever the model's dtype. Raises ConfigError or AdapterMismatchError; the model is then as it was."""
        super().__init__()
        method = None if peft_config is None else method_of(peft_config)
        prompt = method is not None and PeftConfig(method).is_prompt_learning
        self.base_model = model if prompt else Tuner(model)
        self.peft_config: dict[str, PeftConfig] = {}
        keep_adapters_only(self)
        if method is not None and peft_config is not None:
            self._add(adapter_name, peft_config, autocast_adapter_dtype)
            self.set_adapter(adapter_name, inference_mode=bool(getattr(method, "inference_mode", False)))
        self.training = self.base_model.training = model.training

    def forward(
        self,
        *args: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward; where prompts act, with their virtual tokens in front of the input, as PEFT does:
        what the model says of those positions is part of the answer.

        adapter_names: an adapter for each row of the batch, "__base__" for none; for training too, unlike PEFT's.
        The other names are here for trainers, which choose a dataset's columns by them; transformers' Trainer passes
        more of them on with remove_unused_columns=False.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "labels": labels,
            "start_positions": start_positions,
            "end_positions": end_positions,
        }
        kwargs.update({name: value for name, value in named.items() if value is not None})
        with self._rows(adapter_names):
            args, kwargs = with_prompts(self.get_base_model(), args, kwargs)
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own generate; where prompts act, with their virtual tokens in front, which are not returned.
        adapter_names: as for `forward`."""
        with self._rows(adapter_names):
            return generated(self.get_base_model(), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_model", "peft_config"):
                raise
            return getattr(self.base_model, name)

    # What there is, and what acts.

    def get_base_model(self) -> nn.Module:
        """The model itself."""
        model: nn.Module = self.base_model.model if isinstance(self.base_model, Tuner) else self.base_model
        return model

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act, or would outside `disable_adapter`."""
        there = list(states(self.get_base_model()).values())
        merged = [name for state in there if state.merged is not None for name in state.merged.adapters]
        return list(dict.fromkeys([*merged, *(name for state in there for name in state.weights)]))

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the adapter that acts; a list of them where it is not one."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def peft_type(self) -> str:
        """PEFT's word for the method of the first adapter."""
        return next((config.peft_type for config in self.peft_config.values()), "LORA")

    @property
    def modules_to_save(self) -> set[str] | None:
        """Modules that some adapter learns whole copies of."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether a trainer may pass `num_items_in_batch`: as the model says."""
        model = self.get_base_model()
        kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
        return bool(getattr(model, "accepts_loss_kwargs", inspect.Parameter.VAR_KEYWORD in kinds))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(parameters that learn, all parameters), those of the adapters among both."""
        return parameter_counts(self)

    def print_trainable_parameters(self) -> None:
        """Print both counts and their ratio, on one line."""
        print(counts_line(*self.get_nb_trainable_parameters()))  # noqa: T201  what the method is for

    # Adapters in and out.

    def add_adapter(
        self, adapter_name: str, peft_config: Method | PeftConfig, *, autocast_adapter_dtype: bool = True
    ) -> None:
        """Add a new adapter beside those there are; `set_adapter` lets it act and learn.

        Raises ConfigError or AdapterMismatchError; the model is then as it was.
        """
        acting = self._acting()
        self._add(adapter_name, peft_config, autocast_adapter_dtype)
        self._act(acting)
        self._learn(adapter_name, adapter_name in acting)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *,
        subfolder: str | None = None,
        **hub: Any,
    ) -> LoadReport:
        """Load a folder that `save_pretrained` or PEFT wrote, beside the adapters that there are; `set_adapter` lets it
        act. An adapter of that name takes its tensors over in place, where they fit, and is replaced where they do not.

        Raises ModelNotFoundError, AdapterFormatError, AdapterMismatchError or ConfigError.
        """
        folder = adapter_folder(model_id, subfolder, **hub)
        config = read_peft_config(folder)
        acting = self._acting()
        first = not adapter_names(self.get_base_model())
        report = read_into(self.get_base_model(), folder, adapter_name, config)
        config.inference_mode = not is_trainable
        self.peft_config[adapter_name] = config
        self._act({adapter_name: 1.0} if first else acting)
        self._learn(adapter_name, is_trainable)
        if not is_trainable:
            self.eval()
        return report

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        *,
        subfolder: str | None = None,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        **hub: Any,
    ) -> Self:
        """A model with the adapter of a folder, or of a repository on the Hub, in it and acting.

        is_trainable: for training on; else it is frozen and everything is in evaluation mode.
        config: the folder's own, if it was read before.
        low_cpu_mem_usage, autocast_adapter_dtype: accepted; nothing is allocated twice, and adapters are fp32.
        Raises ModelNotFoundError, AdapterFormatError, AdapterMismatchError or ConfigError; the model is then as it was.
        """
        from .mapping import class_for

        folder = adapter_folder(model_id, subfolder, **hub)
        config = config or read_peft_config(folder)
        kind: type[Any] = class_for(config.task_type) if cls is PeftModel else cls
        made = kind(model)
        if config.is_prompt_learning:
            made.base_model = model
        made.load_adapter(folder, adapter_name, is_trainable)
        found: Self = made
        return found

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        **others: Any,
    ) -> None:
        """Write each adapter as a folder of PEFT's: "default" into `save_directory`, others into a folder of their name
        in it. Other files there stay.

        others: `safe_serialization` has to be True, `state_dict` is not needed.
        Raises ConfigError, or AdapterFormatError for what PEFT has no place for (`save_adapter` has).
        """
        if not others.pop("safe_serialization", True):
            raise ConfigError("safe_serialization=False would write a pickle: leave it out")
        unknown = sorted(set(others) - {"state_dict", "save_embedding_layers"})
        if unknown:
            raise ConfigError(f"save_pretrained has no {', '.join(unknown)}")
        if is_main_process:
            write_folders(self.get_base_model(), save_directory, selected_adapters)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let exactly this adapter act and learn; with inference_mode only act. Several names act together.

        Raises ConfigError for a name that is not there.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._act(dict.fromkeys(names, 1.0))
        for name in adapter_names(self.get_base_model()):
            self._learn(name, name in names and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take one adapter out; if it was the only one to act, the first of the others does. Raises ConfigError."""
        delete_adapter(self.get_base_model(), adapter_name)
        self.peft_config.pop(adapter_name, None)
        left = adapter_names(self.get_base_model())
        if left and not self.active_adapters:
            self.set_adapter(left[0])

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the context the model answers as without adapters, bit for bit."""
        with disable_adapters(self.get_base_model()):
            yield

    # Adapters in the weights.

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Put adapters, by default those that act, into the base weights; `unmerge_adapter` takes them out bit for bit.

        safe_merge: accepted; a weight that would be no finite number is refused always.
        Raises ConfigError or AdapterMismatchError; the model is then as it was.
        """
        merge_adapters(self.get_base_model(), adapter_names)

    def unmerge_adapter(self) -> None:
        """Raises ConfigError if nothing is merged."""
        unmerge_adapters(self.get_base_model())

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The model with the adapters in its weights, its head the learned one, and nothing else left of them.

        progressbar, safe_merge: accepted. Raises ConfigError or AdapterMismatchError; the model is then as it was.
        """
        merge_for_good(self.get_base_model(), adapter_names)
        self.peft_config.clear()
        return self.get_base_model()

    def unload(self) -> nn.Module:
        """The model as it was before the first adapter, bit for bit."""
        unload(self.get_base_model())
        self.peft_config.clear()
        return self.get_base_model()

    def _add(self, name: str, given: Method | PeftConfig, full_precision: bool) -> None:
        model = self.get_base_model()
        method = completed(method_of(given), model)
        dtype = torch.float32 if full_precision else next(model.parameters()).dtype
        add_adapter(model, method, name, dtype=dtype)
        base = getattr(model, "name_or_path", None) or None
        self.peft_config[name] = PeftConfig(method, base, given.revision if isinstance(given, PeftConfig) else None)

    def _rows(self, names: Sequence[str] | None) -> AbstractContextManager[None]:
        if names is None:
            return nullcontext()
        return adapters_per_sample(self.get_base_model(), [None if name == BASE else name for name in names])

    def _acting(self) -> dict[str, float]:
        """{name: weight} of what acts."""
        acting = active_adapters(self.get_base_model())
        return {name: next(iter(by_component.values())) for name, by_component in acting.items()}

    def _act(self, weights: dict[str, float]) -> None:
        set_adapters(self.get_base_model(), list(weights), list(weights.values()))

    def _learn(self, name: str, learns: bool) -> None:
        holders(self.get_base_model(), name)
        for parameters in adapter_parameters(self.get_base_model(), name).values():
            for parameter in parameters:
                parameter.requires_grad_(learns)
