"""PEFT's configs: what a dict or an `adapter_config.json` says, as a config of this library and what is around it."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import LoraConfig
from ..errors import ConfigError
from ..files.peft_config import CONFIG, read_config
from ..methods.config import MethodConfig
from ..methods.registry import METHODS
from .hub import adapter_folder
from .task_type import task_of

# PEFT's peft_type -> the word for it here; the methods that PEFT does not have answer with their own in capitals.
PROMPTS = {"PROMPT_TUNING": "prompt_tuning", "P_TUNING": "p_tuning", "PREFIX_TUNING": "prefix_tuning"}
# Fields of PEFT's that describe, that the engine finds out for itself, or that mean nothing without another one.
_AROUND = (
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "fan_in_fan_out", "megatron_core", "qalora_group_size", "token_dim", "num_transformer_submodules",
    "num_attention_heads", "num_layers",
)  # fmt: skip

Method = LoraConfig | MethodConfig


@dataclass
class PeftConfig:
    """What `PeftModel.peft_config` holds for each adapter, and what a folder's `adapter_config.json` says.

    method: the config that the engine works with; its fields answer on this object too (`config.r`).
    base_model_name_or_path, revision: the base that the adapter is for, as its maker knew it.
    """

    method: Method
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "method" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.method, name)

    @property
    def peft_type(self) -> str:
        return peft_type(self.method)

    @property
    def is_prompt_learning(self) -> bool:
        return self.peft_type in PROMPTS

    def to_dict(self) -> dict[str, Any]:
        around = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "method"}
        return {"peft_type": self.peft_type, **around, **self.method.to_dict()}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any
    ) -> PeftConfig:
        """Of a folder, or of a repository on the Hub (hub: `revision`, `token`, `cache_dir` …).

        Raises ModelNotFoundError, AdapterFormatError or ConfigError.
        """
        return read_peft_config(adapter_folder(pretrained_model_name_or_path, subfolder, **hub))


def get_peft_config(config_dict: Mapping[str, Any]) -> Method:
    """The config that PEFT's fields describe: {"peft_type": "LORA", "r": 8, …} is a LoraConfig.

    Raises ConfigError for a method that is not known, or a field that is not and is set.
    """
    kind = config_dict.get("peft_type")
    if kind is None:
        raise ConfigError("the config has no peft_type: give 'LORA', 'P_TUNING', 'PROMPT_TUNING' or 'PREFIX_TUNING'")
    if config_dict.get("inference_mode") is True:
        raise ConfigError("inference_mode=True makes an adapter that never learns: load one with PeftModel instead")
    return _method(str(getattr(kind, "value", kind)), config_dict, _AROUND)


def read_peft_config(folder: Path) -> PeftConfig:
    """Raises AdapterFormatError or ConfigError."""
    read = read_config(folder / CONFIG)
    fields = read.fields
    revision = fields.get("revision")
    return PeftConfig(
        _method(read.kind, {name: value for name, value in fields.items() if name != "init_lora_weights"}, fields),
        fields.get("base_model_name_or_path"),
        revision if isinstance(revision, str) else None,
        fields.get("inference_mode") is True,
    )


def method_of(given: Method | PeftConfig) -> Method:
    """Raises ConfigError for what is no config."""
    method = given.method if isinstance(given, PeftConfig) else given
    if not isinstance(method, Method):
        raise ConfigError(f"peft_config={str(given)[:60]}: give a LoraConfig or another method's config")
    return method


def peft_type(method: Method) -> str:
    """PEFT's word for a config's method."""
    if isinstance(method, LoraConfig):
        return "LORA"
    return next((word for word, kind in PROMPTS.items() if kind == method.kind), method.kind.upper())


def named_task(method: Method) -> Method:
    """The config with its task as a plain word of PEFT's. Raises ConfigError for another."""
    task = task_of(method.task_type)
    return method if task is None else dataclasses.replace(method, task_type=str(task))


def _method(kind: str, fields: Mapping[str, Any], ignored: Iterable[str]) -> Method:
    """The config with the fields that are known. Others may be empty or among `ignored`, else it is a ConfigError."""
    word = PROMPTS.get(kind, kind.lower())
    if kind != "LORA" and word not in METHODS:
        raise ConfigError(f"peft_type={kind[:40]!a} is not known; there are {', '.join(('LORA', *PROMPTS))}")
    cls: Any = LoraConfig
    if kind != "LORA":
        module, name, _ = METHODS[word]
        cls = getattr(importlib.import_module(f"..methods.{module}", __package__), name)
    known = {field.name for field in dataclasses.fields(cls)}
    given = {name: value for name, value in fields.items() if name in known and value is not None}
    given.update({n: value for n, value in fields.items() if n not in (*known, *ignored) and value})
    if kind == "PREFIX_TUNING" and not given.get("prefix_projection"):
        given.pop("encoder_hidden_size", None)  # PEFT fills it in without need
    method: Method = cls.from_dict(given)
    return named_task(method)
